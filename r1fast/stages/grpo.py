"""Reinforcement learning with group-relative advantages: R1-Zero, reasoning RL and RL for all scenarios are this one
loop with other prompts and rewards.

A step: take prompts, sample a group for each, score, turn rewards into advantages, learn. The sampler and the learner
hold the same model object, so there are no weights to sync; `weights_version` says which weights a group came from.
"""

from __future__ import annotations

import shutil
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from r1fast.config import UserError
from r1fast.heap import give_back_holes
from r1fast.learn.advantages import informative
from r1fast.learn.losses import policy_loss
from r1fast.metrics import PhaseTimer
from r1fast.model.decoder import Decoder
from r1fast.model.lora import BasePolicy, add_adapters, merged
from r1fast.model.sharding import gathered
from r1fast.model.weights import clone, copy_weights
from r1fast.rewards.scoring import count_errors
from r1fast.stages.alarms import Alarms
from r1fast.stages.best import Best, keep_best
from r1fast.stages.context import StageOutcome
from r1fast.stages.drawing import Draws
from r1fast.stages.evaluate import SEED, Evaluator, evaluate_stage, log_sample
from r1fast.stages.fitting import announce, fit, keep
from r1fast.stages.inputs import sampler_for, spread, start_model
from r1fast.stages.journal import Journal
from r1fast.stages.reward_model import PreferenceReward
from r1fast.stages.steps import PolicyState, RandomState, Steps

if TYPE_CHECKING:
    from r1fast.learn.policy import PolicyLearning, PolicyUpdate
    from r1fast.schema import GRPOStage
    from r1fast.stages.context import StageContext
    from r1fast.stages.drawing import Drawn
    from r1fast.stages.steps import Stateful

ROLLOUTS = "rollouts"  # the journal, while the stage runs
SAMPLED_LINES = 2  # training samples a logged step writes to samples.jsonl


class GRPOStageRun:
    """One stage's loop, split by phase: draw (sample and score), learn, report."""

    def __init__(self, ctx: StageContext):
        self.ctx, self.stage = ctx, ctx.stage
        stage: GRPOStage = ctx.stage
        self.model, self.tokenizer = start_model(ctx, stage.from_, spreads=True)
        self.reference = self._reference()
        for model in (self.model, self.reference):
            if isinstance(model, Decoder):
                spread(ctx, model)
        self.sampler = sampler_for(self.model, self.tokenizer)
        steps, together = stage.steps * stage.mini_batches * stage.epochs, stage.prompts_per_step * stage.group_size
        together = min(together, self.sampler.max_seqs)
        self.learner, self.plan = fit(ctx, self.model, self.model.config, steps, together)
        self.random = Random(ctx.seed)
        self.timer = PhaseTimer()
        self.journal = Journal(ctx.directory / ROLLOUTS)
        trained = self._trained_rewards()
        self.draws = Draws(ctx, self.model, self.tokenizer, self.sampler, trained, self.journal, self.timer)
        if all(s.first_step > 0 for s in self.draws.sources):
            raise UserError(f"stage {ctx.name!r}: no entry of its mix is active at the first step; give one start: 0")
        self.alarms = Alarms(stage.logprob_bound)
        self.loop = Steps(ctx, stage.steps, self._state(), self.timer, Best.of(ctx))

    def _state(self) -> dict[str, Stateful]:
        """All that the steps to come depend on."""
        state = {"model": PolicyState(self.model), "learner": self.learner, "random": RandomState(self.random)}
        state |= {"alarms": self.alarms, "lengths": self.draws.lengths}
        if isinstance(self.reference, Decoder):
            state["reference"] = PolicyState(self.reference)
        return {**state, **{f"prompts {i}": source.stream for i, source in enumerate(self.draws.sources)}}

    def _reference(self) -> Decoder | BasePolicy | None:
        """What KL is measured to: a copy of the start, or the model without the adapters that it gets here."""
        kl = self.stage.objective.kl_coef > 0
        if self.stage.adapters is not None:
            add_adapters(self.model, self.stage.adapters, self.ctx.seed)
            return BasePolicy(self.model) if kl else None
        return clone(self.model) if kl else None

    def _trained_rewards(self) -> dict[str, PreferenceReward]:
        """The rewards that ask a model, by kind."""
        named = {"preference": self.stage.reward_model, "safety": self.stage.safety_model}
        return {kind: PreferenceReward.load(self.ctx, stage) for kind, stage in named.items() if stage is not None}

    # -- learn and report -----------------------------------------------------------------------------------------

    def learning(self) -> PolicyLearning:
        """A step's learning, before its groups are there."""
        stage = self.stage
        return self.learner.policy_learning(
            [stage.group_size] * stage.prompts_per_step,
            stage.objective,
            reference=self.reference,
            old_logprobs=stage.old_logprobs,
            logprob_bound=stage.logprob_bound,
            mini_batches=stage.mini_batches,
            epochs=stage.epochs,
            micro_batch_tokens=self.learner.micro_batch_tokens,
            share_prompts=stage.share_prompts,
            temperature=stage.sampling.temperature,
            max_tokens=stage.sampling.max_tokens,
            random=self.random,
            timer=PhaseTimer() if self.draws.when == "beside" else self.timer,  # a timer is one thread's
        )

    def step(self, step: int) -> dict[str, Any]:
        """Step number `step`, from 1: draw, learn, report. Returns what the log was told."""
        learning = self.learning()
        with merged(self.model):
            drawn = self.draws.draw(step - 1, learning)
        learning.timer = self.timer
        update = learning.finish()
        self.learner.forget()  # the gradient: the sampler has its room
        if self.ctx.device == "cpu":
            give_back_holes()
        return self.report(step, drawn, update)

    def _drafts(self) -> dict[str, Any]:
        """Of the last call of the sampler: guessed tokens, how many were right, and the steps it took."""
        told = self.sampler.acceptance
        if told is None:
            return {}
        return {
            "draft_tokens": told.drafted,
            "draft_acceptance": told.rate,
            "decode_steps": told.steps + told.plain_steps,
        }

    def report(self, step: int, drawn: Drawn, update: PolicyUpdate) -> dict[str, Any]:
        rollouts = [r for g in drawn.sampled for r in g.rollouts]
        kinds = sorted({kind for r in rollouts for kind in r.rewards})
        by_kind = {}
        for kind in kinds:
            values = [r.rewards[kind] for r in rollouts if kind in r.rewards]
            by_kind[kind] = sum(values) / len(values)
        phases = self.timer.take(other=True)
        tokens = sum(len(r.tokens) for r in rollouts)
        length = tokens / len(rollouts)
        reward = sum(r.reward for r in rollouts) / len(rollouts)
        numbers = {
            "reward": reward,
            "pass_rate": by_kind.get("accuracy"),
            "response_length": length,
            "kl": update.kl,
            "entropy": update.entropy,
        }
        event = dict(
            event="step",
            stage=self.ctx.name,
            kind="grpo",
            step=step,
            steps=self.stage.steps,
            phase_seconds=phases,
            overlap_seconds=drawn.overlap,
            tokens=tokens,
            tokens_per_second=tokens / max(sum(phases.values()), 1e-9),
            rewards=by_kind,
            truncated=sum(r.finish == "length" for r in rollouts) / len(rollouts),
            rollouts=len(rollouts),
            errors=sum(bool(r.errors) for r in rollouts),
            failures=count_errors(drawn.sampled),
            groups_sampled=len(drawn.sampled),
            groups_trained=sum(informative(g) for g in drawn.groups),
            sampling_rounds=drawn.rounds,
            clip_fraction=update.clip_fraction,
            grad_norm=update.grad_norm,
            loss=update.loss,
            learning_rate=update.learning_rate,
            **self._drafts(),
            logprob_difference_mean=update.logprob_difference_mean,
            logprob_difference_max=update.logprob_difference_max,
            old_logprobs=update.old_logprobs,
            **numbers,
        )
        self.ctx.log.event(**event)
        self.ctx.progress.update(step, **{k: v for k, v in numbers.items() if v is not None})
        for group in drawn.sampled[:SAMPLED_LINES]:
            log_sample(self.ctx, step, "train", group)
        for alarm in self.alarms.look(event):
            self.ctx.log.event(event="alarm", stage=self.ctx.name, name=alarm.name, step=step, text=alarm.text)
            self.ctx.progress.warn(f"{self.ctx.name}, step {step}: {alarm.text}")
        return event

    def curve(self, step: int) -> float:
        """A point of the curves, on validation problems: test problems are kept for the stage table. Returns pass@1."""
        protocol = self.ctx.recipe.evaluation
        task = self.ctx.tasks[protocol.task or next(iter(self.ctx.tasks))]
        problems = task.problems("validation", protocol.curve_limit, SEED)
        with self.timer("evaluate"), merged(self.model), gathered(self.model):
            evaluator = Evaluator.of(self.ctx, self.model, self.tokenizer, self.sampler)
            got = evaluator.measure(task, problems, protocol.sampling, protocol.curve_samples)
        self.ctx.log.event(
            **{"event": "curve", "stage": self.ctx.name, "step": step, "k": protocol.curve_samples},
            **{"pass@1": got.pass_at_1, "cons@k": got.consensus, "length": got.length},
            format=got.mean("format"),
            language=got.mean("language"),
            seconds=self.timer.take().get("evaluate", 0.0),
        )
        return got.pass_at_1

    def refresh_reference(self, step: int) -> None:
        """R1 replaces the reference by the policy every 400 steps, so that KL bounds the pace and not the distance."""
        every = self.stage.reference_refresh
        if isinstance(self.reference, Decoder) and every and step % every == 0:
            copy_weights(self.model, self.reference)


def run(ctx: StageContext) -> StageOutcome:
    loop = GRPOStageRun(ctx)
    stage: GRPOStage = ctx.stage
    ctx.progress.stage(ctx.name, "grpo", stage.steps)
    announce(ctx, loop.learner, loop.plan, partial(policy_loss, objective=stage.objective, on_policy=True))
    if stage.evaluate_every and not loop.loop.done:
        loop.curve(0)
    for step in loop.loop:
        loop.loop.best.rewarded(step, loop.step(step)["reward"])
        loop.refresh_reference(step)
        if stage.evaluate_every and step % stage.evaluate_every == 0:
            loop.loop.best.measured(step, loop.curve(step))
        loop.journal.forget(loop.loop.saved)
    best = keep_best(ctx, loop.loop, loop.model, loop.tokenizer)
    keep(ctx, loop.model, loop.tokenizer)
    shutil.rmtree(loop.journal.directory, ignore_errors=True)
    return StageOutcome(
        stats={"steps": stage.steps, "rollouts_per_step": stage.prompts_per_step * stage.group_size, **best},
        evaluation=evaluate_stage(ctx, loop.model, loop.tokenizer, stage.steps, loop.sampler),
        note=f"{stage.steps} steps of {stage.prompts_per_step} prompts x {stage.group_size} samples",
    )
