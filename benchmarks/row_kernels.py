"""`python -m benchmarks.row_kernels`: the ops that are bound by memory, as shares of a copy's bandwidth.

Arrays are larger than the caches, results included; what is counted are the bytes that must move at least (each input
read once, each output written once). Every turn times each op and a copy, so that a change of the machine's mood meets
both; a share is the median over the turns, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from r1fast.heap import keep_freed_memory
from r1fast_kernels import group_advantage, grpo_loss, rms_norm, rope, swiglu

ROWS, WIDTH, HEAD = 4096, 1536, 64
Job = tuple[Callable[[], object], int]  # what is timed, bytes it must move


def forward(run: Callable) -> Callable[[], object]:
    def timed():
        with torch.no_grad():
            return run()

    return timed


def backward(run: Callable, leaves: list[Tensor]) -> Callable[[], object]:
    """The gradients alone: what the forward saved is kept from one call to the next."""
    result = run()
    results = [result] if isinstance(result, Tensor) else list(result)
    grads = [torch.randn_like(one) for one in results]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def jobs(rows: int = ROWS, width: int = WIDTH) -> dict[str, Job]:
    """By name, the copy first."""

    def array(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    one = 4 * rows * width  # bytes of [rows, width]
    x, residual, weight, gate_up = array(rows, width), array(rows, width), array(width), array(rows, 2 * width)
    source, target = torch.randn(rows, width), torch.zeros(rows, width)
    heads = width // HEAD // 3
    q, k = array(rows, 2 * heads, HEAD), array(rows, width // HEAD - 2 * heads, HEAD)
    angles, positions = torch.randn(2, 1024, HEAD // 2), torch.arange(rows) % 1024
    count = rows * width // 2
    rewards, (logp, *streams) = torch.randn(2 * count), 0.1 * torch.randn(5, count)
    logp.requires_grad_()

    def norm():
        return rms_norm(x, weight, 1e-6)

    def summed_norm():
        return rms_norm(x, weight, 1e-6, residual=residual)

    def turn():
        return rope(q, k, *angles, positions)

    def gate():
        return swiglu(gate_up)

    return {
        "copy": (lambda: target.copy_(source), 2 * one),
        "rms_norm": (forward(norm), 2 * one),
        "rms_norm, backward": (backward(norm, [x, weight]), 3 * one),
        "rms_norm + residual": (forward(summed_norm), 4 * one),
        "rms_norm + residual, backward": (backward(summed_norm, [x, residual, weight]), 4 * one),
        "rope": (forward(turn), 2 * one),
        "rope, backward": (backward(turn, [q, k]), 2 * one),
        "swiglu": (forward(gate), 3 * one),
        "swiglu, backward": (backward(gate, [gate_up]), 5 * one),
        "group_advantage, groups of 16": (forward(lambda: group_advantage(rewards, group_size=16)), 16 * count),
        "grpo_loss with its slopes": (forward(lambda: grpo_loss(logp, *streams, kl_coef=0.04)), 28 * count),
    }


def measure(turns: int, todo: dict[str, Job]) -> list[dict]:
    """One row a job: GB/s, and the share of the copy of the same turn."""
    rates = {name: [] for name in todo}
    for turn in range(turns + 2):
        for name, (run, size) in todo.items():
            start = time.perf_counter()
            run()
            if turn > 1:
                rates[name].append(size / (time.perf_counter() - start) / 1e9)
    found = []
    for name, rate in rates.items():
        shares = [a / b for a, b in zip(rate, rates["copy"], strict=True)]
        found.append({"op": name, "GB/s": round(median(rate), 1)})
        found[-1]["share"] = [round(f(shares), 2) for f in (median, min, max)]
    return found


def table(results: dict) -> str:
    """Markdown: a line a job."""
    lines = ["| op | GB/s | of a copy (lowest–highest) |", "|---|---:|---:|"]
    for row in results["rows"]:
        middle, low, high = row["share"]
        share = "1" if row["op"] == "copy" else f"{middle:.2f} ({low:.2f}–{high:.2f})"
        lines.append(f"| {row['op']} | {row['GB/s']} | {share} |")
    text = f"float32 arrays of {results['MiB']} MiB; {results['machine']}, {results['threads']} threads, "
    text += f"torch {results['torch']}, at {results['commit']}; {results['turns']} turns."
    return "\n".join([*lines, "", text])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=21)
    options = parser.parse_args()
    keep_freed_memory()  # as a run does: else each result would be taken from the system page by page
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    results = {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    results |= {"MiB": 4 * ROWS * WIDTH >> 20, "turns": options.turns, "rows": measure(options.turns, jobs())}
    path = RESULTS / f"{slug(processor())}-row_kernels.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{table(results)}\n\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
