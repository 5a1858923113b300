"""The task kind `benchmark`: every row is a test problem, put to the model in the table's words.

    tasks: {aime: {kind: benchmark, path: aime24.jsonl, options: {name: aime24}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1fast import rewards
from r1fast.config import UserError, nearest
from r1fast.schema import Strict, TaskConfig
from r1fast.tasks.base import Split, Task, register
from r1fast.tasks.benchmarks import rows
from r1fast.tasks.benchmarks.files import Hub, Located, read_hub, read_rows
from r1fast.tasks.benchmarks.table import TABLE
from r1fast.types import Problem


class Options(Strict):
    name: str  # in the table
    seed: int = 0  # of the order of GPQA's options
    since: str | None = None  # LiveCodeBench: first day of the contests, as 2024-08-01
    until: str | None = None  # and the last
    split: str | None = None  # of a data set given by name, instead of the table's
    config: str | None = None
    baseline: str | None = None  # Arena-Hard: the baseline's answers, a file of model_answer rows
    ratings: str | None = None  # Codeforces: ratings of people, for the percentile (ratings.py)
    difficulty: str | None = None  # AlpacaEval: instruction_difficulty.csv of the authors


@register("benchmark")
class BenchmarkTask(Task):
    Options = Options
    reads_rows = True

    def __init__(self, name: str, config: TaskConfig, default_path: str | None = None) -> None:
        """Reads and checks all rows. `path`: a file, a folder, or a data set's name; without one, the table's."""
        super().__init__(name, config, default_path)
        known = list(TABLE)
        if self.options.name not in TABLE:
            near = nearest(self.options.name, known)
            raise UserError(
                f"tasks.{name}.options.name: no benchmark {self.options.name!r}{near}; known are {', '.join(known)}"
            )
        self.benchmark = TABLE[self.options.name]
        self.samples = self.benchmark.samples
        self.verifier = rewards.get(self.benchmark.verifier).name
        self.beside = tuple(rewards.get(reward).name for reward in self.benchmark.beside)
        located = self._rows(config.path or default_path)
        if self.options.name == "arena_hard":
            located = self._with_baseline(located)
        found = [self._read(row, where) for row, where in located]
        self.items = [item for item in found if item is not None]
        self.left_out = len(found) - len(self.items)
        if not self.items:
            why = f"; all {self.left_out} rows are left out by its rules" if self.left_out else ""
            raise UserError(f"tasks.{name}: {self.benchmark.title} has no problems{why}")
        self._problems = [self._problem(number, item) for number, item in enumerate(self.items, 1)]

    def problems(self, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
        """All rows are of the test split, in their order: the first `count`."""
        return self._problems[:count] if split == "test" else []

    def texts(self) -> list[tuple[str, list[str]]]:
        """(problem's id, what must not be trained on: its question and its solution), for decontamination."""
        pairs = zip(self._problems, self.items, strict=True)
        return [(problem.id, [item.question, *([item.worked] if item.worked else [])]) for problem, item in pairs]

    def summary(self, answered: Sequence[tuple[Mapping[str, Any], Sequence[Any]]]) -> dict[str, Any]:
        return {} if self.benchmark.summary is None else self.benchmark.summary(answered, self.options)

    # -- inside -----------------------------------------------------------------------------------------------

    def _rows(self, path: str | None) -> list[Located]:
        hub = self.benchmark.hub
        if path is None or not Path(path).exists():
            if path is not None and (path.count("/") != 1 or Path(path).suffix in (".jsonl", ".json", ".csv", ".tsv")):
                raise UserError(f"tasks.{self.name}.path: no such file or folder: {path}")
            config = self.options.config or (hub.config if path is None else None)
            return list(read_hub(Hub(path or hub.name, self.options.split or hub.split, config)))
        return list(read_rows(Path(path), self.benchmark.columns))

    def _with_baseline(self, located: list[Located]) -> list[Located]:
        path = self.options.baseline
        if path is None or not Path(path).exists():
            raise UserError(
                f"tasks.{self.name}.options.baseline: Arena-Hard compares with a baseline's answers; give their file "
                f"(model_answer/gpt-4-0314.jsonl of its repository)" + (f"; there is no {path}" if path else "")
            )
        answers = dict(rows.arena_answer(row, where) for row, where in read_rows(Path(path)))
        joined = []
        for row, where in located:
            name = str(row.get("uid") or row.get("question_id"))
            if name not in answers:
                raise UserError(f"{where}: question {name} has no answer in {path}")
            joined.append(({**row, "baseline": answers[name]}, where))
        return joined

    def _read(self, row: Mapping[str, Any], where: str) -> rows.Item | None:
        try:
            return self.benchmark.read(row, where, self.options)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{where}: not a row in the form of {self.benchmark.title} ({what})") from None

    def _problem(self, number: int, item: rows.Item) -> Problem:
        text = self.benchmark.prompt.format(question=item.question, **item.parts)
        meta = {"language": self.benchmark.language, "category": item.category, "item": item.id, **item.meta}
        return Problem(f"{self.options.name}-{number:05d}", text, item.answer, self.name, meta)
