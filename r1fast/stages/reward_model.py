"""A reward model for prompts that no rule can score: Bradley-Terry on preference pairs for helpfulness, logistic on
single responses for safety (DeepSeek-R1, 'Model rewards'), and the rewards `preference` and `safety` that ask it in
RL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from r1fast.learn.preference import (
    pairwise_loss,
    pairwise_steps,
    pointwise_loss,
    pointwise_steps,
    preference_step,
    score,
)
from r1fast.metrics import PhaseTimer
from r1fast.model.reward_model import RewardModel
from r1fast.model.tensor_parallel import peers
from r1fast.model.tokenizer import apply_templates, encode_completions
from r1fast.model.weights import load_reward_model, save_reward_model
from r1fast.rewards.layout import tagged_answer
from r1fast.stages.context import StageOutcome
from r1fast.stages.fitting import announce, fit
from r1fast.stages.inputs import spread, start_model
from r1fast.stages.steps import PolicyState, Steps
from r1fast.stages.supervised import SupervisedLog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from r1fast.schema import RewardModelStage
    from r1fast.stages.context import StageContext
    from r1fast.types import Preference, RolloutGroup

HELD_OUT = 200  # pairs of the test split that the finished model is measured on


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward model reads a response: the tokens that are scored, the same in training and in use."""

    tokenizer: object
    part: Literal["answer", "response"]

    def read(self, completion: str) -> str:
        if self.part == "response":
            return completion
        answer = tagged_answer(completion)
        return completion if answer is None else answer  # a response without a tagged answer is read whole

    def tokens(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        """Each prompt through the template, then what is read of its completion, without the end token: transformers
        would take a pad there for what is to be scored."""
        heads = apply_templates(self.tokenizer, prompts)
        tails = encode_completions(self.tokenizer, [self.read(text) for text in completions])
        return [[*head, *tail[:-1]] for head, tail in zip(heads, tails, strict=True)]

    def pairs(self, preferences: Sequence[Preference]) -> list[tuple[list[int], list[int]]]:
        """(chosen, rejected) of each preference."""
        prompts = [p.prompt for p in preferences]
        chosen = self.tokens(prompts, [p.chosen for p in preferences])
        return list(zip(chosen, self.tokens(prompts, [p.rejected for p in preferences]), strict=True))


class PreferenceReward:
    """The rewards `preference` and `safety`: sigmoid of the score, so that it weighs like a rule's 0..1; of a pointwise
    model that is the probability of a safe response."""

    def __init__(self, model: RewardModel, reading: Reading):
        self._model, self._reading = model, reading

    @classmethod
    def load(cls, ctx: StageContext, stage: str) -> PreferenceReward:
        """The reward model that the recipe's stage `stage` trained, frozen."""
        folder, how = ctx.artifacts[stage] / "checkpoint", {"device": ctx.device, "dtype": ctx.dtype}
        model, tokenizer = load_reward_model(folder, **how, tensor=peers())
        model.requires_grad_(False)
        return cls(model, Reading(tokenizer, ctx.recipe.stages[stage].scores))

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float]]:
        """Values in (0, 1), [groups][rollouts]."""
        prompts = [g.prompt.text for g in groups for _ in g.rollouts]
        texts = self._reading.tokens(prompts, [r.text for g in groups for r in g.rollouts])
        values = iter(torch.sigmoid(torch.tensor(score(self._model, texts))).tolist())
        return [[next(values) for _ in g.rollouts] for g in groups]


def accuracy(model: RewardModel, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of pairs whose chosen side scores higher."""
    scores = score(model, [side for pair in pairs for side in pair])
    return sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(pairs)


def run(ctx: StageContext) -> StageOutcome:
    stage: RewardModelStage = ctx.stage
    policy, tokenizer = start_model(ctx, stage.from_, spreads=True)
    model = RewardModel.from_decoder(policy, ctx.seed)
    del policy  # of which that is a copy
    spread(ctx, model)
    reading, task = Reading(tokenizer, stage.scores), ctx.tasks[stage.task]
    pairs = reading.pairs(task.preferences("train", stage.pairs, ctx.seed))
    held_out = reading.pairs(task.preferences("test", HELD_OUT, ctx.seed))
    steps = max(1, math.ceil(stage.epochs * len(pairs) / stage.batch_pairs))
    learner, plan = fit(ctx, model, model.config, steps)
    ctx.progress.stage(ctx.name, "reward_model", steps)
    announce(ctx, learner, plan)
    log, timer = SupervisedLog(ctx, steps), PhaseTimer()
    loop = Steps(ctx, steps, {"model": PolicyState(model), "learner": learner, "log": log}, timer)
    how = {"steps": steps, "first": loop.done, "seed": ctx.seed, "device": ctx.device}
    how["micro_batch_tokens"] = learner.micro_batch_tokens
    if stage.objective == "pairwise":
        loss, batches = pairwise_loss, pairwise_steps(pairs, batch_pairs=stage.batch_pairs, **how)
    else:
        sides, labels = [side for pair in pairs for side in pair], [1.0, 0.0] * len(pairs)
        loss, batches = pointwise_loss, pointwise_steps(sides, labels, batch_responses=2 * stage.batch_pairs, **how)
    for step, batch in zip(loop, batches, strict=True):
        with timer("learn"):
            stats, right = preference_step(learner, batch, loss)
        log.step(step, stats, timer, accuracy=right)
    save_reward_model(model, tokenizer, ctx.directory / "checkpoint")
    found = accuracy(model, held_out)
    return StageOutcome(
        stats={"pairs": len(pairs), "steps": steps, "held_out_accuracy": found, "held_out_pairs": len(held_out)},
        note=f"{len(pairs):,} pairs; orders {found:.1%} of {len(held_out)} held-out pairs right",
    )
