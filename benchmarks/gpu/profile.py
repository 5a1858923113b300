"""Where a step's time goes: torch's profiler over one GRPO step, the dearest things, and what ran beside what.

A row of the timeline is a CUDA stream (without a GPU: a thread), its busy share in each of SLICES equal parts of the
step; `overlap` is the time in which at least two streams were busy. Completions are shorter than those of the part
`step`, for a profiler that keeps a million events takes minutes: sampling's share is smaller here than there.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.checkpoints import shape_of, wait_for
from benchmarks.gpu.measure import DEVICE, NO_TIME, SMALL, Report, arguments, in_short
from benchmarks.gpu.shapes import MODELS
from benchmarks.gpu.step import WORK
from benchmarks.whole_step import Shape, r1fast_steps
from r1fast.stages.profiling import named_ops, table

COMPLETION = 8 if SMALL else 128
SLICES = 40
BARS = " ▁▂▃▄▅▆▇█"
Span = tuple[float, float]  # begin and end, seconds


def union(spans: Iterable[Span]) -> list[Span]:
    """In order, those that touch made one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def shares(spans: list[Span], begin: float, end: float, slices: int = SLICES) -> list[float]:
    """The busy share of each part of [begin, end]. `spans`: of `union`."""
    width, found = (end - begin) / slices, [0.0] * slices
    for a, b in spans:
        for i in range(max(0, int((a - begin) / width)), min(slices, int((b - begin) / width) + 1)):
            found[i] += max(0.0, min(b, begin + (i + 1) * width) - max(a, begin + i * width))
    return [min(1.0, x / width) for x in found]


def overlap(streams: list[list[Span]]) -> float:
    """Seconds in which at least two of them were busy."""
    edges = sorted((at, change) for spans in streams for a, b in spans for at, change in ((a, 1), (b, -1)))
    busy, before, total = 0, 0.0, 0.0
    for at, change in edges:
        total += at - before if busy >= 2 else 0.0
        busy, before = busy + change, at
    return total


def timeline(events) -> tuple[list[dict], float]:
    """(a row for each stream, the busiest first; seconds of overlap). events: of torch's profiler."""
    spans, names = defaultdict(list), defaultdict(lambda: defaultdict(float))
    kind = torch.autograd.DeviceType.CUDA if DEVICE == "cuda" else torch.autograd.DeviceType.CPU
    for event in events:
        if event.device_type != kind:
            continue
        lane = event.device_resource_id if DEVICE == "cuda" else event.thread
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        spans[lane].append(span)
        names[lane][event.name] += span[1] - span[0]
    lanes = {lane: union(found) for lane, found in spans.items()}
    begin, end = min(s[0][0] for s in lanes.values()), max(s[-1][1] for s in lanes.values())
    rows = []
    for lane, found in lanes.items():
        busy = sum(b - a for a, b in found)
        bar = "".join(BARS[round(x * (len(BARS) - 1))] for x in shares(found, begin, end))
        dearest = max(names[lane], key=names[lane].get)
        rows.append({"busy": round(busy, 4), "line": bar, "dearest": dearest[:80]})
    rows.sort(key=lambda row: -row["busy"])
    return [{"what": f"lane {i}", **row} for i, row in enumerate(rows)], overlap(list(lanes.values()))


def profiled(shape: Shape, checkpoint: Path) -> tuple[profile, float]:
    """(the profile of the second step, its seconds)."""
    taken: list[float] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    recorder = profile(activities=activities, acc_events=True)

    def wait() -> bool:
        if len(taken) == 1:
            recorder.__enter__()
        return len(taken) < 2

    def told(seconds: float, *_) -> None:
        taken.append(seconds)
        if len(taken) == 2:
            recorder.__exit__(None, None, None)

    with named_ops():
        r1fast_steps(shape, checkpoint, {}, wait, told)
    return recorder, taken[-1]


def main() -> int:
    options = arguments("profile", __doc__).parse_args()
    report, deadline = Report("profile", options.folder), time.monotonic() + options.seconds
    for name in reversed(MODELS):
        left = deadline - time.monotonic()
        try:
            if left < 1:
                raise TimeoutError(NO_TIME)
            checkpoint = wait_for(options.folder, name, left)
        except TimeoutError as error:
            report.skip(name, in_short(error))
            continue
        shape = shape_of(MODELS[name], **{**WORK, "completion": COMPLETION}, kl=False)
        recorder, seconds = profiled(shape, checkpoint)
        report.add(what=f"{name}, {COMPLETION} tokens", seconds=round(seconds, 3),
                   table=table(recorder.key_averages(), seconds, 1))  # fmt: skip
        lanes, both = timeline(recorder.events())
        for row in lanes[:6]:
            report.add(**row | {"what": f"{name}, {row['what']}"})
        report.add(what=f"{name}, overlap", seconds=round(both, 4), share=round(both / seconds, 4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
