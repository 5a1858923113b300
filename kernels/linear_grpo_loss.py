"""The head and the loss as one op: hidden states in, scalar loss and its gradients out, no [T, V] ever kept.

    loss = sum_t grpo_loss(linear_logprob(hidden, weight, targets, temperature), old, ref, A, w)[t]
    and the supervised form  loss = sum_t -w[t] * logp[t]

A loss that is a sum over rows has its gradient the moment a row's log-probability is known. So both are taken in the
forward pass, chunk by chunk: three products (6 T V H FLOPs) instead of the four of an op that makes its logits again in
the backward pass. Backward only scales what is there. Rows whose slope d(loss)/d(logp) is exactly zero (no advantage and
no KL term, clipped, or weight 0) are left out of the two gradient products, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .grpo_loss import GRPOStats, loss_and_slope
from .linear_logprob import RowLogits, work_dtype
from .linear_logprob import reference as linear_logprob_reference


class LinearGRPOStats(NamedTuple):
    """GRPOStats' sums (0-d tensors, over rows of weight != 0), and each row's logp and entropy, float32 [T]; no gradient."""

    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    count: Tensor
    logp: Tensor
    entropy: Tensor


# Given a chunk and its logp [C]: the loss of its rows, the slope d(loss)/d(logp) of its rows.
RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


class _LinearLoss(torch.autograd.Function):
    """Any per-row loss of logp behind the head, its gradients taken in forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, row_loss, want_entropy: bool):
        head = RowLogits(hidden, weight, temperature)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        logp = hidden.new_empty(hidden.shape[0], dtype=head.logits.dtype)
        entropy = torch.empty_like(logp) if want_entropy else logp.new_empty(0)
        loss = logp.new_zeros(())
        d_hidden = torch.empty_like(head.hidden) if wants_hidden else None
        d_weight = torch.zeros_like(head.weight) if wants_weight else None
        for chunk in head.chunks():
            logprobs = head.log_softmax(chunk)
            logp[chunk] = logprobs.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
            if want_entropy:
                entropy[chunk] = head.entropy(logprobs)
            rows, slope = row_loss(chunk, logp[chunk])
            loss += rows.sum()
            if wants_hidden or wants_weight:
                _add_gradients(head, chunk, logprobs, targets[chunk], slope, d_hidden, d_weight)
        ctx.gradients = (d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, scale: Tensor, _logp: Tensor, _entropy: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a fused linear loss keeps its gradients for one backward pass: call it again instead")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _add_gradients(head, chunk, logprobs, targets, slope, d_hidden, d_weight) -> None:
    """The two gradient products of a chunk, over its rows with a slope."""
    live = slope.nonzero().squeeze(1)
    every = live.shape[0] == slope.shape[0]
    hidden = head.hidden[chunk]
    if not every:
        logprobs, targets, slope, hidden = logprobs[live], targets[live], slope[live], hidden[live]
    gradient = head.logit_gradient(logprobs, targets, slope)
    if d_weight is not None:
        d_weight.addmm_(gradient.T, hidden)
    if d_hidden is not None:
        if every:
            torch.mm(gradient, head.weight, out=d_hidden[chunk])
        else:
            d_hidden[chunk] = 0
            d_hidden[chunk].index_copy_(0, live, gradient @ head.weight)


def _fused(hidden, weight, targets, temperature, row_loss: RowLoss, want_entropy: bool):
    if not torch.is_grad_enabled():  # needs_input_grad looks at the tensors, not at the mode
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLoss.apply(hidden, weight, targets, temperature, row_loss, want_entropy)


def _cut(stream: Tensor | None, chunk: slice) -> Tensor | None:
    return None if stream is None else stream[chunk]


def _merge(parts: list[GRPOStats]) -> GRPOStats:
    if len(parts) == 1:
        return parts[0]
    columns = [torch.stack(column) for column in zip(*parts, strict=True)]
    return GRPOStats(*(c.amax() if n == "ratio_max" else c.sum() for n, c in zip(GRPOStats._fields, columns, strict=True)))


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    *,
    backend: str | None = None,
) -> tuple[Tensor, LinearGRPOStats]:
    """GRPO's loss from hidden states; see grpo_loss for the formula and linear_logprob for logp.

    hidden: float [T, H]. weight: float [V, H]. targets: int64 [T], in [0, V). old_logp: float [T], or None for exactly
    on-policy rows (old = logp, detached). ref_logp: float [T] or None. advantages, weights: float [T]. temperature: > 0.
    Returns (loss: float32 scalar, the sum over rows; LinearGRPOStats). Differentiable once in hidden and weight.
    Raises ValueError as grpo_loss and linear_logprob do; RuntimeError on a second backward through the same loss.
    """
    parts: list[GRPOStats] = []

    def row_loss(chunk: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        streams = (_cut(s, chunk) for s in (old_logp, ref_logp, advantages, weights))
        rows, slope, stats = loss_and_slope(
            logp, *streams, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, kl_kind=kl_kind
        )
        parts.append(stats)
        return rows, slope

    loss, logp, entropy = _fused(hidden, weight, targets, temperature, row_loss, True)
    if not parts:
        row_loss(slice(0, 0), logp)
    return loss, LinearGRPOStats(*_merge(parts), logp, entropy)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The supervised form: loss = sum_t -weights[t] * logp[t].

    hidden: float [T, H]. weight: float [V, H]. targets: int64 [T], in [0, V). weights: float [T].
    Returns (loss: float32 scalar, logp: float32 [T] without gradient). Differentiable once in hidden and weight.
    """
    slope = -weights.detach().to(work_dtype(hidden))

    def row_loss(chunk: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        return slope[chunk] * logp, slope[chunk]

    loss, logp, _ = _fused(hidden, weight, targets, 1.0, row_loss, False)
    return loss, logp
