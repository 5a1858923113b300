"""Reward models: pairs by Bradley-Terry, single responses by logistic loss, and their scores.

R1 trains the helpfulness model on pairs and the safety model on single responses labelled safe or not ('Model
rewards'). The score is RewardModel's, at the last token, so whole sequences are packed here, their last token too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from r1fast.learn.packing import epochs_of, layout, plan
from r1fast.model.sharding import release

if TYPE_CHECKING:
    from torch import Tensor

    from r1fast.learn.learner import Learner
    from r1fast.model.reward_model import RewardModel
    from r1fast.types import StepStats

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """B whole sequences end to end, and what is known about their scores."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [B+1]
    max_seqlen: int
    weight: float = 0.0  # of each pair or response in the loss: 1 over those of the whole step
    labels: Tensor | None = None  # float32 [B], 1 good and 0 bad; None for pairs: the first B/2 preferred to the rest


class Ordered(NamedTuple):
    """What a micro-batch told of its scores."""

    right: Tensor  # how many pairs or responses


PreferenceLoss = Callable[["RewardModel", ScoredBatch], tuple["Tensor", "Tensor"]]


def _lay_end_to_end(sequences: Sequence[Tokens], device, **more) -> ScoredBatch:
    lengths = np.array([len(tokens) for tokens in sequences], dtype=np.int64)
    if not lengths.all():
        raise ValueError("an empty sequence has no last token to score")
    starts, positions = layout(lengths)
    flat = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(starts[-1]))
    cu_seqlens = torch.from_numpy(starts).to(device=device, dtype=torch.int32)
    tokens, positions = torch.from_numpy(flat).to(device), torch.from_numpy(positions).to(device)
    return ScoredBatch(tokens, positions, cu_seqlens, int(lengths.max()), **more)


def pack_pairs(pairs: Sequence[tuple[Tokens, Tokens]], micro_batch_tokens: int, device="cpu") -> list[ScoredBatch]:
    """Micro-batches of (chosen, rejected) token sequences: both of a pair are in the same one."""
    parts = plan([len(chosen) + len(rejected) for chosen, rejected in pairs], micro_batch_tokens)
    return [
        _lay_end_to_end([pairs[i][side] for side in (0, 1) for i in part], device, weight=1.0 / len(pairs))
        for part in parts
    ]


def pack_responses(
    sequences: Sequence[Tokens], labels: Sequence[float], micro_batch_tokens: int, device="cpu"
) -> list[ScoredBatch]:
    """Micro-batches of single sequences, labelled 1 (good) or 0 (bad)."""
    batches = []
    for part in plan([len(tokens) for tokens in sequences], micro_batch_tokens):
        known = torch.tensor([labels[i] for i in part], dtype=torch.float32, device=device)
        chosen = [sequences[i] for i in part]
        batches.append(_lay_end_to_end(chosen, device, weight=1.0 / len(sequences), labels=known))
    return batches


def _scores(model: RewardModel, batch: ScoredBatch) -> Tensor:
    return model.forward_packed(batch.tokens, batch.cu_seqlens, batch.positions, batch.max_seqlen)


def pairwise_loss(model: RewardModel, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
    """-log sigmoid(chosen - rejected), the mean over the step's pairs (Ouyang et al. 2022, eq. 1). Returns (loss,
    how many pairs of this micro-batch are ordered right)."""
    chosen, rejected = _scores(model, batch).chunk(2)
    margin = chosen - rejected
    return -F.logsigmoid(margin).sum() * batch.weight, (margin > 0).sum()


def pointwise_loss(model: RewardModel, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
    """Logistic loss of the label, averaged over the step's responses. Returns (loss, how many were told right)."""
    scores = _scores(model, batch)
    loss = F.binary_cross_entropy_with_logits(scores, batch.labels, reduction="sum") * batch.weight
    return loss, ((scores > 0) == (batch.labels > 0.5)).sum()


def preference_step(learner: Learner, batches: Sequence[ScoredBatch], loss: PreferenceLoss) -> tuple[StepStats, float]:
    """One optimizer step of a RewardModel's learner. `loss`: pairwise_loss or pointwise_loss.

    Returns (what the step told, the share that was right before it)."""

    def told(model: RewardModel, batch: ScoredBatch) -> tuple[Tensor, Ordered]:
        value, right = loss(model, batch)
        return value, Ordered(right)

    step = learner.accumulate(batches, told)
    right = sum(float(found.right) for found in step.stats)  # of all ranks, each micro-batch once
    return learner.apply(replace(step, stats=[])), right * batches[0].weight


def pairwise_steps(
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    steps: int,
    batch_pairs: int,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    first: int = 0,
) -> Iterator[list[ScoredBatch]]:
    """The micro-batches of each of `steps` optimizer steps from `first` on, in seeded shuffles."""
    for picks in islice(epochs_of(len(pairs), steps, batch_pairs, seed), first, None):
        yield pack_pairs([pairs[i] for i in picks], micro_batch_tokens, device)


def pointwise_steps(
    sequences: Sequence[Tokens],
    labels: Sequence[float],
    *,
    steps: int,
    batch_responses: int,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    first: int = 0,
) -> Iterator[list[ScoredBatch]]:
    """As `pairwise_steps`, of single labelled responses."""
    for picks in islice(epochs_of(len(sequences), steps, batch_responses, seed), first, None):
        chosen, known = [sequences[i] for i in picks], [labels[i] for i in picks]
        yield pack_responses(chosen, known, micro_batch_tokens, device)


@torch.no_grad()
def score(model: RewardModel, sequences: Sequence[Tokens], micro_batch_tokens: int = 16384) -> list[float]:
    """The model's score of each token sequence (prompt and response through the template), in order. Of a sharded model
    a collective: all ranks score the same."""
    found = [0.0] * len(sequences)
    for part in plan([len(tokens) for tokens in sequences], micro_batch_tokens):
        batch = _lay_end_to_end([sequences[i] for i in part], model.device)
        for i, value in zip(part, _scores(model, batch).tolist(), strict=True):
            found[i] = value
    release(model)
    return found
