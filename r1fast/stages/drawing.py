"""The groups of an RL step: prompts of every source, sampled, scored, and given to the learner as they finish."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from r1fast import rewards
from r1fast.config import UserError
from r1fast.learn.advantages import informative
from r1fast.model.sharding import gathered
from r1fast.parallel import world
from r1fast.rewards.length import overlong_penalty
from r1fast.rewards.scoring import score, stop_above
from r1fast.stages.inputs import PromptStream, sampling_params, with_texts
from r1fast.stages.lengths import Lengths, mean_lengths
from r1fast.stages.overlap import Feed, Scoring, When

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1fast.learn.policy import PolicyLearning
    from r1fast.metrics import PhaseTimer
    from r1fast.model.decoder import Decoder
    from r1fast.rollout.sampler import Sampler, SamplingParams
    from r1fast.schema import GRPOStage, MixEntry
    from r1fast.stages.context import StageContext
    from r1fast.stages.journal import Journal
    from r1fast.stages.reward_model import PreferenceReward
    from r1fast.types import Prompt, RolloutGroup


@dataclass(slots=True)
class Source:
    """A mix entry with its endless prompts."""

    entry: MixEntry
    stream: PromptStream
    first_step: int


@dataclass(slots=True)
class Drawn:
    """The groups of one step and what it took to get them."""

    groups: list[RolloutGroup] = field(default_factory=list)
    sampled: list[RolloutGroup] = field(default_factory=list)  # before dynamic sampling dropped any: what is reported
    rounds: int = 0
    overlap: dict[str, float] = field(default_factory=lambda: {"score": 0.0, "learn": 0.0})
    # seconds of either in which nobody waited for it


def shares(sources: list[Source], step: int, count: int) -> list[int]:
    """Prompts of each source at `step`: proportional to the shares of the active ones, summing to `count` exactly."""
    active = [s.entry.share if step >= s.first_step else 0.0 for s in sources]
    total = sum(active)
    exact = [count * a / total for a in active]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts


class Draws:
    """What a stage draws its groups with."""

    def __init__(
        self,
        ctx: StageContext,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        trained: Mapping[str, PreferenceReward],
        journal: Journal,
        timer: PhaseTimer,
    ) -> None:
        """trained: the rewards that ask a model, by kind."""
        self.ctx, self.model, self.tokenizer, self.sampler = ctx, model, tokenizer, sampler
        self.trained, self.journal, self.timer, self.lengths = trained, journal, timer, Lengths()
        self.stage: GRPOStage = ctx.stage
        self.sources = [self._source(i, entry) for i, entry in enumerate(self.stage.mix)]
        self.aside = not trained and any(self._waits(source.entry) for source in self.sources)
        if self.stage.overlap == "always" and (ranks := world().everyone.size) > 1:
            raise UserError(f"stages.{ctx.name}: overlap=always is for a single process, here are {ranks}")
        self.early = early(self.stage)
        self.when = way(self.stage, ctx.device)

    def _source(self, index: int, entry: MixEntry) -> Source:
        task = self.ctx.tasks[entry.task]
        first = round(entry.start * self.stage.steps)
        share = entry.share / sum(e.share for e in self.stage.mix if e.start <= entry.start)
        count = round(share * self.stage.prompts_per_step * (self.stage.steps - first)) + self.stage.prompts_per_step
        if self.stage.dynamic_sampling:
            count *= self.stage.dynamic_rounds
        stream = PromptStream(self.ctx, task, self.tokenizer, self.stage.sampling, count, self.ctx.seed + 7 * index)
        return Source(entry, stream, first)

    def _waits(self, entry: MixEntry) -> bool:
        """Whether one of its rewards is judged by other processes."""
        verifier = self.ctx.tasks[entry.task].verifier
        kinds = [verifier if kind == "accuracy" else kind for kind in entry.rewards]
        return any(not rewards.get(kind).cheap for kind in kinds)

    def draw(self, step: int, learning: PolicyLearning) -> Drawn:
        """Groups of one step. With dynamic sampling, groups whose rewards are all equal are replaced by fresh ones,
        at most `dynamic_rounds` times (DAPO section 3.2); what is still missing then is made up of the dropped.

        `learning` is given every group, in the order in which they finished where there is one."""
        drawn = Drawn()
        spare: list[RolloutGroup] = []
        want = self.stage.prompts_per_step
        while True:
            fresh = self._round(step, want - len(drawn.groups), drawn, learning)
            drawn.sampled += fresh
            drawn.rounds += 1
            if not self.stage.dynamic_sampling:
                drawn.groups = fresh
                return drawn
            drawn.groups += [g for g in fresh if informative(g)]
            spare += [g for g in fresh if not informative(g)]
            if len(drawn.groups) >= want or drawn.rounds >= self.stage.dynamic_rounds:
                drawn.groups += spare[: want - len(drawn.groups)]
                for index, group in enumerate(drawn.groups):
                    learning.add(index, group)
                return drawn

    def _round(self, step: int, count: int, drawn: Drawn, learning: PolicyLearning) -> list[RolloutGroup]:
        """Groups of `count` prompts, sampled and scored, or from the journal, in the order of the prompts."""
        prompts: list[Prompt] = []
        owner: list[Source] = []
        for source, number in zip(self.sources, shares(self.sources, step, count), strict=True):
            prompts += source.stream.take(number)
            owner += [source] * number
        known = world().on_first(lambda: self.journal.read(step, drawn.rounds, prompts))
        groups, order = known or self._sample(step, drawn, prompts, owner, learning)
        self.lengths.seen(prompts, mean_lengths(groups))
        if not self.stage.dynamic_sampling and (known or not self.early):
            for index in order:
                learning.add(index, groups[index])
        return groups

    def _sample(
        self, step: int, drawn: Drawn, prompts: list[Prompt], owner: list[Source], learning: PolicyLearning
    ) -> tuple[list[RolloutGroup], list[int]]:
        """Scored groups, and the order in which they finished; of several ranks, that of the prompts."""
        began = time.monotonic()
        params = self._params(prompts, (self.ctx.seed * 1_000_003 + step * 101 + drawn.rounds) % 2**62)
        order = list(range(len(prompts)))
        learn = partial(learning.add, now=True) if self.early else lambda index, group: None

        def draw(own: list[int]) -> list[RolloutGroup]:
            def scored(indices: list[int], groups: list[RolloutGroup]) -> list[RolloutGroup]:
                return self._score([owner[own[i]] for i in indices], groups)

            before = self.timer.seconds.get("score", 0.0)
            with Scoring(scored, self.aside) as scoring:
                feed = Feed(learn, scoring, self.when, self.ctx.device, self.timer)
                failed = None
                try:
                    self._sample_own([prompts[i] for i in own], [params[i] for i in own], scoring, feed)
                except Exception as error:  # peers of the one that scores wait for it
                    failed = error
                groups = world().of_peers(lambda: [scoring.result(i) for i in range(len(own))], failed)
            waited = self.timer.seconds.get("score", 0.0) - before + feed.waited.get("score", 0.0)
            drawn.overlap["score"] += max(0.0, scoring.seconds - waited)
            drawn.overlap["learn"] += max(0.0, feed.seconds - feed.waited.get("learn", 0.0))
            if world().everyone.size == 1:
                order[:] = feed.order
            return groups

        self.sampler.forget()  # or log-probs would depend, in their last bits, on what was sampled before
        with gathered(self.model):
            groups = world().map(range(len(prompts)), draw, self.lengths.costs(prompts, self.stage.group_size))
        stop_above(groups, self.ctx.recipe.rewards.max_failures)
        if world().first and time.monotonic() - began >= self.ctx.recipe.checkpoint.rollout_seconds:
            self.journal.write(step, drawn.rounds, groups, order)
        return groups, order

    def _sample_own(self, prompts: list[Prompt], params: list[SamplingParams], scoring: Scoring, feed: Feed) -> None:
        """Draws the groups. Each is scored as it finishes; all together, where a model is asked."""
        waiting: list[tuple[int, RolloutGroup]] = []

        def score() -> None:
            with self.timer("score"):
                scoring.add(waiting)
            waiting.clear()

        def finished(index: int, group: RolloutGroup) -> None:
            waiting.append((index, with_texts(group, self.tokenizer)))
            if not self.trained:
                score()
            feed.finished(index)

        with self.timer("sample"):
            self.sampler.sample(prompts, params, on_group=finished)
            if self.ctx.device == "cpu":  # of the next weights nothing in it is true, and the learner needs the room
                self.sampler.release()
        score()
        with self.timer("learn" if self.when == "beside" else "score"):
            feed.rest()

    def _params(self, prompts: list[Prompt], seed: int) -> list[SamplingParams]:
        """One for each prompt: a prompt that comes again has a seed of its own, whichever ranks draw the two."""
        turns: Counter[tuple[int, ...]] = Counter()
        found = []
        for prompt in prompts:
            found.append(sampling_params(self.stage.sampling, self.stage.group_size, seed + turns[prompt.tokens] * 31))
            turns[prompt.tokens] += 1
        return found

    def _score(self, owner: list[Source], groups: list[RolloutGroup]) -> list[RolloutGroup]:
        scored: list[RolloutGroup | None] = [None] * len(groups)
        for source in self.sources:
            mine = [i for i, o in enumerate(owner) if o is source]
            if not mine:
                continue
            task = self.ctx.tasks[source.entry.task]
            own = [groups[i] for i in mine]
            given = {kind: ask(own) for kind, ask in self.trained.items() if kind in source.entry.rewards}
            if not world().speaks_for_peers:  # who hears of the scores from the one that does
                continue
            result = score(own, source.entry.rewards, task.verifier, pool=self.ctx.pool, given=given)
            for i, group in zip(mine, result, strict=True):
                scored[i] = self._shape(group)
        return scored

    def _shape(self, group: RolloutGroup) -> RolloutGroup:
        if self.stage.overlong is None:
            return group
        limit, window = self.stage.sampling.max_tokens, self.stage.overlong.window
        rollouts = []
        for r in group.rollouts:
            penalty = overlong_penalty(len(r.tokens), limit, window)
            rollouts.append(replace(r, reward=r.reward + penalty, rewards={**r.rewards, "overlong": penalty}))
        return replace(group, rollouts=rollouts)


def early(stage: GRPOStage) -> bool:
    """Whether groups can be learned from before all are there. Of several ranks each would have to wait for the others;
    which groups dynamic sampling keeps is known at the end; and adapters are merged while the sampler runs."""
    alone = world().everyone.size == 1
    return stage.overlap != "never" and alone and not stage.dynamic_sampling and stage.adapters is None


def way(stage: GRPOStage, device: str) -> When:
    """When the learner is given what is ready: a CPU has no core to spare beside the sampler."""
    if stage.overlap != "always":
        return "after"
    return "beside" if device == "cuda" else "between"
