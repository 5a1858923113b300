"""`profile=true`: where the time of a stage's steps goes, by torch's profiler.

The first step is left out (it loads, allocates, compiles); the next STEPS are recorded. Beside the checkpoint,
stages/<name>/profile/ then holds trace.json, for chrome://tracing or Perfetto, and table.md, the ten most expensive
things. The ops of r1fast_kernels go by their own names: to torch their native code is nobody's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from r1fast.parallel import world
from r1fast_kernels import load_ops

if TYPE_CHECKING:
    from r1fast.stages.context import StageContext

STEPS = 2
SHOWN = 10


@contextmanager
def named_ops() -> Iterator[None]:
    """Within the block every backend of every op records its calls under `op [backend]`, backward apart."""
    ops = load_ops().values()
    before = {op.name: dict(op.backends) for op in ops}

    def recorded(call: Callable | None, name: str) -> Callable | None:
        def run(*args):
            with record_function(name):
                return call(*args)

        return None if call is None else run

    for op in ops:
        for name, found in before[op.name].items():
            label = f"{op.name} [{name}]"
            calls = {"forward": label, "inference": label, "backward": f"{op.name} [{name}] backward"}
            named = {field: recorded(getattr(found, field), text) for field, text in calls.items()}
            op.backends[name] = replace(found, **named)
    try:
        yield
    finally:
        for op in ops:
            op.backends.update(before[op.name])


class StepProfile:
    """To be told after each step; records those it is to, then writes what it found and is silent."""

    def __init__(self, ctx: StageContext, total: int) -> None:
        self._ctx = ctx
        wanted = ctx.recipe.profile and world().first
        self._skip, self._left = min(1, total - 1), min(STEPS, total) if wanted else 0
        self._open: ExitStack | None = None

    def __enter__(self) -> StepProfile:
        if self._left and not self._skip:
            self._start()
        return self

    def __exit__(self, *_) -> None:
        if self._open is not None:
            self._finish()

    def step(self) -> None:
        """A step is done."""
        if not self._left:
            return
        if self._open is None:
            self._skip -= 1
            if self._skip <= 0:
                self._start()
            return
        self._recorded += 1
        self._left -= 1
        if not self._left:
            self._finish()

    def _start(self) -> None:
        self._open, self._recorded = ExitStack(), 0
        self._open.enter_context(named_ops())
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = self._open.enter_context(profile(activities=activities))
        self._began = time.perf_counter()

    def _finish(self) -> None:
        seconds = time.perf_counter() - self._began
        self._open.close()
        self._open, self._left = None, 0
        folder = self._ctx.directory / "profile"
        folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(folder / "trace.json"))
        text = table(self._profile.key_averages(), seconds, max(1, self._recorded))
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
        self._ctx.progress.tell(f"profile of {self._recorded} steps in {folder}")
        for line in text.splitlines():
            self._ctx.progress.tell(line)


def table(events, seconds: float, steps: int) -> str:
    """The most expensive things as Markdown: milliseconds a step in the thing itself, on the GPU where there is one."""
    on_gpu = any(event.self_device_time_total > 0 for event in events)

    def own(event) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    lines = ["| what | ms a step | of the step | calls a step |", "|---|---:|---:|---:|"]
    for event in sorted(events, key=own, reverse=True)[:SHOWN]:
        share = own(event) / 1e6 / seconds
        lines.append(f"| {event.key} | {own(event) / 1e3 / steps:.1f} | {share:.0%} | {event.count / steps:g} |")
    where = "on the GPU" if on_gpu else "on the main thread"
    lines.append(f"| all {len(events)} things {where} | {sum(map(own, events)) / 1e3 / steps:.1f} | "
                 f"{sum(map(own, events)) / 1e6 / seconds:.0%} | |")  # fmt: skip
    lines.append(f"| a step | {1e3 * seconds / steps:.1f} | 100% | |")
    return "\n".join(lines)
