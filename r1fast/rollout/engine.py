"""The part of the sampler that turns a batch into drawn tokens: one object, replaceable.

Who decodes when, in which blocks, and what becomes of a token is decided above it (sampler.py, scheduler.py). An engine
is asked for two things only, and may compute them as it likes: under CUDA graphs, several tokens a row before the host
looks, with drafts that it verifies. What it must keep: the draws. The token at position p of a sequence is drawn with
the noise of (the row's seed, its key, p) from the logits of position p - 1, so that engines, batches and step sizes all
give the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV, PagedStep
from r1fast.rollout.batch import Drawn, RunningBatch
from r1fast_kernels import sample_token
from r1fast_kernels.sample_token import SampledToken


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Stretches of prompts to be forwarded together, and the rows that begin to run behind them.

    The sequences that launch are in the batch already, from row `first` on and in order: `counts[i]` of them go on from
    row `last_rows[i]` of the step's hidden states. `copies` are made after the step has written its keys and values.
    """

    step: PagedStep
    first: int  # row of the batch
    last_rows: list[int]  # none when no prompt is completed by this step
    counts: list[int]  # samples behind each of `last_rows`
    copies: list[tuple[int, int]]  # (source, destination) blocks


class Engine(Protocol):
    """One sampler's way of computing steps. All of its calls come from one thread, one at a time."""

    ahead: int
    """Most tokens that the next `decode` wants to draw for a row; read before each decode. The sampler makes room for
    their keys and values, or asks for fewer where blocks are short."""

    def begin(self, kv: PagedKV, batch: RunningBatch) -> None:
        """Work on this cache and this batch from now on; both may be those of before. `batch.changes` counts every
        change of its rows and tables made from outside, for engines that keep a copy of them on a device."""

    def prefill(self, work: PrefillWork) -> Drawn | None:
        """Forward `work.step`, copy blocks, draw the first token of the rows from `work.first` on; None without any."""

    def decode(self, ahead: int) -> Drawn:
        """One to `ahead` tokens of every row of the batch. A row ends at its first stop token and at its limit.

        Keys and values of all but the last token of each row are in the cache afterwards, and `batch.advance` has been
        told. The batch's `token`, `drawn` and store are as before: `batch.record` of the result is the sampler's.
        """

    def release(self) -> None:
        """Give up what the engine holds on the device besides the model: its graphs and buffers, the cache."""


class StepEngine:
    """One forward pass a step on any device, one token a row."""

    ahead = 1

    def __init__(self, model: Decoder):
        self.model = model

    def begin(self, kv: PagedKV, batch: RunningBatch) -> None:
        self._kv, self._batch = kv, batch

    def release(self) -> None:
        self._kv = self._batch = None

    @torch.inference_mode()
    def prefill(self, work: PrefillWork) -> Drawn | None:
        hidden = self.hidden(work.step)
        if not work.last_rows:
            return None
        if work.copies:
            self._kv.copy_blocks(*torch.tensor(work.copies, device=hidden.device).unbind(1))
        last, counts = torch.tensor([work.last_rows, work.counts], device=hidden.device)
        logits = self.logits(hidden[last])
        rows = self._batch.size - work.first
        return self._draw(logits.repeat_interleave(counts, 0, output_size=rows), work.first)

    @torch.inference_mode()
    def decode(self, ahead: int) -> Drawn:
        hidden = self.hidden(self._batch.step())
        self._batch.advance()
        return self._draw(self.logits(hidden), 0)

    @torch.inference_mode()
    def draw_at(self, row: NDArray[np.int64], offset: NDArray[np.int64], tokens: NDArray[np.int64]) -> Drawn:
        """What follows tokens that are tried out: of row `row[i]` of the batch `tokens[i]`, `offset[i]` places past its
        length. Each [T]; a row's offsets rise from 0, and there is room for them. One token for each; none is recorded.
        """
        batch, size = self._batch, self._batch.block_size
        position = batch.view["length"][row] + offset
        table = batch.table.numpy()[row]
        slot = table[np.arange(len(row)), position // size].astype(np.int64) * size + position % size
        arrays = (tokens, position, slot, table, (position + 1).astype(np.int32))
        step = PagedStep(*batch.on_device(map(torch.from_numpy, arrays)))
        noise = [batch.view[name][row] for name in ("seed", "key", "temperature", "top_k", "top_p")]
        noise.insert(2, position + 1)
        return as_drawn(sample_token(self.logits(self.hidden(step)), *batch.on_device(map(torch.from_numpy, noise))))

    def hidden(self, step: PagedStep) -> Tensor:
        """[T, H] of a step's tokens, whose keys and values are then in the cache."""
        return self.model.forward_paged(step, self._kv)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> float32 [..., V]."""
        return self.model.logits(hidden)

    def _draw(self, logits: Tensor, first: int) -> Drawn:
        correction = forbid_stops(logits, self._batch, first)
        drawn = sample_token(logits, *self._batch.noise(first))
        return as_drawn(drawn if correction is None else drawn._replace(logprob_full=drawn.logprob_full + correction))


def as_drawn(drawn: SampledToken) -> Drawn:
    """One token a row, on the host."""
    token, logprob, full = (x.cpu().numpy()[:, None] for x in drawn)
    return Drawn(token, logprob, full, np.ones(len(token), np.int64))


def forbid_stops(logits: Tensor, batch: RunningBatch, first: int) -> Tensor | None:
    """Take the stop tokens from the batch's rows from `first` on that have not drawn their min_tokens yet; see
    `take_stops`. None where nothing is taken."""
    waits = batch.waiting(first)
    if waits is None:
        return None
    arrays = (waits, torch.from_numpy(batch.stop_ids[first:]), batch.tensor["temperature"][first:])
    return take_stops(logits, *batch.on_device(arrays))


def take_stops(logits: Tensor, waits: Tensor, stop_ids: Tensor, temperature: Tensor) -> Tensor:
    """-inf, in place, for the stop tokens of the rows that wait; no host is asked, so that a graph may contain it.

    logits: float32 [rows, V]. waits: bool [rows]. stop_ids: int64 [rows, S], -1 for none. temperature: float32 [rows].
    Returns float32 [rows], what to add to the `logprob_full` of the tokens drawn so that it is the model's own again.
    """
    scale = torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    before = torch.logsumexp(logits / scale, -1)
    for ids in stop_ids.split(1, 1):  # one by one: where there is none, a -1 rewrites what token 0 has by now
        place = ids.clamp(min=0)
        logits.scatter_(1, place, torch.where(waits[:, None] & (ids >= 0), -torch.inf, logits.gather(1, place)))
    return torch.logsumexp(logits / scale, -1) - before
