"""The gradient of a step while its micro-batches are still being made.

A learner that waits for all of them and one that begins with the first do the same sums in the same order: what was
added stays added, and only `done` says that it is all. Of several ranks each takes a share of the micro-batches, which
must be known before they are shared out, so that nothing is computed before `done` there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1fast.learn.lockstep import in_step
from r1fast.learn.room import merge_losses
from r1fast.model.sharding import is_sharded, synchronise
from r1fast.parallel import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from r1fast.learn.learner import Learner
    from r1fast.learn.losses import BatchStats
    from r1fast.types import PackedBatch

Loss = Callable[["nn.Module", "PackedBatch"], tuple["Tensor", "BatchStats | None"]]


@dataclass(frozen=True, slots=True)
class Accumulated:
    """The gradient of a step lies in the parameters; this is what came with it, one entry per micro-batch."""

    losses: list[Tensor]  # float32 scalars
    stats: list[BatchStats | None]
    tokens: int
    scale: float = 1.0  # what gradient and losses are still to be multiplied by: a denominator that was not known


class Accumulation:
    """See the module. Zeroes the gradient when made; the weights stay as they are."""

    def __init__(self, learner: Learner, loss: Loss) -> None:
        self._learner, self._loss = learner, loss
        self.batches: list[PackedBatch] = []
        self._found: list[tuple[Tensor, BatchStats | None]] = []
        learner.forget()

    def add(self, batches: Sequence[PackedBatch]) -> None:
        """The gradient of these too. Where memory runs out, all is begun anew in smaller micro-batches (room.py)."""
        self.batches += batches
        if world().size == 1:
            self._each(self.batches, self._found)

    def _each(self, batches: Sequence[PackedBatch], found: list) -> list[tuple[Tensor, BatchStats | None]]:
        def work(batch: PackedBatch) -> tuple[Tensor, BatchStats | None]:
            value, told = self._loss(self._learner.model, batch)
            value.backward()
            return value.detach(), told

        return self._learner.room.each(batches, work, merge_losses, self._learner.forget, found)

    def done(self, scale: float = 1.0) -> Accumulated:
        """There are no more. Of several ranks, gradients and what was told are now everybody's."""
        costs = [batch.tokens.shape[0] for batch in self.batches]
        if world().size > 1:
            self._together(costs)
        return Accumulated([value for value, _ in self._found], [told for _, told in self._found], sum(costs), scale)

    def _together(self, costs: list[int]) -> None:
        if is_sharded(self._learner.model):
            found = self._sharded()
        else:
            found = world().map(self.batches, lambda own: [_moved(one, "cpu") for one in self._each(own, [])], costs)
            world().add(self._learner.gradients())
        self._found = [_moved(one, self._learner.parameters[0].device) for one in found]

    def _sharded(self) -> list[tuple[Tensor, BatchStats | None]]:
        model = self._learner.model

        def work(batch: PackedBatch, real: bool, last: bool) -> tuple[Tensor, BatchStats | None]:
            synchronise(model, last)
            value, told = self._loss(model, batch)
            (value if real else value * 0.0).backward()
            return _moved((value.detach(), told), "cpu")

        return in_step(self.batches, work)


def _moved(found: tuple[Tensor, BatchStats | None], device: torch.device | str) -> tuple[Tensor, BatchStats | None]:
    """What a micro-batch told, on `device`."""
    value, told = found
    return value.to(device), told if told is None else type(told)(*(part.to(device) for part in told))
