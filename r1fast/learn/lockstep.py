"""Micro-batches of a model whose weights are spread over the ranks: all ranks go through the layers together.

Each layer is gathered by all of them at once, so every rank must make as many passes as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from r1fast.parallel import world

if TYPE_CHECKING:
    from r1fast.types import PackedBatch

Result = TypeVar("Result")


def in_step(batches: Sequence[PackedBatch], work: Callable[[PackedBatch, bool, bool], Result]) -> list[Result]:
    """`work` of all batches, in their order, on every rank, each of which does a share.

    work: (batch, whether it counts, whether it is the last one). A rank that has no batch left takes the smallest once
    more, uncounted, while it would wait; what work returns of it is dropped. Results must be picklable, on the CPU."""
    if not batches:
        return []
    costs = [batch.tokens.shape[0] for batch in batches]
    shares = world().share(costs)
    mine, rounds, done = shares[world().rank], max(map(len, shares)), []
    for i in range(rounds):
        counts = i < len(mine)
        found = work(batches[mine[i] if counts else costs.index(min(costs))], counts, i == rounds - 1)
        if counts:
            done.append((mine[i], found))
    everyones = dict(one for part in world().gather(done) for one in part)
    return [everyones[i] for i in range(len(batches))]
