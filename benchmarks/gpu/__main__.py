"""`python -m benchmarks.gpu`: all parts, or `--only ops,step`, within `--minutes`; benchmarks/on_gpu.sh calls it.

A part is a process group with a share of the time: it is told when to begin nothing new, and is ended when the share
is used up. Whatever becomes of it, what it had measured goes into the results at once, with how it ended, and the next
part begins. Results of the same card and commit are added to, part by part, so several short calls make one file.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu_results import RESULTS, ROOT, Results, machine, read, table, target

GRACE = 10.0  # seconds between what a part is told and when it is ended
LEAST = 15.0  # seconds without which a part is not begun


@dataclass(frozen=True, slots=True)
class Part:
    """`seconds`: its share of the time. `needs`: parts whose files it reads. `untimed`: it measures no times, so it may
    run beside others that do not either."""

    name: str
    module: str
    seconds: float
    needs: tuple[str, ...] = ()
    untimed: bool = False


def _part(name: str, seconds: float, *needs: str, module: str = "", untimed: bool = False) -> Part:
    return Part(name, module or f"benchmarks.gpu.{name}", seconds, needs, untimed)


# In the order in which they answer the questions that the others rest on. The shares add up to more than the eight
# minutes: they are limits, and a part that ends early leaves its time to the next.
PARTS = (
    _part("checkpoints", 150, untimed=True),
    _part("warm", 150, untimed=True),
    _part("tests", 150, module="benchmarks.gpu.right", untimed=True),
    _part("determinism", 100, untimed=True),
    _part("sanitizer", 120, untimed=True),
    _part("ceilings", 20),
    _part("first_device_test", 50, module="benchmarks.first_device_test"),
    _part("ops", 90, "ceilings"),
    _part("exactness", 50),
    _part("sampling", 80, "ceilings", "checkpoints"),
    _part("step", 170, "ceilings", "checkpoints"),
    _part("profile", 45, "checkpoints"),
)
NAMES = {part.name: part for part in PARTS}


def chosen(only: str, folder: Path, parts: tuple[Part, ...] = PARTS) -> list[Part]:
    """Those named, and those they need whose files are not in `folder`; all where none is named."""
    named = set(filter(None, only.split(",")))
    unknown = named - {part.name for part in parts}
    if unknown:
        raise SystemExit(f"--only: no part is called {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(part.name for part in parts)}")  # fmt: skip
    needed = {need for part in parts if part.name in named for need in part.needs}
    wanted = named | {name for name in needed if not (folder / f"{name}.json").exists()}
    return [part for part in parts if not named or part.name in wanted]


@dataclass(slots=True)
class Started:
    part: Part
    process: subprocess.Popen
    log: TextIO
    began: float
    share: float


class Run:
    """Parts into results."""

    def __init__(self, folder: Path, results: Results, minutes: float, say: Callable[[str], None] = print) -> None:
        self.folder, self.results, self.say = folder, results, say
        self.deadline = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, part: Part) -> Started | None:
        share = min(part.seconds, self.deadline - time.monotonic())
        if share < min(LEAST, part.seconds):
            self.record(part, "not run: the time was used up", 0.0)
            return None
        (self.folder / f"{part.name}.json").unlink(missing_ok=True)
        log = (self.folder / f"{part.name}.log").open("w+", encoding="utf-8", errors="replace")
        told = max(1.0, share - GRACE) if share > GRACE else share
        command = [sys.executable, "-m", part.module, "--folder", str(self.folder), "--seconds", f"{told:.1f}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return Started(part, process, log, time.monotonic(), share)

    def finish(self, started: Started) -> None:
        """Waits for it until its share is used up, ends all that it started, and records it."""
        process, left = started.process, started.began + started.share - time.monotonic()
        try:
            code = process.wait(max(0.1, left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        started.log.seek(0)
        lines = [line for line in started.log.read().splitlines() if line.strip()]
        started.log.close()
        spent = time.monotonic() - started.began
        if code is None:
            self.record(started.part, f"stopped after its {started.share:.0f} s", spent)
        elif code:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.record(started.part, f"failed: {ended}: {(lines or ['without a word'])[-1][:300]}", spent)
            self.say("\n".join(lines[-5:]))
        else:
            self.record(started.part, "done", spent)

    def record(self, part: Part, state: str, seconds: float) -> None:
        left = read(self.folder / f"{part.name}.json") or {"rows": []}
        if "wrong" in left and state.startswith("failed"):
            state = f"failed: {left.pop('wrong')}"
        self.results.put(part.name, {"state": state, "seconds": round(seconds, 1), **left})
        self.say(f"{part.name}: {state}, {seconds:.0f} s, {len(left['rows'])} rows")

    def run(self, parts: list[Part], together: bool) -> bool:
        """Whether all are done. together: those that measure no times run beside each other, before the others."""
        beside = [part for part in parts if part.untimed and together]
        started = [self.start(part) for part in beside]
        for one in filter(None, started):
            self.finish(one)
        for part in parts:
            if part not in beside and (one := self.start(part)):
                self.finish(one)
        return all(self.results.data["parts"][part.name]["state"] == "done" for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help=f"some of {','.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "on_gpu", help="the parts' own files and logs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where <gpu>-<commit>.json goes")
    parser.add_argument("--commit", default="", help="of a copy that is no git repository")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes, also where a GPU is")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other are all that it would measure
    where = machine(options.commit)
    on_gpu = where["device"] != "cpu"
    out = options.out if on_gpu else options.folder  # what the CPU says of a card is nothing to keep
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(target(where, out), where)
    good = Run(options.folder, results, options.minutes).run(chosen(options.only, options.folder), together=on_gpu)
    print(f"\n{table(results.data)}\n\nwritten to {results.path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
