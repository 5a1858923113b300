"""GRPO's per-token loss: clipped ratio, advantage, and the KL penalty to a reference policy.

For row t with ratio r, advantage A and weight w (DeepSeekMath, eq. 3 and 4; the sign turned, so that it is minimised):

    out[t] = w * ( -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) + kl_coef * kl )
    r      = exp(logp - old_logp)
    kl     = k1: logp - ref     k2: (logp - ref)^2 / 2     k3: exp(ref - logp) - (ref - logp) - 1

The gradient goes to logp alone, through r and through the value of kl. With `sequence_ids` the ratio is GSPO's
(Zheng et al. 2025, eq. 7): exp of the mean of (logp - old_logp) over the rows of the sequence whose weight is not zero,
and the gradient goes through that mean. The clip bounds may have any size: with clip_low >= 1 the lower one is negative
and never binds. Every denominator (1/|o|, 1/G, ...) is in the weights, so that the scalar loss is the plain sum.

Rows of weight 0 give exactly 0 and take no part in the statistics or in a sequence's mean, whatever their other
values are: they may be masked rows with no log-probabilities at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3")


class GRPOStats(NamedTuple):
    """Sums over the rows of weight != 0, as 0-d tensors: no host synchronisation, and micro-batches add up.

    kl_sum: of the estimate `kl_kind` names, nats; 0 without a reference. clipped_sum: rows whose policy gradient the clip
    removed (A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low). ratio_max: 0 where there is no row.
    """

    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    count: Tensor


def _sequence_mean(log_ratio: Tensor, live: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean of log_ratio over each run of equal ids, given back to every row of the run."""
    run = torch.zeros_like(sequence_ids)
    torch.cumsum(sequence_ids[1:] != sequence_ids[:-1], 0, out=run[1:])
    zeros = log_ratio.new_zeros(log_ratio.shape)
    total = zeros.index_add(0, run, log_ratio)
    count = zeros.index_add(0, run, live.to(log_ratio.dtype))
    return (total / count.clamp(min=1.0)).index_select(0, run)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Schulman's three estimators of KL(policy || reference) from one sample, per row."""
    if kind == "k3":
        difference = ref_logp - logp
        return torch.expm1(difference) - difference
    difference = logp - ref_logp
    return difference if kind == "k1" else 0.5 * difference.square()


def reference(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    sequence_ids: Tensor | None = None,
) -> tuple[Tensor, GRPOStats]:
    """Plain torch, differentiated by autograd; the one place where the formula is written in torch."""
    work = logp.dtype if logp.dtype == torch.float64 else torch.float32
    live = weights != 0
    logp = torch.where(live, logp.to(work), 0.0)
    old_logp = logp.detach() if old_logp is None else torch.where(live, old_logp.to(work), 0.0)
    advantages, weights = advantages.to(work), weights.to(work)

    log_ratio = logp - old_logp
    if sequence_ids is not None:
        log_ratio = _sequence_mean(log_ratio, live, sequence_ids)
    ratio = torch.exp(log_ratio)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    row = -torch.minimum(surrogate, clipped)

    kl_sum = None
    if ref_logp is not None:
        kl = kl_estimate(logp, torch.where(live, ref_logp.to(work), 0.0), kl_kind)
        kl_sum = kl.detach().sum()
        if kl_coef != 0.0:
            row = row + kl_coef * kl
    loss = weights * torch.where(live, row, 0.0)

    with torch.no_grad():
        held = ratio.detach() * live
        zero = held.new_zeros(())
        stats = GRPOStats(
            kl_sum=zero if kl_sum is None else kl_sum,
            clipped_sum=((clipped < surrogate) & live).sum(dtype=work),
            ratio_sum=held.sum(),
            ratio_max=held.max() if held.numel() else zero,
            count=live.sum(dtype=work),
        )
    return loss, stats


def loss_and_slope(logp: Tensor, *streams: Tensor | None, **settings) -> tuple[Tensor, Tensor, GRPOStats]:
    """The loss of each row, d(sum of losses)/d(logp) of each row, and the statistics; nothing carries a gradient.

    For ops that take the gradient in their forward pass: the formula stays `reference`'s.
    """
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        loss, stats = reference(leaf, *streams, **settings)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope, stats


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    sequence_ids: Tensor | None = None,
    *,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, GRPOStats]:
    """Per-token GRPO (or GSPO) loss, weighted; its sum is the scalar loss.

    logp: float [T], nats. old_logp: float [T], or None for exactly on-policy rows (logp.detach()). ref_logp: float [T] or
    None. advantages: float [T]. weights: float [T] (or a mask), 0 where the row is not trained on. clip_low, clip_high:
    >= 0, any size. kl_kind: "k1", "k2" or "k3". sequence_ids: int64 [T], sorted; turns the ratio into GSPO's.
    Returns float32 [T] (float64 for float64 logp); with return_stats, (loss, GRPOStats).
    Raises ValueError on shapes or dtypes that do not fit, a negative clip, an unknown kl_kind, or a kl_coef without ref_logp.
    """
    loss, stats = reference(
        logp, old_logp, ref_logp, advantages, weights, clip_low, clip_high, kl_coef, kl_kind, sequence_ids
    )
    return (loss, stats) if return_stats else loss
