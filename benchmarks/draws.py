"""Our draw of a token beside torch's softmax, multinomial and gather: a part of benchmarks.kernels_vs_peers.

Both give a token and its log-probability for every row. Truncated, torch's is what transformers' `generate` does: top-k
by a threshold, top-p over the sorted row. The two take turns; a ratio is the median of the ratios of the turns, with
the lowest and highest.
"""

from __future__ import annotations

import time
from itertools import product
from statistics import median

import torch
from torch import Tensor

from r1fast_kernels import sample_token

ROWS = 64
WORDS = (8192, 32768, 151_936)
CUTS = ((0, 1.0), (50, 1.0), (0, 0.95), (50, 0.95))  # top_k, top_p


def theirs(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(tokens [B, 1], their log-probabilities [B, 1]) from logits [B, V]."""
    if top_k:
        logits = logits.masked_fill(logits < torch.topk(logits, top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = torch.sort(logits)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[:, -1:] = False
        logits = logits.masked_fill(gone.scatter(1, index, gone), -torch.inf)
    p = torch.softmax(logits, -1)
    token = torch.multinomial(p, 1)
    return token, p.gather(1, token).log()


@torch.inference_mode()
def measure(turns: int, words: tuple[int, ...] = WORDS, rows: int = ROWS) -> list[dict]:
    """One row for each vocabulary and truncation."""
    found, number = [], torch.arange(rows)
    for vocabulary, (top_k, top_p) in product(words, CUTS):
        logits = 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
        settings = (1.0, torch.full((rows,), top_k, dtype=torch.int32), torch.full((rows,), top_p))
        runs = (
            lambda logits=logits, settings=settings: sample_token(logits, number, number, number, *settings),
            lambda logits=logits, cut=(top_k, top_p): theirs(logits, *cut),
        )
        spent = ([], [])
        for turn in range(turns + 1):
            for run, times in zip(runs, spent, strict=True):
                start = time.perf_counter()
                run()
                if turn:
                    times.append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(*spent, strict=True)]
        row = {"rows": rows, "words": vocabulary, "top_k": top_k, "top_p": top_p}
        row |= {"ms": [round(1e3 * median(times), 3) for times in spent]}
        found.append(row | {"ratio": [round(f(ratios), 1) for f in (median, min, max)]})
    return found


def table(rows: list[dict]) -> str:
    """Markdown: a line for each vocabulary and truncation."""
    lines = ["| rows x words | top-k | top-p | r1fast, ms | torch, ms | times r1fast (lowest–highest) |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cut = f"{row['top_k'] or '–'} | {'–' if row['top_p'] == 1 else row['top_p']}"
        (mine, other), (middle, low, high) = row["ms"], row["ratio"]
        shape = f"{row['rows']} x {row['words']:,}"
        lines.append(f"| {shape} | {cut} | {mine:.2f} | {other:.2f} | {middle:.1f} ({low:.1f}–{high:.1f}) |")
    return "\n".join(lines)
