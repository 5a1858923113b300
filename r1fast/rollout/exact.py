"""Log-probabilities that are the same to the last bit, whatever else is in the batch.

Rounding is the only thing that a batch changes, through the order in which a product or an attention sums, which is
chosen by the number of rows (He et al. 2025, "Defeating nondeterminism in LLM inference"). So here every token, of a
prompt or drawn, is computed in the same way: as one row of a decode step, whose attention sums over its own context
alone, in steps whose products sum every row alike. Which of three ways gives that is found out by a trial with the
model's own weights, once for each sampler:

    plain   steps as they are: on a CPU in float32 the op `linear` sums a row alike in every batch.
    padded  steps are filled up to a multiple of `ROWS` rows; a library's product is then made of full tiles alone.
            MKL on AVX2 (measured: fp32, 1 and 2 threads, 48 to 1024 columns, 96 to 8192 outputs): a row has the same
            bits in every product of at least 4 rows a thread, and other bits in smaller ones.
    cut     products of exactly `ROWS` rows, as many as it takes.

What it costs: docs/sampling.md. The rows that fill up repeat the last one, and write again what it writes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r1fast.config import UserError
from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV, PagedStep
from r1fast.rollout.engine import StepEngine

ROWS = 16
_TRIAL = (1, 2, 3, 5, 7, 12, 16, 32, 48, 176)  # numbers of rows that must agree
_COLUMNS = 6  # blocks of the longest context of the trial


class ExactEngine(StepEngine):
    """A StepEngine whose rows do not know of each other. UserError from `begin` where this machine cannot do it."""

    def __init__(self, model: Decoder):
        super().__init__(model)
        self.way: str | None = None  # "plain", "padded" or "cut", once it is known

    def begin(self, kv, batch) -> None:
        super().begin(kv, batch)
        self.way = self.way or self._find_way(batch.block_size)

    def hidden(self, step: PagedStep) -> Tensor:
        return self._forward(step, self._kv, self.way)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden, self.way)

    def _forward(self, step: PagedStep, kv: PagedKV, way: str) -> Tensor:
        rows, step = len(step.tokens), one_query_each(step)
        if way == "plain":
            return self.model.forward_paged(step, kv)
        step = filled(step)
        if way == "padded":
            return self.model.forward_paged(step, kv)[:rows]
        # In order: the rows of a prompt read what those before them have written.
        parts = [self.model.forward_paged(part, kv) for part in cut(step)]
        return torch.cat(parts)[:rows]

    def _logits(self, hidden: Tensor, way: str) -> Tensor:
        if way == "plain":
            return self.model.logits(hidden)
        rows = len(hidden)
        hidden = hidden[filled_index(rows, hidden.device)]
        parts = [hidden] if way == "padded" else hidden.split(ROWS)
        return torch.cat([self.model.logits(part) for part in parts])[:rows]

    @torch.inference_mode()
    def _find_way(self, block_size: int) -> str:
        """The first of the ways in which the same rows, together with others or not, have the same bits."""
        whole, kv = _trial(self.model, block_size)
        groups = _groups(whole.context_lens)
        for way in ("plain", "padded", "cut"):
            expected = self._logits(self._forward(whole, kv, way), way)
            found = (self._logits(self._forward(take(whole, rows), kv, way), way) for rows in groups)
            if all(torch.equal(some, expected[rows]) for some, rows in zip(found, groups, strict=True)):
                return way
        raise UserError(
            f"exact: on {self.model.device} the bits of a row in {self.model.dtype} depend on its place in a batch of "
            f"{ROWS} or on the longest context beside it; leave exact out"
        )


def _trial(model: Decoder, block_size: int) -> tuple[PagedStep, PagedKV]:
    """Random rows with contexts of up to `_COLUMNS` blocks over a random cache; the last block is each row's own."""
    rows, generator = _TRIAL[-1], torch.Generator().manual_seed(0)
    kv = PagedKV.allocate(model.local_config, _COLUMNS + rows, block_size, model.device, model.dtype)
    for cache in (kv.keys, kv.values):
        cache.copy_(torch.randn(cache.shape[1:], generator=generator))
    tokens = torch.randint(model.config.vocab_size, (rows,), generator=generator)
    length = torch.randint(min(_COLUMNS * block_size, model.config.max_positions), (rows,), generator=generator)
    tables = torch.arange(_COLUMNS).repeat(rows, 1)
    own = _COLUMNS + torch.arange(rows)
    tables[torch.arange(rows), length // block_size] = own
    arrays = (tokens, length, own * block_size + length % block_size, tables.int(), (length + 1).int())
    return PagedStep(*(array.to(model.device) for array in arrays)), kv


def _groups(context_lens: Tensor) -> list[Tensor]:
    """Rows of the trial to be computed without the others: those of the shortest contexts, and some in a new order, as
    a row must not depend on its place either."""
    generator = torch.Generator().manual_seed(1)
    shuffled = [torch.randperm(len(context_lens), generator=generator)[:count] for count in _TRIAL[:-1]]
    return [context_lens.argsort()[: ROWS // 2], *(rows.to(context_lens.device) for rows in shuffled)]


def one_query_each(step: PagedStep) -> PagedStep:
    """The same tokens, each as a sequence of its own whose context ends with it."""
    if step.cu_seqlens_q is None:
        return step
    counts = step.cu_seqlens_q.diff().long()
    tables = step.block_tables.repeat_interleave(counts, 0, output_size=len(step.tokens))
    return PagedStep(step.tokens, step.positions, step.slots, tables, (step.positions + 1).int())


def filled_index(rows: int, device) -> Tensor:
    """0 to rows - 1, and the last one repeated up to a multiple of ROWS."""
    return torch.arange(-(-rows // ROWS) * ROWS, device=device).clamp(max=rows - 1)


def filled(step: PagedStep) -> PagedStep:
    return take(step, filled_index(len(step.tokens), step.tokens.device)) if len(step.tokens) % ROWS else step


def cut(step: PagedStep) -> list[PagedStep]:
    return [take(step, slice(start, start + ROWS)) for start in range(0, len(step.tokens), ROWS)]


def take(step: PagedStep, rows: Tensor | slice) -> PagedStep:
    """Some rows of a step that has one query each."""
    names = ("tokens", "positions", "slots", "block_tables", "context_lens")
    return replace(step, **{name: getattr(step, name)[rows] for name in names})
