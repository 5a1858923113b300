"""`python -m r1fast.evaluate MODEL_DIR --task NAME|FILE.jsonl`: one checkpoint, one task, the paper's protocol.

pass@1 is the mean over k samples at T 0.6 and top-p 0.95, with a bootstrap interval; pass@k is unbiased, cons@k is the
majority's. The numbers come from the same code as the ones after every stage of a recipe (stages/evaluate.py). With
--out every completion is kept, first in FILE.json.partial as it comes: an interrupted evaluation goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from r1fast.config import CommandParser, UserError
from r1fast.metrics import write_atomically
from r1fast.schema import EvaluationConfig, SamplingConfig, TaskConfig

MADE = 256  # problems of a task that makes them
LONGEST = 32_768  # tokens of a benchmark's completion, as in the paper, where the model's context has room for it
FIELDS_OF_KIND = {"gsm8k": ("question", "answer"), "math": ("problem", "answer")}


def parser() -> CommandParser:
    p = CommandParser(prog="python -m r1fast.evaluate", description=__doc__.split("\n\n")[1])
    p.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint in Hugging Face format")
    p.add_argument(
        "--task", required=True, metavar="NAME|FILE", help="a benchmark, a kind of task, or a JSONL file of problems"
    )
    p.add_argument("--data", metavar="FILE", help="the rows that a task given by NAME reads, or a data set's name")
    p.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the task, as seed=1")
    p.add_argument("--samples", type=int, metavar="K", help="completions a problem (default 16, or the benchmark's)")
    p.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    p.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95; 1 is off")
    p.add_argument(
        "--max-tokens", type=int, metavar="N", help="default: half of the context, at most 1024 (benchmarks: 32768)"
    )
    p.add_argument("--limit", type=int, metavar="N", help="problems (default: all of a file, else 256)")
    p.add_argument("--template", choices=["paper", "checkpoint", "words"], default=None, help="default: checkpoint's")
    p.add_argument("--sandbox", choices=["bubblewrap", "rlimits"], default="bubblewrap", help="for programs")
    p.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, for tasks that a model judges")
    p.add_argument("--judge-model", metavar="NAME", help="its model; replies are kept in judge.sqlite")
    p.add_argument("--judge-budget", type=int, metavar="N", help="requests to the judge in all (default: any number)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers and every completion")
    return p


def kind_of_rows(path: Path) -> str:
    """The kind of task, or the benchmark, whose fields the first row of a file has; any other is of kind `jsonl`."""
    with path.open(encoding="utf-8") as file:
        try:
            first = json.loads(file.readline())
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}:1: not a JSON object: {error}") from error
    if not isinstance(first, dict):
        raise UserError(f"{path}:1: a row is a JSON object, not {type(first).__name__}")
    from r1fast.tasks.benchmarks import recognise

    named = recognise(first)
    if named is not None:
        return named
    for kind, needed in FIELDS_OF_KIND.items():
        if first.keys() >= set(needed) and (kind != "gsm8k" or "####" in str(first["answer"])):
            return kind
    return "jsonl"


class WholeFile:
    """A task whose every row is a test problem: a file named on the command line is what is to be measured."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def problems(self, split, count=None, seed=0):
        every = [p for part in ("train", "validation", "test") for p in self._task.problems(part, None, seed)]
        every.sort(key=lambda problem: problem.id)
        return every[:count]


def find_task(spec: str, data: str | None, options: Sequence[str] = ()):
    """A benchmark by its name, a task by its kind, or a file of problems: one of a benchmark where its fields are."""
    from r1fast import tasks

    given = dict(option.partition("=")[::2] for option in options)
    path = Path(spec)
    if spec in tasks.benchmarks.TABLE:
        return tasks.build(spec, TaskConfig(kind="benchmark", path=data, options={"name": spec, **given}), None)
    if path.suffix in (".jsonl", ".json") or path.exists():
        if not path.is_file():
            raise UserError(f"--task {spec}: no such file")
        kind = kind_of_rows(path)
        if kind in tasks.benchmarks.TABLE and kind not in FIELDS_OF_KIND:
            return find_task(kind, spec, options)
        return WholeFile(tasks.build(path.stem, TaskConfig(kind=kind, path=spec, options=given), None))
    return tasks.build(spec, TaskConfig(kind=spec, path=data, options=given), data)


def _check(args: argparse.Namespace) -> None:
    """What can be wrong with the options themselves, before anything is read."""
    for name in ("samples", "limit", "max_tokens", "judge_budget"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}, it must be a number from 0 (greedy) up")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p is {args.top_p}, it must be above 0 and at most 1 (off)")
    for option in args.option:
        if "=" not in option:
            raise UserError(f"--option {option}: give KEY=VALUE, as --option seed=1")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: give a file in a directory that exists")


def _can_judge(task, args: argparse.Namespace) -> None:
    """UserError where the task's verifiers cannot be used here, before the model is read."""
    from pydantic import ValidationError

    from r1fast import rewards
    from r1fast.schema import JudgeConfig, RewardsConfig

    if (args.judge_url is None) != (args.judge_model is None):
        raise UserError("--judge-url and --judge-model go together; give both, or neither")
    judge = None
    if args.judge_url is not None:
        try:
            judge = JudgeConfig(url=args.judge_url, model=args.judge_model, budget=args.judge_budget)
        except ValidationError as error:  # without what was given, which may hold a key
            raise UserError(f"--judge-url {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    rewards.configure(RewardsConfig(sandbox=args.sandbox, judge=judge))
    for name in (task.verifier, *task.beside):
        if (why := rewards.get(name).why_not()) is not None:
            raise UserError(f"task {task.name!r} is judged by the reward {name!r}: {why}")


def evaluate(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """The numbers, and a row for every problem with its completions."""
    from r1fast.model.weights import load, read_config

    _check(args)
    read_config(Path(args.model))  # before a data set is loaded, perhaps from afar
    task = find_task(args.task, args.data, args.option)
    if task.verifier is None:
        raise UserError(f"task {args.task!r} has no right answers to measure; give a task with a verifier")

    _can_judge(task, args)

    from r1fast.device import choose_device, choose_dtype
    from r1fast.model.tokenizer import CHAT_TEMPLATES
    from r1fast.stages.answers import AnswerFile, Tally
    from r1fast.stages.evaluate import Evaluator

    device = choose_device(args.device)
    model, tokenizer = load(args.model, device=device, dtype=choose_dtype(args.dtype, device))
    if tokenizer is None:
        raise UserError(f"{args.model}: there is no tokenizer beside the weights; save one into the folder")
    if args.template not in (None, "checkpoint"):
        tokenizer.chat_template = CHAT_TEMPLATES[args.template]
    longest = model.config.max_positions
    protocol = protocol_of(args, task, longest)
    evaluator = Evaluator(model, tokenizer, {task.name: task}, longest)
    of, shown = key(args, protocol, task, model.dtype), progress()
    with AnswerFile(partial(args.out), of, tally := Tally(shown.update)) as answers, shown:
        shown.stage(task.name, "evaluate", len(task.problems("test", protocol.limit)))
        if answers.finished:
            tally.done = answers.finished
            shown.warn(f"{answers.finished} problems are in {answers.path} already")
        result, measured, _ = evaluator.evaluate(protocol, answers)
    return result, [row(answered) for answered in measured.answered]


def progress():
    """What the person who waits sees, on standard error: the numbers alone go to standard output."""
    from rich.console import Console

    from r1fast.progress import LiveProgress, PlainProgress

    console = Console(stderr=True)
    return LiveProgress(console=console) if console.is_terminal else PlainProgress(file=sys.stderr)


def protocol_of(args: argparse.Namespace, task, longest: int) -> EvaluationConfig:
    """The options, with what a benchmark's own protocol says where they are not given; `longest`: the context."""
    benchmark = hasattr(task, "benchmark")
    return EvaluationConfig(
        task=task.name,
        limit=args.limit or len(task.problems("test", None if benchmark or isinstance(task, WholeFile) else MADE)),
        samples=args.samples or (task.samples if benchmark else 16),
        greedy=False,
        sampling=SamplingConfig(
            max_tokens=args.max_tokens or min(LONGEST if benchmark else 1024, longest // 2),
            temperature=args.temperature,
            top_p=args.top_p,
        ),
    )


def partial(out: Path | None) -> Path | None:
    """Where the samples of an evaluation are until it is finished."""
    return None if out is None else out.with_name(f"{out.name}.partial")


def key(args: argparse.Namespace, protocol: EvaluationConfig, task, dtype) -> dict[str, str]:
    """What the completions depend on: an evaluation with another key is another one."""
    from r1fast.graph import content_hash
    from r1fast.stages.evaluate import SEED

    problems = [[p.id, p.text, p.answer] for p in task.problems("test", protocol.limit, SEED)]
    asked = hashlib.sha256(json.dumps(problems, ensure_ascii=False, default=str).encode()).hexdigest()
    return {
        "checkpoint": content_hash(str(args.model)),
        "task": task.name,
        "problems": f"{len(problems)}, {asked[:16]}",
        "samples": str(protocol.samples),
        "sampling": json.dumps(protocol.sampling.model_dump()),
        "template": args.template or "checkpoint",
        "dtype": str(dtype),
        "judge": f"{args.judge_model} at {args.judge_url}",
    }


def row(answered) -> dict:
    """A problem in the file of results."""
    return {
        "id": answered.prompt.id,
        "prompt": answered.prompt.text,
        "answer": answered.prompt.answer,
        "completions": [sample.text for sample in answered.samples],
        "correct": [sample.correct for sample in answered.samples],
        "tokens": [sample.tokens for sample in answered.samples],
        "finish": [sample.finish for sample in answered.samples],
        "errors": [dict(sample.errors) for sample in answered.samples],
    }


def show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    k, console = result["k"], Console()
    table = Table(title=f"{result['task']}: {result['problems']} problems, {k} samples each")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("pass@1", f"{result['pass@1']:.3f}  [{result['pass@1_low']:.3f}, {result['pass@1_high']:.3f}]")
    for i, value in result["pass@k"].items():
        table.add_row(f"pass@{i}", f"{value:.3f}")
    if result["cons@k"] is not None:
        table.add_row(f"cons@{k}", f"{result['cons@k']:.3f}")
    for name, value in result["summary"].items():
        table.add_row(name, str(value) if not isinstance(value, float) else f"{value:.3f}")
    for name in ("format", "language", "truncated"):
        table.add_row(name, f"{result[name]:.3f}")
    table.add_row("tokens a response", f"{result['length']:.1f}")
    table.add_row("tokens", f"{result['tokens']:,}")
    table.add_row("verifier failures", str(result["errors"]))
    table.add_row("seconds", f"{result['seconds']:.1f}")
    console.print(table)
    if result["categories"]:
        by = Table("category", "problems", "pass@1", "95% interval")
        for name, part in result["categories"].items():
            interval = f"[{part['low']:.3f}, {part['high']:.3f}]"
            by.add_row(name, str(part["problems"]), f"{part['pass@1']:.3f}", interval)
        console.print(by)


def main(argv: list[str] | None = None) -> int:
    args = None
    try:
        args = parser().parse_args(argv)
        result, rows = evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = partial(args.out) if args else None
        print(
            f"\ninterrupted; the same command goes on from {kept}" if kept and kept.exists() else "", file=sys.stderr
        )
        return 130
    show(result)
    if args.out is not None:
        write_atomically(args.out, json.dumps({**result, "rows": rows}, ensure_ascii=False, indent=1) + "\n")
        if result["errors"]:
            print(f"the same command judges the {result['errors']} failed samples again", file=sys.stderr)
        else:
            partial(args.out).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
