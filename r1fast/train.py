"""`python -m r1fast.train`: runs a recipe from the command line. Only the words of the command are here; what runs is
recipe.py. Nothing heavy is imported before the arguments are right, so that --help and mistakes answer at once."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from r1fast.config import DEFAULT_PRESET, CommandParser, UserError, load_recipe, presets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from r1fast.schema import RecipeConfig

STOPPED, BAD_INPUT, INTERRUPTED = 0, 2, 130


def parser() -> argparse.ArgumentParser:
    known = presets()
    width = max(map(len, known))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in known.items())
    made = CommandParser(
        prog="python -m r1fast.train",
        description="Runs every stage of a recipe: a base model in, a reasoning model out.",
        epilog=f"presets:\n{listed}\n\nexamples:\n"
        "  python -m r1fast.train                                  the preset tiny, on whatever is here\n"
        "  python -m r1fast.train tiny seed=1 stages.zero.steps=30\n"
        "  python -m r1fast.train gsm8k model.path=DIR data=FILE.jsonl --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE key.path=value",
        help=f"a preset's name or a YAML file (default: {DEFAULT_PRESET}), then settings that override it",
    )
    made.add_argument("--out", metavar="DIR", help="run directory (default: runs/<recipe>)")
    made.add_argument("--dry-run", action="store_true", help="print the plan and stop: nothing is run or written")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to run (default: the recipe's device)")
    existing = made.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in DIR, reusing finished stages")
    existing.add_argument("--fresh", action="store_true", help="remove the run in DIR and start again")
    return made


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the recipe or None, overrides): a word without `=`, or the name of a file, is the recipe; it comes once."""
    named = [
        word for word in arguments if "=" not in word or (word.endswith((".yaml", ".yml")) and Path(word).is_file())
    ]
    if len(named) > 1:
        raise UserError(f"two recipes are given, {named[0]!r} and {named[1]!r}; settings have the form key.path=value")
    return (named[0] if named else None), [word for word in arguments if word not in named]


def read_arguments(options: argparse.Namespace) -> tuple[RecipeConfig, Path]:
    """The recipe and the run directory. `--resume --out DIR` without a recipe goes on with the one saved in DIR."""
    name, overrides = split_arguments(options.arguments)
    if options.device:
        overrides.append(f"device={options.device}")
    saved = Path(options.out) / "config.yaml" if options.out and options.resume else None
    if name is None and saved is not None and saved.is_file():
        name = str(saved)
    recipe = load_recipe(name or DEFAULT_PRESET, overrides)
    return recipe, Path(options.out or Path("runs") / recipe.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, or stopped by a signal with everything saved; 2 bad input (one sentence on standard error);
    75 ended by the watchdog; 130 interrupted by a second signal, in the middle of a step."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_intermixed_args(argv)
        recipe, out = read_arguments(options)
        if options.dry_run:
            from r1fast.plan import print_plan

            print_plan(recipe, str(out))
            return 0
        return train(recipe, out, options, argv)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}: make room, then go on with --resume", file=sys.stderr)
        return BAD_INPUT
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several ranks that found the same, one says it
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def train(recipe: RecipeConfig, out: Path, options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs, then prints the stage table and writes the report; tells how to resume when interrupted."""
    from r1fast.device import choose_device
    from r1fast.graph import order
    from r1fast.parallel import World, joined
    from r1fast.progress import for_output
    from r1fast.recipe import run, told_before_resuming
    from r1fast.stop import Stalled, Stopped, StopRequest
    from r1fast.watchdog import STALLED

    place = World(int(os.environ.get("RANK", "0")))  # as torchrun says; until the ranks have joined
    if place.first and options.resume and (told := told_before_resuming(recipe, out)):
        print(f"note: {told}", file=sys.stderr)
    try:
        with (
            joined(choose_device(recipe.device), recipe.parallel.tensor) as place,
            for_output(order(recipe), place.everyone.rank) as progress,
            StopRequest(progress.warn).listening() as stop,
        ):
            summary = run(recipe, out, progress=progress, resume=options.resume, fresh=options.fresh, stop=stop)
    except KeyboardInterrupt as ended:
        if isinstance(ended, Stalled):
            print(f"\nerror: {ended}", file=sys.stderr)
        if place.first:
            _tell_interrupted(out, argv)
        return STOPPED if isinstance(ended, Stopped) else STALLED if isinstance(ended, Stalled) else INTERRUPTED
    if not place.first:
        return 0
    from rich.console import Console

    from r1fast.summary import table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table(summary, console.width))
    _write_report(out)
    return 0


def _write_report(out: Path) -> None:
    """The results are safe in summary.json by now: a page that cannot be drawn is told, and fails nothing."""
    from r1fast.report import write_report

    try:
        print(f"report: {write_report(out)}")
    except Exception as error:
        print(f"the report was not written ({type(error).__name__}: {error}); try python -m r1fast.report {out}")
    print(f"run directory: {out}")


def _tell_interrupted(out: Path, argv: Sequence[str]) -> None:
    from r1fast.recipe import finished_stages

    done = finished_stages(out)
    words = [word for word in argv if word not in ("--fresh", "--resume")]
    print(f"\nstopped; finished stages: {', '.join(done) or 'none'}", file=sys.stderr)
    print(f"to go on: {shlex.join(['python', '-m', 'r1fast.train', *words, '--resume'])}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
