"""`python -m benchmarks.step_profile`: where each millisecond of a step's learning goes, by op.

A step of the stage that `benchmarks.vs_trl` measures, under torch's profiler: every event's own time is charged to the
op it ran in (forward or backward), or, outside of any, to what it was; what is left of a phase is Python's. Beside the
time stand the operations and the bytes that the op must do and move at least, as shares of what torch's float32 product
of 2048 and a copy larger than the caches reach on this machine, measured just before.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from benchmarks.vs_trl import cases, peak_rate
from benchmarks.whole_step import Shape, make_checkpoint, r1fast_steps
from r1fast.metrics import PhaseTimer
from r1fast.stages.profiling import named_ops
from r1fast_kernels.op import Op

CASES = ("3M, 8 x 8, KL on", "30M, 8 x 8, KL on")
PHASES = ("learn", "logprob")
SHOWN = 0.003  # share of its phase below which a row goes to the rest
# What a call with gradients does in forward and in backward, over what its forward does without: operations of the ops
# that are bound by them (a head with a loss has its gradients in forward), bytes that must move of the others.
ATTENTION = (1, 2.5)
FLOPS = {"linear": (1, 2), "prefix_attention": ATTENTION, "varlen_attention": ATTENTION}
FLOPS |= {"linear_logprob": (1, 2), "linear_grpo_loss": (3, 0)}
BYTES = {"rms_norm": (1, 1), "qkv_rope": (1, 1.8), "swiglu": (1, 5 / 3)}
COUNTING, PHASE, BACKWARD = "count what an op must do", "phase ", " backward"
OP = re.compile(r"(\w+) \[\w+\]( backward)?")  # the names that named_ops gives


@contextmanager
def named_phases() -> Iterator[list[str]]:
    """Within the block the phases of a PhaseTimer are events of the profiler; gives the open ones, outermost first."""
    called, left, events, under_way = PhaseTimer.__call__, PhaseTimer.__exit__, [], []

    def call(self: PhaseTimer, phase: str) -> PhaseTimer:
        under_way.append(phase)
        events.append(record_function(PHASE + phase))
        events[-1].__enter__()
        return called(self, phase)

    def leave(self: PhaseTimer, *raised: object) -> None:
        left(self, *raised)
        events.pop().__exit__(None, None, None)
        under_way.pop()

    with mock.patch.object(PhaseTimer, "__call__", call), mock.patch.object(PhaseTimer, "__exit__", leave):
        yield under_way


@contextmanager
def counted_ops(phases: list[str]) -> Iterator[dict[tuple[str, bool, str], list[float]]]:
    """Within the block: (phase, with a gradient, op) -> what its forward calls had to do, [operations, bytes].

    phases: `named_phases`'. Learning has calls without a gradient, too: what the backward pass makes once more."""
    plain, done = Op.__call__, defaultdict(lambda: [0.0, 0.0])

    def call(self: Op, *args: object, backend: str | None = None) -> object:
        with record_function(COUNTING):
            entry = done[phases[-1] if phases else "", self._needs_gradient(args), self.name]
            entry[0] += self.flops(*args)
            entry[1] += self.bytes(*args)
        return plain(self, *args, backend=backend)

    with mock.patch.object(Op, "__call__", call):
        yield done


def op_of(event_name: str) -> str | None:
    """The row of an op's own event."""
    found = OP.fullmatch(event_name)
    return f"{found[1]}{found[2] or ''}" if found else None


def charged_to(event) -> tuple[str | None, str]:
    """(phase, row) of an event's own time; no phase where it is not to be counted."""
    row, within = event.name if event.name.startswith("aten::") else "Python and autograd", None
    while event is not None and event.name != COUNTING:
        if event.name.startswith(PHASE):
            return event.name.removeprefix(PHASE), within or row
        within = within or op_of(event.name)
        event = event.cpu_parent
    return None, row


def rows_of(events, work: dict, steps: int) -> dict[str, list[dict]]:
    """By phase: what took how many milliseconds a step, and what it had to do in that time."""
    spent = defaultdict(lambda: [0.0, 0])
    for event in events:
        phase, row = charged_to(event)
        spent[phase, row][0] += event.self_cpu_time_total / 1e3 / steps
        spent[phase, row][1] += (op_of(event.name) or event.name) == row
    found = {}
    for phase in PHASES:
        rows = [{"what": what, "ms": ms, "calls": n / steps} for (at, what), (ms, n) in spent.items() if at == phase]
        for row in rows:
            op = row["what"].removesuffix(BACKWARD)
            for at, (key, factors) in enumerate((("flops", FLOPS), ("bytes", BYTES))):
                forward, backward = factors.get(op, (0, 0))
                trained, untrained = (work[phase, needed, op][at] / steps for needed in (True, False))
                if row["what"] == op:
                    row[key] = trained * forward + untrained * min(1, forward)
                else:
                    row[key] = trained * backward
        found[phase] = sorted(rows, key=lambda row: -row["ms"])
    return found


def measure(shape: Shape, steps: int = 2) -> dict[str, list[dict]]:
    """`rows_of` the third step and those after it."""
    taken, stack, found = 0, ExitStack(), {}

    def wait() -> bool:
        nonlocal taken
        taken += 1
        if taken == 3:
            found["work"] = stack.enter_context(counted_ops(stack.enter_context(named_phases())))
            stack.enter_context(named_ops())
            found["profile"] = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        if taken == 3 + steps:
            stack.close()
        return taken < 3 + steps

    with tempfile.TemporaryDirectory() as folder, stack:
        make_checkpoint(shape, Path(folder) / "checkpoint")
        r1fast_steps(shape, Path(folder) / "checkpoint", {}, wait, lambda *_: None)
    return rows_of(found["profile"].events(), found["work"], steps)


def copy_rate(size: int = 1 << 26) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes, the best of several."""
    source = torch.ones(size // 4)
    target, best = torch.zeros_like(source), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def _lines(case: dict) -> Iterator[str]:
    for phase in PHASES:
        rows = case["phases"][phase]
        whole = sum(row["ms"] for row in rows)
        shown = [row for row in rows if row["ms"] >= SHOWN * whole]
        rest = {"what": f"{len(rows) - len(shown)} others", "calls": 0, "flops": 0, "bytes": 0}
        rest["ms"] = whole - sum(row["ms"] for row in shown)
        yield f"| **{phase}** | | **{whole:,.0f}** | | | |"
        for row in [*shown, *([rest] if len(rows) > len(shown) else [])]:
            seconds = max(row["ms"], 1e-9) / 1e3
            flops, moved = row["flops"] / seconds, row["bytes"] / seconds
            cells = [row["what"].replace(BACKWARD, ", backward"), f"{row['calls']:.0f}" if row["calls"] else ""]
            cells += [f"{row['ms']:,.1f}", f"{row['ms'] / whole:.1%}"]
            cells.append(f"{flops / 1e9:.0f} ({flops / case['peak_flops']:.0%})" if flops else "")
            cells.append(f"{moved / 1e9:.1f} ({moved / case['copy_bytes']:.0%})" if moved else "")
            yield "| " + " | ".join(cells) + " |"


def table(results: dict) -> str:
    """Markdown: a table for each case."""
    head = ["| what | calls | ms a step | of the phase | GFLOP/s (of a product's) | GB/s (of a copy's) |"]
    head += ["|---|---:|---:|---:|---:|---:|"]
    text = f"{results['machine']}, {results['threads']} threads, torch {results['torch']}, at {results['commit']}, "
    text += "under torch's profiler, whose own cost is in `Python and autograd`."
    parts = []
    for name, case in results["cases"].items():
        told = f"{name}: a product of 2048 reaches {case['peak_flops'] / 1e9:.0f} GFLOP/s, a copy "
        told += f"{case['copy_bytes'] / 1e9:.1f} GB/s, reading and writing."
        parts.append("\n".join([told, "", *head, *_lines(case)]))
    return "\n\n".join([*parts, text])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.split("\n\n")[0])
    known = cases()
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(known), metavar="CASE")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    results = {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    results["cases"] = {}
    for name in options.case:
        rates = {"peak_flops": peak_rate(), "copy_bytes": copy_rate()}
        results["cases"][name] = rates | {"phases": measure(known[name], options.steps)}
    path = RESULTS / f"{slug(processor())}-step_profile.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{table(results)}\n\nwritten to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
