"""What a snapshot costs the step: written at once, and beside the steps that follow, from a copy.

    python -m benchmarks.snapshots     # prints the table of docs/reliability.md, writes benchmarks/results/

A state of each size is saved to this machine's disk. `waits`: until the step goes on; `on disk`: until it has its
name; `slower`: how much longer a product takes, on one thread, while it is being written beside it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from r1fast.schema import CheckpointConfig
from r1fast.stages.saving import Saver

SIZES, TRIES = (4, 16, 64, 256, 1024), 5  # MiB of state


def product() -> Callable[[], float]:
    """A product like a small model's; each call takes one and gives its seconds."""
    x, w, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)

    def once() -> float:
        began = time.perf_counter()
        torch.mm(x, w, out=out)
        return time.perf_counter() - began

    return once


def measure(mib: int, folder: Path) -> dict[str, Any]:
    state = {"w": [torch.randn(mib * 64, 1024) for _ in range(4)]}
    once, told = product(), {"mib": mib}
    for mode in ("never", "always"):
        saver, waits, whole, beside = Saver(folder, CheckpointConfig(background=mode, keep=1)), [], [], []
        for step in range(TRIES + 1):  # the first warms up
            began = time.perf_counter()
            saver.save(step, state, {}, (), last=False)
            waits.append(time.perf_counter() - began)
            while saver._thread is not None and saver._thread.is_alive():
                beside.append(once())
            saver.wait()
            whole.append(time.perf_counter() - began)
        told[mode] = {"waits": median(waits[1:]), "on_disk": median(whole[1:])}
    alone = median(once() for _ in range(200))
    return {**told, "slower": median(beside) / alone if beside else None}


def table(results: dict[str, Any]) -> str:
    head = "| state | at once: waits (s) | beside: waits (s) | beside: on disk (s) | a product beside it |\n"
    rows = [head + "| ---: | ---: | ---: | ---: | ---: |"]
    for case in results["cases"]:
        never, always = case["never"], case["always"]
        slower = "" if case["slower"] is None else f"{case['slower']:.2f}x"
        times = (never["waits"], always["waits"], always["on_disk"])
        rows.append(f"| {case['mib']:,} MiB | {' | '.join(f'{t:.3f}' for t in times)} | {slower} |")
    about = f"{results['machine']}, one thread, torch {results['torch']}"
    return "\n".join(rows) + f"\n\nMeasured with `python -m benchmarks.snapshots` at {results['commit']}: {about}."


def main() -> None:
    torch.set_num_threads(1)
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    about = {"machine": processor(), "torch": torch.__version__, "commit": commit}
    with tempfile.TemporaryDirectory() as folder:
        cases = [measure(mib, Path(folder)) for mib in SIZES]
    path = RESULTS / f"{slug(about['machine'])}-snapshots.json"
    path.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    print(table({**about, "cases": cases}))


if __name__ == "__main__":
    main()
