"""From a packed batch to a scalar loss: hidden states of the trained rows into the ops that hold the formulas.

A loss here is a function `(model, batch) -> (loss, BatchStats | None)`: what the learner sums over micro-batches.
Every denominator is in `batch.loss_weight`, so none is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from r1fast.learn.lockstep import in_step
from r1fast.learn.room import Room
from r1fast.model.sharding import is_sharded, release
from r1fast.model.tensor_parallel import tensor_of
from r1fast.parallel import world
from r1fast_kernels import grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob

if TYPE_CHECKING:
    from torch import Tensor

    from r1fast.model.decoder import Decoder
    from r1fast.schema import ObjectiveConfig
    from r1fast.types import PackedBatch


class BatchStats(NamedTuple):
    """What a policy loss measured, over its N rows; no gradient, no host synchronisation."""

    kl_sum: Tensor  # nats; 0 without a reference
    clipped_sum: Tensor  # rows whose policy gradient the clip removed
    ratio_sum: Tensor
    ratio_max: Tensor
    count: Tensor  # rows of weight != 0
    entropy_sum: Tensor  # nats
    logp: Tensor  # float32 [N], under the weights before the step


def trained_hidden(model: Decoder, batch: PackedBatch) -> Tensor:
    """Hidden states [N, H] that the batch's targets are predicted from; prompts cost no product with the head."""
    where = (batch.cu_seqlens, batch.positions, batch.max_seqlen, batch.cu_groups)
    hidden = model.forward_packed(batch.tokens, *where)
    return hidden.index_select(0, batch.rows)


def target_logprob(
    model: Decoder, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy without gradient) of each target, float32 [N], whoever holds the words of the head."""
    tensor = tensor_of(model)
    if tensor is None:
        return linear_logprob(hidden, model.head_weight, targets, temperature)
    return tensor.logprob(hidden, model.head_weight, targets, temperature, model.config.vocab_size)


def policy_loss(
    model: Decoder, batch: PackedBatch, objective: ObjectiveConfig, temperature: float = 1.0, on_policy: bool = False
) -> tuple[Tensor, BatchStats]:
    """GRPO or one of its variants (kernels/grpo_loss.py has the formula), summed over the batch's rows.

    `on_policy`: take the ratio to this very forward pass, whatever `batch.old_logprob` says; so also where that is
    None. `temperature`: the one that was sampled at.
    """
    hidden = trained_hidden(model, batch)
    old = None if on_policy else batch.old_logprob
    ref = batch.ref_logprob if objective.kl_coef else None
    clip = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
    kl = {"kl_coef": objective.kl_coef, "kl_kind": objective.kl_kind}
    if objective.importance == "token" and tensor_of(model) is None:
        streams = (old, ref, batch.advantage, batch.loss_weight)
        loss, found = linear_grpo_loss(
            hidden, model.head_weight, batch.targets, *streams, temperature=temperature, **clip, **kl
        )
        return loss, BatchStats(*found[:5], found.entropy.sum(), found.logp)
    logp, entropy = target_logprob(model, hidden, batch.targets, temperature)
    streams = (old, ref, batch.advantage, batch.loss_weight)
    sequences = batch.sequence if objective.importance == "sequence" else None
    rows, found = grpo_loss(logp, *streams, **clip, **kl, sequence_ids=sequences, return_stats=True)
    return rows.sum(), BatchStats(*found, entropy.sum(), logp.detach())


def cross_entropy_loss(model: Decoder, batch: PackedBatch) -> tuple[Tensor, None]:
    """Supervised: the weighted sum of -log p(target)."""
    hidden = trained_hidden(model, batch)
    if tensor_of(model) is not None:
        return -(target_logprob(model, hidden, batch.targets)[0] * batch.loss_weight).sum(), None
    loss, _ = linear_cross_entropy(hidden, model.head_weight, batch.targets, batch.loss_weight)
    return loss, None


@torch.no_grad()
def log_probs(
    model: Decoder, batches: Sequence[PackedBatch], temperature: float = 1.0, room: Room | None = None
) -> list[Tensor]:
    """Of each batch, the log-probs of its targets under `model`: float32 [N], nats. For the recomputed old policy and
    the reference. Of several ranks each does a share. `room`: what fits, where that is known."""
    room = room or Room(model)
    costs = [batch.tokens.shape[0] for batch in batches]

    def work(batch: PackedBatch) -> Tensor:
        return target_logprob(model, trained_hidden(model, batch), batch.targets, temperature)[0]

    def share(own: list[PackedBatch]) -> list[Tensor]:
        found = room.each(own, work, torch.cat)
        return found if world().size == 1 else [values.cpu() for values in found]

    if not is_sharded(model):
        return world().map(batches, share, costs)
    found = in_step(batches, lambda batch, real, last: work(batch).cpu() if real else work(batch))
    release(model)
    return found
