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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from r1fast.config import UserError
from r1fast.learn.accumulation import Accumulation
from r1fast.learn.advantages import advantages
from r1fast.learn.losses import log_probs, policy_loss
from r1fast.learn.packing import (
    Filling,
    Row,
    late_scale,
    loss_weights,
    pack,
    plan_rows,
    row_lengths,
    rows_from_groups,
    shared_tokens,
    unpack,
)
from r1fast.metrics import PhaseTimer
from r1fast.parallel import world

if TYPE_CHECKING:
    from random import Random

    from torch import Tensor

    from r1fast.learn.accumulation import Accumulated, Loss
    from r1fast.learn.learner import Learner
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


def _split(groups: int, mini_batches: int, random: Random) -> list[list[int]]:
    """A random partition of the groups into parts whose sizes differ by at most one."""
    order = list(range(groups))
    random.shuffle(order)
    return [order[i::mini_batches] for i in range(mini_batches)]


class PolicyLearning:
    """`mini_batches` random parts of a set of groups, `epochs` times over, an optimizer step for each.

    Groups are added as they finish. Those of the first part go into micro-batches in that order, a micro-batch being
    made as soon as it is full, so that its gradient can be computed `now`, while other groups are still being drawn, or
    when all are there: the sums are the same, and so are their bits. The weights move in `finish` alone.
    """

    def __init__(
        self,
        learner: Learner,
        sizes: Sequence[int],
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
    ) -> None:
        """sizes: rollouts of each group to come. reference: needed when `objective.kl_coef` > 0, never called
        otherwise. old_logprobs: whose log-probs the ratio is taken to; `auto` is the sampler's while the mean
        difference is at most `logprob_bound` nats a token, or where the groups are of older weights than the learner's
        (the ratio must then account for it). share_prompts: whether a group's prompt is forwarded once; `auto` where
        that saves SAVED of the tokens. temperature: the sampler's. max_tokens: the sampler's limit, needed by the
        aggregate `constant`. timer: charged under "logprob" and "learn".
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
        if len(sizes) < mini_batches:
            raise UserError(
                f"{len(sizes)} prompts cannot be split into {mini_batches} mini-batches: lower mini_batches"
            )
        self.learner, self.objective, self.timer = learner, objective, timer or PhaseTimer()
        self.reference = reference if objective.kl_coef > 0 else None
        self.old_logprobs, self.bound = old_logprobs, logprob_bound
        self.temperature, self.max_tokens, self.share = temperature, max_tokens, share_prompts
        self.micro_batch_tokens = micro_batch_tokens
        self.parts = [part for _ in range(epochs) for part in _split(len(sizes), mini_batches, random)]
        self.count = sum(sizes[group] for group in self.parts[0])  # rows of the first optimizer step
        self.groups = len(sizes)
        self.members: dict[int, range] = {}  # of each group that is there: its rows
        self.rows: list[Row] = []
        self.live: list[bool] = []
        self.stale = False
        self.whose: Literal["sampler", "learner"] = "sampler"
        self.difference: tuple[float, float] | None = None
        self.steps: list[StepStats] = []
        self._first = frozenset(self.parts[0])
        self._filling = Filling(self.rows, self._tokens, self._shares)
        self._full: list[tuple[list[int], bool]] = []  # micro-batches whose gradient is still to be computed
        self._learned: list[list[int]] = []  # the rows of those whose gradient is there
        self._gradient: Accumulation | None = None

    def add(self, index: int, group: RolloutGroup, now: bool = False) -> None:
        """Group number `index` has finished and is scored. `now`: compute the gradient of what is full with it.

        A correction by truncated importance weights must be decided on before any loss; then nothing is computed yet.
        ValueError for a group of other weights than the learner's that is to be learned from `now`."""
        values = advantages([group], self.objective.normalize_std)
        rows = rows_from_groups([group], values, index)
        self.members[index] = range(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        everything = self.objective.kl_coef > 0  # the KL term has a gradient whatever the advantage
        self.live += [everything or row.advantage != 0.0 for row in rows]
        self.stale = self.stale or group.weights_version != self.learner.model.weights_version
        if index in self._first:
            self._full += self._filling.add([i for i in self.members[index] if self.live[i]])
        if now and self.objective.truncated_is is None and world().size == 1:
            if self.stale:
                raise ValueError("a group of older weights can be learned from only when all groups are there")
            self._learn(self.old_logprobs != "sampler")

    def finish(self) -> PolicyUpdate:
        """Every group has been added: the rest of the first gradient, then all optimizer steps."""
        if len(self.members) != self.groups:
            raise ValueError(f"{len(self.members)} of {self.groups} groups were added")
        with self.timer("learn"):
            corrected = self.objective.truncated_is is not None and self.correct(self.old_logprobs, self.bound)
            trusted = self.old_logprobs == "sampler" or (self.old_logprobs == "auto" and self.stale)
            own = not (corrected or trusted)
            self._full += self._filling.rest()
            first = self._first_step(own)
            if not corrected:
                self.compare(first)
            if own:
                self.whose = "learner"
            if own and len(self.parts) > 1:
                self.settle(first, self.old_logprobs, self.bound)
            self.apply(first)
            for part in self.parts[1:]:
                self.apply(self.step(part))
            return self.result()

    # -- the first gradient, micro-batch by micro-batch ----------------------------------------------------------------

    def _learn(self, on_policy: bool) -> None:
        """The gradient of the micro-batches that are full. `on_policy`: ratios to this very pass."""
        if self._gradient is None:
            self._gradient = Accumulation(self.learner, self._loss(on_policy))
        batches = []
        for ids, shared in self._full:
            rows = [self.rows[i] for i in ids]
            weights = loss_weights(rows, self.objective.aggregate, self.max_tokens, of=self.count)
            every = [list(range(len(rows)))]
            batches += pack(rows, weights, self.micro_batch_tokens, self.learner.model.device, every, shared)
        if self.reference is not None and batches:
            with self.timer("logprob"):
                known = log_probs(self.reference, batches, self.temperature, self.learner.room)
            batches = [replace(batch, ref_logprob=values) for batch, values in zip(batches, known, strict=True)]
            if len(self.parts) > 1:
                self._keep([ids for ids, _ in self._full], batches, known, "ref_logprobs")
        self._gradient.add(batches)
        self._learned += [ids for ids, _ in self._full]
        self._full = []

    def _first_step(self, on_policy: bool) -> _Step:
        self._learn(on_policy)
        rows = [self.rows[i] for group in self.parts[0] for i in self.members[group]]
        scale = late_scale(self.objective.aggregate, self.count, sum(row.completion_length for row in rows))
        ends = np.cumsum([0, *map(len, self._learned)])
        order = [list(range(a, b)) for a, b in pairwise(ends)]
        ids = [i for part in self._learned for i in part]
        return _Step(ids, order, self._gradient.batches, self._gradient.done(scale))

    def _loss(self, on_policy: bool) -> Loss:
        return partial(policy_loss, objective=self.objective, temperature=self.temperature, on_policy=on_policy)

    def _keep(self, parts: Sequence[list[int]], batches: Sequence[PackedBatch], values: Sequence[Tensor], name) -> None:
        """Per-token values of micro-batches of the rows `parts`, as the rows' stream `name`."""
        for ids, batch, value in zip(parts, batches, values, strict=True):
            for i, own in zip(ids, unpack([value], [batch], [list(range(len(ids)))]), strict=True):
                self.rows[i] = replace(self.rows[i], **{name: own})

    # -- which rows go together ----------------------------------------------------------------------------------------

    def _tokens(self) -> int:
        return min(self.micro_batch_tokens, self.learner.room.limit or self.micro_batch_tokens)

    def _shares(self, rows: Sequence[Row]) -> bool:
        """Whether the prompts of these rows are laid down once a group."""
        if self.share != "auto":
            return self.share == "always"
        return 1 - shared_tokens(rows) / max(1, sum(row_lengths(rows))) >= SAVED

    def _packed(self, rows: Sequence[Row], weights) -> tuple[list[list[int]], list[PackedBatch]]:
        """All of them at once, best fit: the order of `plan_rows` and its micro-batches."""
        shared = self._shares(rows)
        order = plan_rows(rows, self._tokens(), shared)
        return order, pack(rows, weights, self.micro_batch_tokens, self.learner.model.device, order, shared)

    # -- the optimizer steps -------------------------------------------------------------------------------------------

    def correct(self, old_logprobs: OldLogprobs, bound: float) -> bool:
        """Truncated importance sampling: the advantage of a token times min(pi_learner / pi_sampler, C), the old
        log-probs being the learner's (Yao et al. 2025). The weights must be known before the first loss, so `auto`
        looks at one micro-batch first, and recomputes only where that is out of bound. Returns whether it did."""
        live = [i for i, alive in enumerate(self.live) if alive]
        if not live:
            return False
        if old_logprobs == "auto":
            rows = [self.rows[i] for i in live]
            probe = [live[at] for at in plan_rows(rows, self._tokens(), self._shares(rows))[0]]
            self._measure(probe, self._log_probs(self.learner.model, probe))
            if self.difference[0] <= bound:
                return False
        sampled = {i: np.asarray(self.rows[i].old_logprobs) for i in live}
        self._recompute(live)
        for i in live:
            ratio = np.exp(self.rows[i].old_logprobs - sampled[i])
            self.rows[i] = replace(self.rows[i], correction=np.minimum(ratio, self.objective.truncated_is))
        return True

    def step(self, part: list[int]) -> _Step:
        """The gradient of the groups `part`, after the first step; `apply` then moves the weights."""
        members = [i for group in part for i in self.members[group]]
        weights = loss_weights([self.rows[i] for i in members], self.objective.aggregate, self.max_tokens)
        kept = [at for at, i in enumerate(members) if self.live[i]]
        ids = [members[at] for at in kept]
        if self.reference is not None:
            unknown = [i for i in ids if self.rows[i].ref_logprobs is None]
            for i, values in zip(unknown, self._log_probs(self.reference, unknown), strict=True):
                self.rows[i] = replace(self.rows[i], ref_logprobs=values)
        order, batches = self._packed([self.rows[i] for i in ids], weights[kept])
        return _Step(ids, order, batches, self.learner.accumulate(batches, self._loss(on_policy=False)))

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
            order, batches = self._packed(rows, None)
            return unpack(log_probs(model, batches, self.temperature, self.learner.room), batches, order)

    def _measure(self, ids: Sequence[int], values: Sequence[np.ndarray]) -> None:
        gaps = np.abs(np.concatenate(values) - np.concatenate([np.asarray(self.rows[i].old_logprobs) for i in ids]))
        self.difference = (float(gaps.mean()), float(gaps.max()))

    def result(self) -> PolicyUpdate:
        trained = sum(any(self.live[i] for i in members) for members in self.members.values())
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


def train_policy(
    learner: Learner,
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    *,
    order: Sequence[int] | None = None,
    **settings: Any,
) -> PolicyUpdate:
    """All optimizer steps over `groups`; `settings` are those of PolicyLearning.

    order: in which the groups count as having finished; that of the list where None."""
    learning = PolicyLearning(learner, [len(group.rollouts) for group in groups], objective, **settings)
    for index in range(len(groups)) if order is None else order:
        learning.add(index, groups[index])
    return learning.finish()
