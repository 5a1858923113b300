"""When memory runs out in the middle of a run: the micro-batch is halved and the run goes on, and says so.

Half of a backward pass may lie in the gradient when memory runs out, so that a step's gradient is begun anew then; the
plan puts the longest micro-batch first, so that little is lost. The result is that of smaller micro-batches from the
start: the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from r1fast.config import UserError
from r1fast.model.tensor_parallel import tensor_of

if TYPE_CHECKING:
    from torch import nn

    from r1fast.types import PackedBatch

Result = TypeVar("Result")
_PER_ROW = ("targets", "sequence", "loss_weight", "advantage", "old_logprob", "ref_logprob")


def ran_out(error: BaseException) -> bool:
    """Whether this is a device, torch's CPU allocator or native code without memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Room:
    """What fits here, as far as it is known: `limit` is the most tokens of a micro-batch, None until memory ran out."""

    def __init__(self, model: nn.Module, warn: Callable[[str], None] = lambda text: None) -> None:
        self.model, self.warn = model, warn
        self.limit: int | None = None

    def each(
        self,
        batches: Sequence[PackedBatch],
        work: Callable[[PackedBatch], Result],
        merge: Callable[[list[Result]], Result],
        undo: Callable[[], None] | None = None,
        found: list[Result] | None = None,
    ) -> list[Result]:
        """`work` of each batch, or of its pieces, put together by `merge`.

        found: what an earlier call gave of the first of `batches`; this one goes on from there, in place.
        undo: called before all is begun anew where `work` leaves something behind (a gradient); without it only the
        batch that did not fit is done again. UserError where a single sequence does not fit in any way.
        """
        found = [] if found is None else found
        while len(found) < len(batches):
            piece = None
            try:
                parts = []
                for piece in pieces(batches[len(found)], self.limit):
                    parts.append(work(piece))
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or tensor_of(self.model) is not None:  # its peers are in the middle of a layer
                    raise
            else:
                found.append(merge(parts) if len(parts) > 1 else parts[0])
                continue
            # outside of the handler: the error holds the frames, and they hold the tensors
            self._shrink(piece, undo is not None)
            if undo is not None:
                undo()
                found.clear()
        return found

    def _shrink(self, batch: PackedBatch, graded: bool) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = batch.tokens.shape[0]
        if _completions(batch) > 1:
            self.limit = min(self.limit or tokens, tokens) // 2
            self.warn(f"out of memory with {tokens:,} tokens at once: micro-batches of {self.limit:,} from here on")
        elif graded and not getattr(self.model, "recompute", True):
            self.model.recompute = True
            self.warn(f"out of memory with one sequence of {tokens:,} tokens: activations are recomputed from here on")
        else:
            raise UserError(
                f"out of memory with a single micro-batch of {tokens:,} tokens that cannot be halved: lower "
                f"model.max_length and sampling.max_tokens, or train adapters"
            )


def pieces(batch: PackedBatch, limit: int | None) -> Iterator[PackedBatch]:
    """The batch in parts of at most `limit` tokens, as far as its completions can be told apart."""
    if limit is None or batch.tokens.shape[0] <= limit or _completions(batch) == 1:
        yield batch
        return
    for half in halve(batch):
        yield from pieces(half, limit)


def _completions(batch: PackedBatch) -> int:
    """1 also for the pairs of a reward model, which are not told apart."""
    sequence = getattr(batch, "sequence", None)
    return 1 if sequence is None else int(sequence[-1]) + 1


def halve(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """The first half of the completions and the second; a prompt that both need is in both."""
    sequence = batch.sequence.cpu().numpy()
    middle = (int(sequence[-1]) + 1) // 2
    cut = int(np.searchsorted(sequence, middle))
    return _part(batch, slice(0, cut)), _part(batch, slice(cut, None))


def _part(batch: PackedBatch, rows: slice) -> PackedBatch:
    """A batch of these rows (whole completions), with the sequences that they need."""
    ends, leading = batch.cu_seqlens.cpu().numpy(), batch.rows[rows].cpu().numpy()
    used = np.zeros(len(ends) - 1, dtype=bool)
    used[np.searchsorted(ends, leading, side="right") - 1] = True
    places = np.arange(ends[-1])[np.repeat(used, np.diff(ends))]
    moved = np.zeros(ends[-1], dtype=np.int64)
    moved[places] = np.arange(len(places))
    lengths = np.diff(ends)[used]

    def put(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(array).to(like.device, like.dtype)

    kept = put(places, batch.rows)
    groups = batch.cu_groups
    if groups is not None:
        counts = np.add.reduceat(used.astype(np.int64), groups[:-1].cpu().numpy())
        groups = put(np.cumsum([0, *counts[counts > 0]]), groups)
    streams = {name: None if getattr(batch, name) is None else getattr(batch, name)[rows] for name in _PER_ROW}
    streams["sequence"] = streams["sequence"] - streams["sequence"][0]
    return replace(
        batch,
        tokens=batch.tokens[kept],
        positions=batch.positions[kept],
        cu_seqlens=put(np.cumsum([0, *lengths]), batch.cu_seqlens),
        rows=put(moved[leading], batch.rows),
        max_seqlen=int(lengths.max()),
        cu_groups=groups,
        **streams,
    )


def merge_losses(parts: list[tuple]) -> tuple:
    """(loss, BatchStats | None) of pieces -> of the whole: sums add, the largest ratio is the largest, log-probs follow
    each other."""
    values, told = zip(*parts, strict=True)
    loss = torch.stack(values).sum()
    if told[0] is None:
        return loss, None
    columns = zip(told[0]._fields, zip(*told, strict=True), strict=True)
    put = {"ratio_max": lambda column: torch.stack(column).amax(), "logp": torch.cat}
    merged = (put.get(name, lambda column: torch.stack(column).sum())(column) for name, column in columns)
    return loss, type(told[0])(*merged)
