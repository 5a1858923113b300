"""Triton for the ops that begin with the head; their contracts are in linear_logprob.py and linear_grpo_loss.py.

A chunk of rows at a time: logits in float32 out of cuBLAS, one kernel over them, two products for the gradients.

    logits = hidden @ weight.T            float32 results of bf16 factors: rounding logits would move logp by 0.016
    kernel : logsumexp, logp, entropy, the loss, its slope, then d(logits) over the logits, in hidden's dtype
    d_hidden = d(logits) @ weight         d_weight += d(logits).T @ hidden      float32 sums, chunks in a fixed order

Of memory it takes one chunk of logits and the float32 d_weight. Nothing waits for the host, except that the rows which
can have a gradient are counted once, so that the others have no part in the two gradient products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from r1fast_kernels.grpo_loss import KIND_NUMBER, row_loss
from r1fast_kernels.triton_support import interpreted, jit, next_power_of_2, tl, where_triton_runs

NO_LOSS, GIVEN_SLOPE, GRPO = 0, 1, 2  # what `_head_rows` does with a row's logp
STATS = 4  # numbers that GRPO leaves for every row: loss, kl, clipped, ratio


@jit
def _softmax_sums(logits, place, row_live, width, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of rows z = scale * logits: the maximum m, sum of e^(z-m), sum of e^(z-m) (z-m). One pass (Milakov 2018).

    The lower bound on z - m keeps 0 * -inf out of the third sum where a logit is -inf or past the end.
    """
    m = tl.full([ROWS], -1e30, tl.float32)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    a = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        live = row_live[:, None] & (column < width)[None, :]
        z = scale * tl.load(logits + place[:, None] + column[None, :], mask=live, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        shift = m - new
        keep = tl.exp(shift)[:, None]
        d = z - new[:, None]
        e = tl.exp(d)
        a = keep * (a + s * shift[:, None]) + e * tl.maximum(d, -1e30)
        s = keep * s + e
        m = new
    return m, tl.where(row_live, tl.sum(s, 1), 1.0), tl.sum(a, 1)


@jit
def _replace_by_gradient(
    logits, place, gradient, own, row_live, target, width, scale, lse, slope, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """d/d(logits) of the sum of slope * logp, into `gradient`, which may lie over the logits: elements no larger, rows
    at the same addresses. The barrier is for that: what a step writes lies at or before what it has read, in memory,
    and another warp may not have read it yet."""
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        live = row_live[:, None] & (column < width)[None, :]
        z = scale * tl.load(logits + place[:, None] + column[None, :], mask=live, other=float("-inf"))
        p = tl.exp(z - lse[:, None])
        hit = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
        g = (slope * scale)[:, None] * (hit - p)
        tl.debug_barrier()
        tl.store(gradient + own[:, None] + column[None, :], g.to(gradient.dtype.element_ty), mask=live)


@jit(do_not_specialize=["count", "total"])
def _head_rows(
    logits, stride, gradient, gradient_stride, order, count, width, scale, targets, slopes,
    old_logp, ref_logp, advantages, weights, low, high, kl_coef, logp, entropy, lse, stats, total,
    LOSS: tl.constexpr, ON_POLICY: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a chunk a program. Row i of the chunk is row order[i] of the call, which every stream goes by."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = local < count
    row = tl.load(order + local, mask=live, other=0)
    target = tl.load(targets + row, mask=live, other=0)
    place = local * stride
    m, s, a = _softmax_sums(logits, place, live, width, scale, ROWS, COLUMNS)
    log_s = tl.log(s)
    inside = live & (target >= 0) & (target < width)  # a target outside gives NaN; nothing is read out of bounds
    p = scale * tl.load(logits + place + target, mask=inside, other=float("nan")) - m - log_s
    tl.store(logp + row, p, mask=live)
    tl.store(entropy + row, log_s - a / s, mask=live)
    tl.store(lse + row, m + log_s, mask=live)
    slope = p
    if LOSS == 1:
        slope = tl.load(slopes + row, mask=live, other=0.0)
    if LOSS == 2:
        weight = tl.load(weights + row, mask=live, other=0.0)
        used = weight != 0.0
        q = tl.where(used, p, 0.0)
        old = q if ON_POLICY else tl.load(old_logp + row, mask=used, other=0.0)
        ref = q if KIND == 0 else tl.load(ref_logp + row, mask=used, other=0.0)
        advantage = tl.load(advantages + row, mask=used, other=0.0)
        value, slope, ratio, clipped, kl = row_loss(q, old, ref, advantage, low, high, kl_coef, KIND)
        slope = tl.where(used, weight * slope, 0.0)
        own = stats + row
        tl.store(own, tl.where(used, weight * value, 0.0), mask=live)
        tl.store(own + total, tl.where(used, kl, 0.0), mask=live)
        tl.store(own + 2 * total, tl.where(used & clipped, 1.0, 0.0), mask=live)
        tl.store(own + 3 * total, tl.where(used, ratio, 0.0), mask=live)
    if GRADIENT:
        _replace_by_gradient(
            logits, place, gradient, local * gradient_stride, live, target, width, scale, m + log_s, slope,
            ROWS, COLUMNS,
        )  # fmt: skip


@jit(do_not_specialize=["count"])
def _gradient_rows(
    logits, stride, gradient, gradient_stride, order, count, width, scale, targets, slopes, lse,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The second half of `_head_rows` alone, where logsumexp is known from the forward pass."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = local < count
    row = tl.load(order + local, mask=live, other=0)
    target = tl.load(targets + row, mask=live, other=0)
    slope = tl.load(slopes + row, mask=live, other=0.0)
    own_lse = tl.load(lse + row, mask=live, other=0.0)
    _replace_by_gradient(
        logits, local * stride, gradient, local * gradient_stride, live, target, width, scale, own_lse, slope,
        ROWS, COLUMNS,
    )  # fmt: skip


def tile(vocabulary: int) -> tuple[int, int]:
    """(rows, columns) of a program: up to 4096 logits of one row, or 512 of several: more spill, in some variants.

    The interpreter pays by the program, so there it is 64 rows.
    """
    columns = min(next_power_of_2(vocabulary), 4096)
    return 64 if interpreted() else max(1, 512 // columns), columns


WARPS = 8


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk: 2048, which fills the card's products, or more, up to 256 MiB of logits, for small ones.

    Under the interpreter few enough that its tests, of up to 1301 rows, have more than one chunk.
    """
    return 512 if interpreted() else max(2048, (1 << 26) // vocabulary)


def supports(hidden, weight, targets, *rest) -> str | None:
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"hidden is {hidden.dtype}, and it takes float32 and bfloat16"
    return where_triton_runs(hidden, weight, targets, *rest)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b. Where out is wider than the factors, its sums are never rounded to their dtype.

    Torch has that (`out_dtype`) for CUDA alone: the CPU, which only Triton's interpreter works on, widens the factors.
    """
    if a.dtype != out.dtype and not out.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    wide = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if add:
        torch.addmm(out, a, b, **wide, out=out)
    else:
        torch.mm(a, b, **wide, out=out)


class Streams(NamedTuple):
    """What `_head_rows` reads of each row besides its hidden state; tensors [T] float32, or None where not needed."""

    slopes: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None


class Settings(NamedTuple):
    """GRPO's numbers."""

    clip_low: float = 0.0
    clip_high: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "none"


class Measured(NamedTuple):
    """Of every row, float32: logp, entropy, logsumexp [T], and GRPO's numbers [STATS, T]."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    stats: Tensor


class Head:
    """The logits of rows, a chunk at a time in one buffer, over which their gradients are written."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        self.hidden, self.weight, self.targets = hidden.detach(), weight.detach(), targets.contiguous()
        self.scale, self.width = 1.0 / temperature, weight.shape[0]
        self.every = torch.arange(hidden.shape[0], device=hidden.device)
        self.chunk = min(chunk_rows(self.width), max(hidden.shape[0], 1))
        self.logits = torch.empty(self.chunk, self.width, dtype=torch.float32, device=hidden.device)
        self.gradient = self.logits.view(hidden.dtype)[:, : self.width]

    def chunks(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple]]:
        """(rows, their hidden states, what every kernel's arguments begin with); the logits are made."""
        for start in range(0, order.shape[0], self.chunk):
            part = order[start : start + self.chunk]
            count = part.shape[0]
            whole = order is self.every
            hidden = self.hidden[start : start + count] if whole else self.hidden.index_select(0, part)
            product(hidden, self.weight.T, self.logits[:count])
            buffers = (self.logits, self.logits.stride(0), self.gradient, self.gradient.stride(0))
            yield part, hidden, (*buffers, part, count, self.width, self.scale, self.targets)

    def split(self, trained: Tensor) -> tuple[Tensor, Tensor]:
        """Rows where `trained` [T] holds, and the others, each in order. Waits for the host, once."""
        count = int(trained.sum())
        if count == trained.shape[0]:
            return self.every, self.every[:0]
        order = torch.argsort(trained, descending=True, stable=True)
        return order[:count], order[count:]

    def measure(self) -> Measured:
        """Room for what is found of every row."""
        new = self.hidden.new_empty
        rows = self.hidden.shape[0]
        return Measured(*(new(rows, dtype=torch.float32) for _ in range(3)), new(STATS, rows, dtype=torch.float32))

    def run(
        self, order: Tensor, found: Measured, loss: int, streams: Streams, settings: Settings, into: Gradients | None
    ) -> None:
        """Measure the rows of `order`, and add their gradients to `into`."""
        rows, columns = tile(self.width)
        numbers = (1.0 - settings.clip_low, 1.0 + settings.clip_high, float(settings.kl_coef))
        tensors = [found.logp if x is None else x for x in streams]
        kind = KIND_NUMBER[settings.kl_kind]
        for part, hidden, shared in self.chunks(order):
            _head_rows[(-(-part.shape[0] // rows),)](
                *shared, *tensors, *numbers, *found, self.hidden.shape[0],
                loss, streams.old_logp is None, kind, into is not None, rows, columns, num_warps=WARPS,
            )  # fmt: skip
            if into is not None:
                into.add(part, hidden, self.gradient[: part.shape[0]])

    def run_gradient(self, order: Tensor, lse: Tensor, slopes: Tensor, into: Gradients) -> None:
        """Add the gradients of the rows of `order`, whose logsumexp is known."""
        rows, columns = tile(self.width)
        for part, hidden, shared in self.chunks(order):
            grid = (-(-part.shape[0] // rows),)
            _gradient_rows[grid](*shared, slopes, lse, rows, columns, num_warps=WARPS)
            into.add(part, hidden, self.gradient[: part.shape[0]])


class Gradients:
    """The gradients of hidden, in its dtype, and of weight, in float32; None where not wanted."""

    def __init__(self, head: Head, order: Tensor, wants: tuple[bool, bool]):
        self.weight, self.whole = head.weight, order is head.every
        make = torch.empty_like if self.whole else torch.zeros_like
        self.d_hidden = make(head.hidden) if wants[0] else None
        self.d_weight = None
        if wants[1]:
            self.d_weight = torch.empty(head.weight.shape, dtype=torch.float32, device=head.weight.device)
            if not order.shape[0]:
                self.d_weight.zero_()
        self.done = 0

    def add(self, part: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """The two products of a chunk; `part` are its rows."""
        if self.d_weight is not None:
            product(gradient.T, hidden, self.d_weight, add=self.done > 0)
        if self.d_hidden is not None and self.whole:
            product(gradient, self.weight, self.d_hidden[self.done : self.done + part.shape[0]])
        elif self.d_hidden is not None:
            self.d_hidden.index_copy_(0, part, gradient @ self.weight)
        self.done += part.shape[0]
