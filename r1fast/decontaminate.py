"""`python -m r1fast.decontaminate TRAIN.jsonl --against NAME|FILE ...`: which training rows hold what is to be tested.

A row is contaminated where one of its texts has a 10-gram in common with a question or reference solution of a
benchmark. Without --out it is only reported; --out writes the clean rows, or with --mark all of them, the contaminated
ones with a field `contaminated` that names the benchmark, the problem and the words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1fast.config import CommandParser, UserError
from r1fast.metrics import write_atomically
from r1fast.tasks.ngrams import Hit, Index, N

FIELD = "contaminated"


def parser() -> CommandParser:
    p = CommandParser(prog="python -m r1fast.decontaminate", description=__doc__.split("\n\n")[1])
    p.add_argument("train", type=Path, metavar="TRAIN.jsonl", help="rows of any fields; all of their texts are read")
    p.add_argument(
        "--against", action="append", required=True, metavar="NAME[=FILE]|FILE", help="a benchmark or its rows; several"
    )
    p.add_argument("--ngram", type=int, default=N, metavar="N", help=f"words in common (default {N}, the paper's)")
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the rows that are clean")
    p.add_argument("--mark", action="store_true", help="write all rows, the contaminated ones marked")
    return p


def problems(spec: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """A benchmark's name, and (problem's id, question and solutions) of every problem."""
    from r1fast.evaluate import find_task
    from r1fast.tasks.benchmarks import TABLE

    name, _, data = spec.partition("=")
    task = find_task(name, data) if data and name in TABLE else find_task(spec, None)
    if hasattr(task, "texts"):
        return task.name, task.texts()
    worked = {example.prompt: example.completion for example in _examples(task)}
    every = task.problems("test")
    return task.name, [(p.id, [p.text, *([worked[p.text]] if p.text in worked else [])]) for p in every]


def _examples(task) -> list:
    try:
        return task.examples()
    except UserError:  # it has no written solutions
        return []


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row, however deep (messages of a conversation)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part)


def decontaminate(args: argparse.Namespace) -> tuple[list[tuple[dict, Hit | None]], dict[str, int]]:
    """Every row with its hit, and the number of problems of each benchmark. UserError before anything is read."""
    from r1fast.tasks.rows import read_jsonl

    if args.ngram < 1:
        raise UserError(f"--ngram is {args.ngram}, it must be at least 1")
    if args.mark and args.out is None:
        raise UserError("--mark needs --out FILE.jsonl, where the marked rows go")
    if not args.train.is_file():
        raise UserError(f"{args.train}: no such file")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: give a file in a directory that exists")
    index, counts = Index(args.ngram), {}
    for spec in args.against:
        name, found = problems(spec)
        counts[name] = len(found)
        for problem, texts in found:
            index.add(name, problem, texts)
    rows = [row for row, _ in read_jsonl(args.train)]
    if not rows:
        raise UserError(f"{args.train} holds no rows")
    return [(row, index.find(texts_of({k: v for k, v in row.items() if k != FIELD}))) for row in rows], counts


def show(args: argparse.Namespace, rows: list[tuple[dict, Hit | None]], counts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    hits = [hit for _, hit in rows if hit is not None]
    held, touched = Counter(hit.benchmark for hit in hits), {(hit.benchmark, hit.problem) for hit in hits}
    table = Table(title=f"{len(hits):,} of {len(rows):,} rows share {args.ngram} words with a benchmark")
    for column in ("benchmark", "problems", "found in training rows", "contaminated rows"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name, count in counts.items():
        table.add_row(name, str(count), str(sum(benchmark == name for benchmark, _ in touched)), str(held[name]))
    console = Console()
    console.print(table)
    for hit in hits[:5]:
        console.print(f"{hit.benchmark} {hit.problem}: {hit.words}", markup=False, highlight=False)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        rows, counts = decontaminate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    show(args, rows, counts)
    if args.out is not None:
        kept = [
            {**row, FIELD: {"benchmark": hit.benchmark, "problem": hit.problem, "words": hit.words}} if hit else row
            for row, hit in rows
            if args.mark or hit is None
        ]
        write_atomically(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
