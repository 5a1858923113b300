"""Tasks whose problems are rows of a file: reading JSONL (or a `datasets` name), checking every row, splitting by hash.

A row that is not what it should be stops the run before any work, with the file and the line.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from r1fast.config import UserError
from r1fast.schema import Strict, TaskConfig
from r1fast.tasks.base import Split, Task
from r1fast.tasks.lexicon import tagged
from r1fast.types import Example, Problem

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz")


class RowOptions(Strict):
    """What every kind that reads rows takes."""

    test_path: str | None = None  # the test split's own file; without it, the split is by hash
    config: str | None = None  # configuration of a `datasets` name


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as read: what is asked, what is right, and a worked solution where the file has one."""

    question: str
    answer: Any  # text, or what else the kind's verifier takes
    worked: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class RowTask(Task):
    """Base of kinds that read rows. A kind says how a JSON object becomes a `Row`."""

    Options = RowOptions
    reads_rows = True
    default_config: ClassVar[str | None] = None  # of a `datasets` name, where the kind's best-known one needs it

    def __init__(self, name: str, config: TaskConfig, default_path: str | None = None) -> None:
        """Reads and checks all rows, so that what is wrong with them is said at once."""
        super().__init__(name, config, default_path)
        path = config.path or default_path
        if path is None:
            raise UserError(
                f"tasks.{name}.path: a task of kind {self.kind!r} reads a JSONL file (or a `datasets` name); give its "
                f"path here or as `data`"
            )
        self._splits = self._read_splits(path)

    def read(self, fields: dict[str, Any], where: str) -> Row:
        """A row from its JSON object; `where` (file and line) begins the sentence of any `UserError`."""
        raise NotImplementedError

    def problems(self, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
        """Distinct rows in the order that `seed` gives: at most all of the split, and none where it is empty."""
        chosen = self._shuffled(split, seed)[:count]
        return [Problem(f"row-{number:06d}", row.question, row.answer, self.name, row.meta) for number, row in chosen]

    def examples(self, count: int | None = None, seed: int = 0) -> list[Example]:
        """The train rows' worked solutions, tagged."""
        rows = [row for _, row in self._worked(seed)[:count]]
        return [Example(row.question, tagged(row.worked or "", row.answer), self.name, row.meta) for row in rows]

    def corpus(self, seed: int = 0, easy: bool = False) -> Iterator[Example]:
        """The train rows' worked solutions as they were written, again and again in a new order; none is easier."""
        while True:
            for _, row in self._worked(seed):
                yield Example(row.question, self.document(row), self.name, row.meta)
            seed += 1

    def document(self, row: Row) -> str:
        """How a worked solution stands in a text."""
        return f"{row.worked}\nanswer : {row.answer}"

    # -- inside -----------------------------------------------------------------------------------------------

    def _worked(self, seed: int) -> list[tuple[int, Row]]:
        rows = [(number, row) for number, row in self._shuffled("train", seed) if row.worked]
        if not rows:
            raise self._lacks("worked solutions among its train rows")
        return rows

    def _shuffled(self, split: Split, seed: int) -> list[tuple[int, Row]]:
        rows = list(self._splits[split])
        random.Random(f"{self.kind} {split} {seed}").shuffle(rows)
        return rows

    def _read_splits(self, path: str) -> dict[Split, list[tuple[int, Row]]]:
        """Rows by split, each with its number in the order of reading (test rows of another file come last)."""
        sources = read_sources(path, self.options.config or self.default_config, f"tasks.{self.name}.path")
        if self.options.test_path is not None:
            place = f"tasks.{self.name}.options.test_path"
            sources["test"] = read_sources(self.options.test_path, self.options.config, place)["train"]
        rows = {split: [self.read(*row) for row in given] for split, given in sources.items()}
        number, placed = 1, {}
        for split, given in rows.items():
            placed[split] = list(enumerate(given, number))
            number += len(given)
        return {**_divided(placed.pop("train"), "validation" not in placed, "test" not in placed), **placed}


def _divided(rows: list[tuple[int, Row]], need_validation: bool, need_test: bool) -> dict[Split, list[tuple[int, Row]]]:
    """`rows` by a hash of the question: 5% to each other split that is needed, the rest to train.

    Equal questions stay together. A file too small for that gives its first rows in hash order to the others, one
    each, as far as a row is left for train.
    """
    hashed = [(((zlib.crc32(row.question.encode()) * 0x9E3779B1) & 0xFFFFFFFF) * 20 >> 32, row) for _, row in rows]
    needed: list[Split] = ["validation"] * need_validation + ["test"] * need_test
    split_of = {row.question: needed[bucket] for bucket, row in hashed if bucket < len(needed)}
    if len(set(split_of.values())) < len(needed) or len(split_of) == len({row.question for _, row in rows}):
        questions = sorted({row.question for _, row in rows}, key=lambda text: (zlib.crc32(text.encode()), text))
        split_of = dict(zip(questions[1:], needed, strict=False))
    parts: dict[Split, list[tuple[int, Row]]] = {"train": [], **{split: [] for split in needed}}
    for number, row in rows:
        parts[split_of.get(row.question, "train")].append((number, row))
    return parts


def read_sources(path: str, config: str | None, place: str) -> dict[Split, list[tuple[dict[str, Any], str]]]:
    """Rows of a JSONL file (all "train"), or of the splits of a `datasets` name, each with where it stands.

    `place` is the key of the recipe that named the path. A file without rows is a `UserError`.
    """
    file = Path(path)
    if file.is_file():
        found: dict[Split, list] = {"train": list(read_jsonl(file))}
    elif file.exists():
        raise UserError(f"{place}: {path} is not a file; give a JSONL file")
    elif _HUB_NAME.fullmatch(path) and not path.endswith(_FILE_SUFFIXES):
        found = _read_hub(path, config, place)
    else:
        raise UserError(f"{place}: no such file: {path}")
    for split, rows in found.items():
        if not rows:
            raise UserError(f"{place}: {path} holds no rows" + (f" in its split {split!r}" if split != "train" else ""))
    return found


def read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each line's JSON object with "path:line"; blank lines are skipped."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
                yield row, where
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_hub(name: str, config: str | None, place: str) -> dict[Split, list[tuple[dict[str, Any], str]]]:
    import datasets  # slow, and only wanted here

    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises of many kinds: no network, no such name, no such configuration
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{place}: no file {name!r}, and no such data set could be loaded: {reason}") from None
    if "train" not in loaded:
        raise UserError(f"{place}: data set {name!r} has no split 'train' (it has {', '.join(loaded)})")
    wanted: tuple[Split, ...] = ("train", "validation", "test")
    return {
        split: [(dict(row), f"{name}, {split} row {i}") for i, row in enumerate(loaded[split])]
        for split in wanted
        if split in loaded
    }


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A field that must be there and be text (or a number, as answers are); surrounding space is dropped."""
    if key not in row:
        have = f"it has {', '.join(map(repr, row))}" if row else "it is empty"
        raise UserError(f"{where}: the row has no field {key!r} ({have})")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: field {key!r} must be text, not {type(value).__name__}")
    text = str(value).strip()
    if not text:
        raise UserError(f"{where}: field {key!r} is empty")
    return text
