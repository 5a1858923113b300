"""Places things on a line as near as possible to where they want to be without overlapping.

Line labels of a chart and boxes of the recipe's picture are the same problem: minimise sum w_i (x_i - d_i)^2 with
x_{i+1} - x_i >= gap_i. Subtracting the gaps makes it isotonic regression, which pool-adjacent-violators solves exactly
(Ayer et al. 1955).
"""

from __future__ import annotations

from collections.abc import Sequence


def spread(desired: Sequence[float], gaps: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Positions in the given order. `gaps[i]` is the least distance of i and i + 1: one fewer than `desired`."""
    weights = weights or [1.0] * len(desired)
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    blocks: list[list[float]] = []  # [weighted mean, weight, members]
    for want, offset, weight in zip(desired, offsets, weights, strict=True):
        blocks.append([want - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, mass, count = blocks.pop()
            first = blocks[-1]
            first[0] = (first[0] * first[1] + mean * mass) / (first[1] + mass)
            first[1] += mass
            first[2] += count
    means = [mean for mean, _, count in blocks for _ in range(int(count))]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def within(positions: Sequence[float], low: float, high: float) -> list[float]:
    """The positions moved together so that they lie in [low, high] where they fit there."""
    if not positions:
        return []
    shift = max(0.0, low - positions[0])
    shift -= max(0.0, positions[-1] + shift - high)
    return [position + shift for position in positions]
