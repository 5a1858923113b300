"""How a part measures and what it leaves behind: medians by device events, peak memory, and a file that grows."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from r1fast.metrics import write_atomically

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"  # shapes for a machine that only shows that the code runs
FLUSH = 256 << 20  # bytes written between two runs: several times a card's second-level cache
MIB = 1 << 20
NO_TIME = "the time of this part is used up"


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], spend: float = 0.3, least: int = 3, most: int = 50) -> float:
    """Median seconds of `run`, from a cold second-level cache, after one run to compile and one to warm up.

    Between `least` and `most` runs, as many as `spend` seconds hold.
    """
    run()
    settle()
    start = time.perf_counter()
    run()
    settle()
    once = time.perf_counter() - start
    times = max(least, min(most, int(spend / max(once, 1e-6))))
    return median(_on_device(run, times) if DEVICE == "cuda" else _on_host(run, times))


def _on_device(run: Callable[[], Any], times: int) -> list[float]:
    flushed = torch.empty(FLUSH // 4, dtype=torch.int32, device=DEVICE)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for begin, end in marks:
        flushed.zero_()
        begin.record()
        run()
        end.record()
    settle()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def _on_host(run: Callable[[], Any], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def peak_mib(run: Callable[[], Any]) -> float | None:
    """MiB that one run allocates at most, above what was allocated before it; None where nothing counts them."""
    if DEVICE != "cuda":
        run()
        return None
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    settle()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


class Report:
    """A part's file: `rows`, in the order in which they were measured, and whatever else it says of itself."""

    def __init__(self, part: str, folder: Path) -> None:
        self.path = folder / f"{part}.json"
        self.data: dict[str, Any] = {"rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> dict:
        self.data["rows"].append(row)
        self.write()
        print(json.dumps(row, ensure_ascii=False), flush=True)
        return row

    def say(self, **facts: Any) -> None:
        self.data |= facts
        self.write()

    def skip(self, what: str, reason: str) -> None:
        self.add(what=what, skipped=reason)

    def write(self) -> None:
        write_atomically(self.path, json.dumps(self.data, ensure_ascii=False, indent=1) + "\n")


def ask(module: str, *what: str, environment: dict[str, str] | None = None, seconds: float | None = None) -> Any:
    """What `module --ask what` says in a process of its own: the last line it prints, as JSON.

    A process of its own, because an environment is read once or because two must not see each other. RuntimeError with
    its last words where it fails or takes longer than `seconds`.
    """
    command = [sys.executable, "-m", module, "--ask", *what]
    if seconds is not None and seconds < 1:
        raise RuntimeError(NO_TIME)
    try:
        child = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(NO_TIME) from None
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"exit code {child.returncode}, without a word"]
        raise RuntimeError(said[-1])
    return json.loads(child.stdout.strip().splitlines()[-1])


def in_short(error: BaseException) -> str:
    """What a row says of a peer that cannot run: the first line, and the last one of what a child process said."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = " ... ".join(line.strip()[:200] for line in dict.fromkeys((*lines[:1], *lines[-1:])))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def arguments(part: str, described: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{part}", description=described.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the parts leave their files")
    parser.add_argument("--seconds", type=float, default=1e5, help="do not begin what will not end within so many")
    return parser


def ceilings(folder: Path) -> dict[str, float]:
    """What the part `ceilings` measured: bytes/s of a copy, and FLOP/s of a `product` in the dtype that is measured.

    RuntimeError: it has not run.
    """
    path = folder / "ceilings.json"
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: run python -m benchmarks.gpu.ceilings --folder {folder} first")
    rates = {row["what"]: row["per second"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    return {"copy": rates["copy"], "product": rates["float32" if SMALL else "bfloat16"]}
