"""One set of rollouts into optimizer steps: what GRPO needs besides its loss.

The cost of a step is its forward passes, so there are as few as the mathematics allows:
- reference log-probs: one pass over the rollouts, none when there is no KL term;
- old log-probs: the first mini-batch's ratio is to its own forward pass (exact, and free). The later ones use the
  sampler's log-probs while these agree with the learner's, which the first mini-batch's pass has just measured
  (free as well), and otherwise get one more pass before the weights move;
- rows whose gradient is exactly zero are never forwarded, but every denominator counts them;
- the prompt of a group is forwarded once for all its rows, where that saves enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from r1fast.config import UserError
from r1fast.learn.advantages import advantages
from r1fast.learn.losses import log_probs, policy_loss
from r1fast.learn.packing import (
    Row,
    loss_weights,
    pack,
    plan_rows,
    row_lengths,
    rows_from_groups,
    shared_tokens,
    unpack,
)
from r1fast.metrics import PhaseTimer

if TYPE_CHECKING:
    from random import Random

    from torch import Tensor

    from r1fast.learn.learner import Accumulated, Learner
    from r1fast.model.decoder import Decoder
    from r1fast.schema import ObjectiveConfig
    from r1fast.types import PackedBatch, RolloutGroup, StepStats

OldLogprobs = Literal["auto", "sampler", "recompute"]
SharePrompts = Literal["auto", "always", "never"]

SAVED = (
    0.02  # least share of the tokens that sharing prompts must save: below it the cut pack costs as much as it gives
)


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """What the optimizer steps over one set of rollouts told; the properties are means over the steps."""

    steps: list[StepStats]
    logprob_difference_mean: float | None  # |learner - sampler|, nats a token, before the first step; None: no rows
    logprob_difference_max: float | None
    old_logprobs: Literal["sampler", "learner"]  # whose log-probs the later mini-batches' ratios were taken to
    groups_trained: int  # groups with at least one row that was forwarded

    def mean(self, name: str) -> float:
        return sum(getattr(step, name) for step in self.steps) / len(self.steps)

    @property
    def loss(self) -> float:
        return self.mean("loss")

    @property
    def kl(self) -> float:
        return self.mean("kl")

    @property
    def entropy(self) -> float:
        return self.mean("entropy")

    @property
    def clip_fraction(self) -> float:
        return self.mean("clip_fraction")

    @property
    def grad_norm(self) -> float:
        return self.mean("grad_norm")

    @property
    def ratio_max(self) -> float:
        return max(step.ratio_max for step in self.steps)

    @property
    def learning_rate(self) -> float:
        return self.steps[-1].learning_rate


def train_policy(
    learner: Learner,
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    *,
    random: Random,
    reference: Decoder | None = None,
    old_logprobs: OldLogprobs = "auto",
    logprob_bound: float = 1e-3,
    mini_batches: int = 1,
    epochs: int = 1,
    micro_batch_tokens: int = 16384,
    share_prompts: SharePrompts = "auto",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    timer: PhaseTimer | None = None,
) -> PolicyUpdate:
    """All optimizer steps over `groups`: `mini_batches` random parts of them, `epochs` times over.

    reference: needed when `objective.kl_coef` > 0, never called otherwise. old_logprobs: whose log-probs the ratio is
    taken to; `auto` is the sampler's while the mean difference is at most `logprob_bound` nats a token, or where the
    groups are of older weights than the learner's (the ratio must then account for it). share_prompts: whether a
    group's prompt is forwarded once; `auto` where that saves SAVED of the tokens. temperature: the sampler's.
    max_tokens: the sampler's limit, needed by the aggregate `constant`. timer: charged under "logprob" and "learn".
    Raises UserError for settings that cannot be met.
    """
    if temperature <= 0:
        raise UserError("RL needs sampling.temperature > 0: greedy samples of a prompt are all the same")
    if objective.kl_coef > 0 and reference is None:
        raise UserError("objective.kl_coef > 0 needs a reference model")
    if objective.truncated_is is not None and old_logprobs == "sampler":
        raise UserError(
            "objective.truncated_is corrects recomputed old log-probs: old_logprobs must be auto or recompute"
        )
    if len(groups) < mini_batches:
        raise UserError(f"{len(groups)} prompts cannot be split into {mini_batches} mini-batches: lower mini_batches")
    timer = timer or PhaseTimer()
    with timer("learn"):
        update = _Update(learner, groups, objective, temperature, micro_batch_tokens, share_prompts, timer)
        if objective.kl_coef > 0:
            update.ask_reference(reference)
        corrected = objective.truncated_is is not None and update.correct(old_logprobs, logprob_bound)
        stale = any(group.weights_version != learner.model.weights_version for group in groups)
        own = not corrected and (old_logprobs == "recompute" or (old_logprobs == "auto" and not stale))
        parts = [part for _ in range(epochs) for part in _split(len(groups), mini_batches, random)]
        first = update.step(parts[0], max_tokens, on_policy=own)
        if not corrected:
            update.compare(first)
        if own:
            update.whose = "learner"
        if own and len(parts) > 1:
            update.settle(first, old_logprobs, logprob_bound)
        update.apply(first)
        for part in parts[1:]:
            update.apply(update.step(part, max_tokens))
        return update.result()


def _split(groups: int, mini_batches: int, random: Random) -> list[list[int]]:
    """A random partition of the groups into parts whose sizes differ by at most one."""
    order = list(range(groups))
    random.shuffle(order)
    return [order[i::mini_batches] for i in range(mini_batches)]


class _Update:
    """The rows of one set of rollouts, and what has been found out about them so far."""

    def __init__(self, learner, groups, objective, temperature: float, micro_batch_tokens: int, share, timer) -> None:
        self.learner, self.objective, self.timer = learner, objective, timer
        self.temperature, self.micro_batch_tokens = temperature, micro_batch_tokens
        self.rows: list[Row] = rows_from_groups(groups, advantages(groups, objective.normalize_std))
        bounds = np.cumsum([0] + [len(group.rollouts) for group in groups])
        self.members = [range(a, b) for a, b in pairwise(bounds)]
        everything = objective.kl_coef > 0  # the KL term has a gradient whatever the advantage
        self.live = [everything or row.advantage != 0.0 for row in self.rows]
        self.shared = share == "always" or (share == "auto" and self._saving() >= SAVED)
        self.whose: Literal["sampler", "learner"] = "sampler"
        self.difference: tuple[float, float] | None = None
        self.steps: list[StepStats] = []

    def _saving(self) -> float:
        """Share of the forwarded tokens that sharing prompts saves."""
        live = [row for row, alive in zip(self.rows, self.live, strict=True) if alive]
        return 1 - shared_tokens(live) / max(1, sum(row_lengths(live)))

    def _plan(self, rows: Sequence[Row]) -> list[list[int]]:
        tokens = min(self.micro_batch_tokens, self.learner.room.limit or self.micro_batch_tokens)
        return plan_rows(rows, tokens, self.shared)

    def _pack(self, rows: Sequence[Row], weights, device, order: list[list[int]]) -> list[PackedBatch]:
        return pack(rows, weights, self.micro_batch_tokens, device, order, self.shared)

    def ask_reference(self, reference: Decoder) -> None:
        every = range(len(self.rows))
        for i, values in zip(every, self._log_probs(reference, every), strict=True):
            self.rows[i] = replace(self.rows[i], ref_logprobs=values)

    def correct(self, old_logprobs: OldLogprobs, bound: float) -> bool:
        """Truncated importance sampling: the advantage of a token times min(pi_learner / pi_sampler, C), the old
        log-probs being the learner's (Yao et al. 2025). The weights must be known before the first loss, so `auto`
        looks at one micro-batch first, and recomputes only where that is out of bound. Returns whether it did."""
        live = [i for i, alive in enumerate(self.live) if alive]
        if not live:
            return False
        if old_logprobs == "auto":
            probe = [live[at] for at in self._plan([self.rows[i] for i in live])[0]]
            self._measure(probe, self._log_probs(self.learner.model, probe))
            if self.difference[0] <= bound:
                return False
        sampled = {i: np.asarray(self.rows[i].old_logprobs) for i in live}
        self._recompute(live)
        for i in live:
            ratio = np.exp(self.rows[i].old_logprobs - sampled[i])
            self.rows[i] = replace(self.rows[i], correction=np.minimum(ratio, self.objective.truncated_is))
        return True

    def step(self, part: list[int], max_tokens: int | None, on_policy: bool = False) -> _Step:
        """The gradient of the groups `part`; `apply` then moves the weights. `on_policy`: ratios to this very pass."""
        members = [i for group in part for i in self.members[group]]
        weights = loss_weights([self.rows[i] for i in members], self.objective.aggregate, max_tokens)
        kept = [at for at, i in enumerate(members) if self.live[i]]
        ids, rows = [members[at] for at in kept], [self.rows[members[at]] for at in kept]
        order = self._plan(rows)
        batches = self._pack(rows, weights[kept], self.learner.model.device, order)
        loss = partial(policy_loss, objective=self.objective, temperature=self.temperature, on_policy=on_policy)
        return _Step(ids, order, batches, self.learner.accumulate(batches, loss))

    def apply(self, step: _Step) -> None:
        self.steps.append(self.learner.apply(step.found))

    def compare(self, step: _Step) -> None:
        """The sampler's log-probs beside those of a pass that the weights have not moved since."""
        if step.ids:
            gaps = [(p - b.old_logprob).abs() for p, b in zip(step.logps, step.batches, strict=True)]
            gaps = torch.cat(gaps)
            self.difference = tuple(torch.stack([gaps.mean(), gaps.max()]).tolist())

    def settle(self, step: _Step, old_logprobs: OldLogprobs, bound: float) -> None:
        """After the first mini-batch's gradient, before its step: what the ratios of the later ones are taken to."""
        for i, values in zip(step.ids, unpack(step.logps, step.batches, step.order), strict=True):
            self.rows[i] = replace(self.rows[i], old_logprobs=values)
        trusted = self.difference is not None and self.difference[0] <= bound  # not where it is NaN
        if old_logprobs == "recompute" or not trusted:
            seen = set(step.ids)
            self._recompute([i for i, alive in enumerate(self.live) if alive and i not in seen])
        else:
            self.whose = "sampler"

    def _recompute(self, ids: Sequence[int]) -> None:
        """The old log-probs of these rows by a pass of the learner, whose weights have not moved yet."""
        self.whose = "learner"
        if not ids:
            return
        values = self._log_probs(self.learner.model, ids)
        if self.difference is None:
            self._measure(ids, values)
        for i, value in zip(ids, values, strict=True):
            self.rows[i] = replace(self.rows[i], old_logprobs=value)

    def _log_probs(self, model: Decoder, ids: Sequence[int]) -> list[np.ndarray]:
        """Per-token log-probs of the rows `ids` under `model`."""
        with self.timer("logprob"):
            rows = [Row(self.rows[i].tokens, self.rows[i].prompt_length, group=self.rows[i].group) for i in ids]
            order = self._plan(rows)
            batches = self._pack(rows, None, model.device, order)
            return unpack(log_probs(model, batches, self.temperature, self.learner.room), batches, order)

    def _measure(self, ids: Sequence[int], values: Sequence[np.ndarray]) -> None:
        gaps = np.abs(np.concatenate(values) - np.concatenate([np.asarray(self.rows[i].old_logprobs) for i in ids]))
        self.difference = (float(gaps.mean()), float(gaps.max()))

    def result(self) -> PolicyUpdate:
        trained = sum(any(self.live[i] for i in members) for members in self.members)
        mean, largest = self.difference or (None, None)
        return PolicyUpdate(self.steps, mean, largest, self.whose, trained)


@dataclass(frozen=True, slots=True)
class _Step:
    """A mini-batch whose gradient lies in the parameters."""

    ids: list[int]  # its rows
    order: list[list[int]]  # `plan` of them
    batches: list[PackedBatch]
    found: Accumulated

    @property
    def logps(self) -> list[Tensor]:
        return [told.logp for told in self.found.stats]
