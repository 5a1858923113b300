"""Rows of a benchmark's data as its authors published them: JSON lines, a JSON list, CSV, TSV or Parquet (each also
gzipped, but for Parquet), a folder of such files with one subject each, or a data set's name.

Every row comes with where it stands, which begins the sentence about anything that is wrong with it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1fast.config import UserError

Located = tuple[dict[str, Any], str]  # a row, and where it stands
_SPLITS_IN_NAMES = ("_test", "_val", "_dev", "-test", "-val", "-dev")


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a benchmark is on the Hugging Face hub."""

    name: str
    split: str
    config: str | None = None  # "*": every configuration, each a subject


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Located]:
    """All rows of a file or a folder of files. `columns`: of CSV files that have no line of names, in their order."""
    if not path.is_dir():
        yield from _read_file(path, columns)
        return
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _format(file) is not None]
    if not files:
        raise UserError(f"{path}: no file of rows in this folder (.jsonl, .json, .csv, .tsv or .parquet)")
    for file in files:
        subject = file.name.split(".", 1)[0]
        for ending in _SPLITS_IN_NAMES:
            subject = subject.removesuffix(ending)
        for row, where in _read_file(file, columns):
            yield {"subject": subject, **row}, where


def _format(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return next((kind for kind in ("jsonl", "json", "csv", "tsv", "parquet") if name.endswith(f".{kind}")), None)


def _read_file(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    kind = _format(path)
    if kind is None:
        raise UserError(f"{path}: not a format that is read here; give .jsonl, .json, .csv, .tsv or .parquet")
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    yield from {"jsonl": _lines, "json": _document}[kind](path, text) if "json" in kind else _table(path, text, columns)


def _lines(path: Path, text: str) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}"


def _document(path: Path, text: str) -> Iterator[Located]:
    """A list of rows; or lines that go by the name of .json; or DROP's own form, a mapping of passages."""
    if text.lstrip()[:1] != "[":
        try:
            whole = json.loads(text)
        except ValueError:
            yield from _lines(path, text)
            return
        if not isinstance(whole, dict) or not all(isinstance(v, dict) and "qa_pairs" in v for v in whole.values()):
            yield _object(whole, str(path)), str(path)
            return
        for name, passage in whole.items():
            for pair in passage["qa_pairs"]:
                yield {"passage": passage["passage"], **pair}, f"{path}, {name}"
        return
    for number, row in enumerate(_parsed(text, str(path)), 1):
        yield _object(row, f"{path}, row {number}"), f"{path}, row {number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    return row


def _table(path: Path, text: str, columns: Sequence[str]) -> Iterator[Located]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if _format(path) == "tsv" else ",")
    names: Sequence[str] | None = None
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if names is None:
                headless = columns and len(cells) == len(columns) and not set(columns) <= set(cells)
                names = columns if headless else cells
                if not headless:
                    continue
            if cells and len(cells) != len(names):
                raise UserError(f"{where}: {len(cells)} cells where there are {len(names)} columns")
            if cells:
                yield dict(zip(names, cells, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet  # comes with datasets; slow, and only wanted here

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield row, f"{path}, row {number}"


def read_hub(hub: Hub) -> Iterator[Located]:
    """The rows of a data set by its name, through `datasets`; a configuration's name is a row's subject."""
    import datasets  # slow, and only wanted here

    try:
        many = hub.config == "*"
        for config in _unscripted(datasets.get_dataset_config_names, hub.name) if many else [hub.config]:
            for number, row in enumerate(_unscripted(datasets.load_dataset, hub.name, config, split=hub.split)):
                place = f"{hub.name}, {config + ', ' if config else ''}{hub.split} row {number}"
                yield ({"subject": config, **row} if many else dict(row)), place
    except UserError:
        raise
    except Exception as error:  # the library raises of many kinds: no network, no such name, no such configuration
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise UserError(
            f"the data set {hub.name!r} could not be loaded ({reason}); give its rows with --data FILE"
        ) from None


def _unscripted(load: Callable, *args: Any, **options: Any) -> Any:
    """What `load` gives; of a data set that is a program, which is no longer run, the hub's copy in Parquet."""
    try:
        return load(*args, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return load(*args, **options, revision="refs/convert/parquet")
