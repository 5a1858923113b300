"""`python -m r1fast.rewards --check FILE.jsonl`: try rewards on given completions before a long run trusts them.

Each row has a `completion`, what the reward compares it with (`reference`, or `answer`; whatever a task's `answer` may
be), and perhaps what somebody says that it is worth (`label`, `expected`: a number, or true and false). The table says
for every reward how its values lie, how often it failed and why, what it took, and where it disagrees with the labels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1fast import plugins
from r1fast.config import CommandParser, UserError, load_recipe
from r1fast.rewards.base import Score, configure, get, names
from r1fast.rewards.pool import RewardPool
from r1fast.schema import RecipeConfig, RewardsConfig

SHOWN = 3  # failures and disagreements that are printed of each reward
FIELDS = ("reference", "answer")
LABELS = ("label", "expected")
SAME = 1e-6  # values nearer than this agree


@dataclass(slots=True)
class Tried:
    """What one reward made of the rows that ask for it."""

    name: str
    scores: list[Score] = field(default_factory=list)
    labels: list[float | None] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def values(self) -> list[float]:
        return [score.value for score in self.scores if score.error is None]

    @property
    def failures(self) -> Counter:
        return Counter(score.error for score in self.scores if score.error is not None)

    def disagreements(self) -> list[tuple[int, float, float]]:
        """(line, value, label) of the rows that are judged and labelled, and not alike."""
        judged = zip(self.lines, self.scores, self.labels, strict=True)
        return [
            (line, score.value, label)
            for line, score, label in judged
            if score.error is None and label is not None and abs(score.value - label) > SAME
        ]

    def labelled(self) -> int:
        pairs = zip(self.scores, self.labels, strict=True)
        return sum(label is not None and score.error is None for score, label in pairs)


def parser() -> CommandParser:
    p = CommandParser(
        prog="python -m r1fast.rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", required=True, type=Path, metavar="FILE.jsonl", help="rows of completions")
    p.add_argument("--rewards", metavar="NAME,...", help="which, for every row; else a row's own `reward` says it")
    p.add_argument("--recipe", metavar="RECIPE", help="its settings and plugins, and the rewards of its mixes")
    p.add_argument(
        "--accuracy", metavar="NAME", help="the reward that a recipe's `accuracy` means, where it must be told"
    )
    p.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="rewards of your own; may come again"
    )
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the recipe, as for r1fast.train; "
                   "without one, of its `rewards` block (sandbox=rlimits)")  # fmt: skip
    return p


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row); UserError names what is no row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise UserError(f"{path}:{number}: a row is a JSON object with a text `completion`")
        for key in LABELS:
            if not isinstance(row.get(key), bool | int | float | None):
                raise UserError(f"{path}:{number}: `{key}` must be a number, or true or false")
        yield number, row


def asked_by(recipe: RecipeConfig, accuracy: str | None) -> list[str]:
    """The rewards of every mix and rejection of the recipe, `accuracy` being what its tasks' verifiers are."""
    kinds: dict[str, None] = {}
    for stage in recipe.stages.values():
        tasks = [(entry.task, entry.rewards) for entry in getattr(stage, "mix", ())]
        tasks += [(stage.task, stage.require)] if stage.kind == "reject" else []
        for task, rewards in tasks:
            for kind in rewards:
                kinds[accuracy or _verifier(recipe, task) if kind == "accuracy" else kind] = None
    return [kind for kind in kinds if kind in names()]  # not those that ask a model of the run


def _verifier(recipe: RecipeConfig, task: str) -> str:
    config = recipe.tasks[task]
    name = config.options.get("verifier", config.kind)
    if name not in names():
        raise UserError(
            f"which reward `accuracy` is for task {task!r} (kind {config.kind!r}) must be told: --accuracy NAME"
        )
    return name


def chosen(args: argparse.Namespace) -> tuple[list[str], RewardsConfig]:
    """The rewards for every row (none: each row names its own) and the settings; loads plugins."""
    if args.recipe is None:
        plugins.load(args.plugin)
        given = args.rewards.split(",") if args.rewards else []
        return [get(name.strip()).name for name in given], _settings(args.settings)
    recipe = load_recipe(args.recipe, args.settings)
    plugins.load([*recipe.plugins, *args.plugin])
    if args.rewards:
        return [get(name.strip()).name for name in args.rewards.split(",")], recipe.rewards
    return asked_by(recipe, args.accuracy), recipe.rewards


def _settings(overrides: Sequence[str]) -> RewardsConfig:
    """The `rewards` block alone, from overrides without its name."""
    recipe = load_recipe("tiny", [f"rewards.{text.removeprefix('rewards.')}" for text in overrides])
    return recipe.rewards


def reference_of(name: str, row: Mapping[str, Any]) -> Any:
    if name in ("length", "overlong"):
        return row
    if name == "language" and "language" in row:
        return row["language"]
    for key in FIELDS:
        if key in row:
            return row[key]
    return row if name in ("code", "ifeval", "judge") else None  # a data set's own row is a reference of these


def check(path: Path, rewards: Sequence[str], settings: RewardsConfig) -> list[Tried]:
    """Every row through the rewards that ask for it, in the workers that a run would use."""
    rows = list(read(path))
    if not rows:
        raise UserError(f"{path} holds no rows")
    configure(settings)
    tried: dict[str, Tried] = {}
    items: dict[str, list[tuple[str, str, Any]]] = {}
    for line, row in rows:
        own = [row["reward"]] if not rewards and "reward" in row else rewards
        if not own:
            raise UserError(f"{path}:{line}: no reward to try: give --rewards NAME, --recipe, or a field `reward`")
        label = next((row[key] for key in LABELS if row.get(key) is not None), None)
        for name in own:
            entry = tried.setdefault(get(name).name, Tried(name))
            entry.lines.append(line)
            entry.labels.append(None if label is None else float(label))
            items.setdefault(name, []).append((name, row["completion"], reference_of(name, row)))
    for name in tried:
        if (why := get(name).why_not()) is not None:
            raise UserError(why)
    with RewardPool() as pool:
        for name, entry in tried.items():
            began = time.perf_counter()
            if get(name).cheap:
                entry.scores = [get(name).attempt(text, reference) for _, text, reference in items[name]]
            else:
                entry.scores = pool.run(items[name])
            entry.seconds = time.perf_counter() - began
    return list(tried.values())


def show(tried: Sequence[Tried]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("reward", "rows", "mean", "0", "between", "1", "least", "most", "failed", "disagree", "seconds"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for entry in tried:
        values, wrong = entry.values, len(entry.disagreements())
        spread = ["-"] * 6
        if values:
            zeros, ones = sum(v == 0.0 for v in values), sum(v == 1.0 for v in values)
            shares = [f"{count / len(values):.1%}" for count in (zeros, len(values) - zeros - ones, ones)]
            spread = [f"{sum(values) / len(values):.3f}", *shares, f"{min(values):.3g}", f"{max(values):.3g}"]
        failed = entry.failures.total()
        agreed = f"{wrong} of {entry.labelled()}" if entry.labelled() else "-"
        table.add_row(entry.name, str(len(entry.scores)), *spread, str(failed), agreed, f"{entry.seconds:.2f}")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    for entry in tried:
        for error, times in entry.failures.most_common(SHOWN):
            console.print(f"{entry.name} failed {times}x: {error}", markup=False, highlight=False)
        for line, value, label in entry.disagreements()[:SHOWN]:
            console.print(f"{entry.name} disagrees on line {line}: {value:g}, the label is {label:g}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 tried, 1 where a reward failed on a larger share than `rewards.max_failures`, 2 bad input."""
    try:
        args = parser().parse_args(argv)
        rewards, settings = chosen(args)
        tried = check(args.check, rewards, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    show(tried)
    broken = [entry.name for entry in tried if entry.failures.total() > settings.max_failures * len(entry.scores)]
    if broken:
        print(f"a run would stop: {', '.join(broken)} failed on more than {settings.max_failures:.0%}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
