"""What a checkpoint can do, by the paper's protocol: k samples a problem at T = 0.6 and top-p 0.95, pass@1 as their
mean, cons@k by majority, with format, language consistency and length beside it. Stages, curves and the command
`python -m r1fast.evaluate` all measure here, so that their numbers mean the same thing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1fast import rewards
from r1fast.rewards.scoring import score
from r1fast.stages.context import StageOutcome
from r1fast.stages.inputs import encode_problems, sample_texts, sampler_for, sampling_params, start_model
from r1fast.stages.measures import bootstrap_interval, consensus, pass_at_1

if TYPE_CHECKING:
    from r1fast.rollout.sampler import Sampler
    from r1fast.schema import EvaluateStage, EvaluationConfig, SamplingConfig
    from r1fast.stages.context import StageContext
    from r1fast.tasks import Task
    from r1fast.types import Problem, RolloutGroup

SHOWN = 8  # problems whose first sample goes to samples.jsonl: the first of the split, not chosen
GENERAL_SAMPLES = 2  # samples of each general prompt; its measures are shares over all of them
SEED = 20_501  # evaluation noise is the same for every stage, so that stages differ by their weights alone


@dataclass(frozen=True, slots=True)
class Measured:
    """One sampled and scored set of problems."""

    groups: list[RolloutGroup]
    correct: list[list[float]]  # [problems][samples]
    answers: list[list[str | None]]

    @property
    def pass_at_1(self) -> float:
        return pass_at_1(self.correct)

    @property
    def consensus(self) -> float:
        return consensus(self.answers, self.correct)

    def mean(self, kind: str) -> float:
        values = [r.rewards[kind] for g in self.groups for r in g.rollouts if kind in r.rewards]
        return sum(values) / len(values) if values else float("nan")

    @property
    def length(self) -> float:
        lengths = [len(r.tokens) for g in self.groups for r in g.rollouts]
        return sum(lengths) / len(lengths)

    @property
    def truncated(self) -> float:
        cut = [r.finish == "length" for g in self.groups for r in g.rollouts]
        return sum(cut) / len(cut)

    @property
    def errors(self) -> int:
        return sum(bool(r.errors) for g in self.groups for r in g.rollouts)


class Evaluator:
    """One model under the protocol; the sampler's buffers are kept between its calls."""

    def __init__(self, model, tokenizer, tasks: Mapping[str, Task], max_length: int, pool=None, sampler=None):
        self.tokenizer, self.tasks, self.max_length, self.pool = tokenizer, tasks, max_length, pool
        self.sampler: Sampler = sampler or sampler_for(model, tokenizer)

    @classmethod
    def of(cls, ctx: StageContext, model, tokenizer, sampler: Sampler | None = None) -> Evaluator:
        return cls(model, tokenizer, ctx.tasks, ctx.recipe.model.max_length, ctx.pool, sampler)

    def sample(self, problems: list[Problem], sampling: SamplingConfig, n: int) -> list[RolloutGroup]:
        prompts = encode_problems(problems, self.tokenizer, self.max_length, sampling)
        return sample_texts(self.sampler, prompts, sampling_params(sampling, n, SEED), self.tokenizer)

    def measure(self, task: Task, problems: list[Problem], sampling: SamplingConfig, n: int) -> Measured:
        """Samples and scores: accuracy by the task's verifier; format and language beside it."""
        kinds = {"accuracy": 1.0, "format": 0.0, "language": 0.0}
        groups = score(self.sample(problems, sampling, n), kinds, task.verifier, pool=self.pool)
        extract = rewards.get(task.verifier).extract
        return Measured(
            groups,
            correct=[[r.rewards.get("accuracy", 0.0) for r in g.rollouts] for g in groups],
            answers=[[extract(r.text) for r in g.rollouts] for g in groups],
        )

    def measure_general(
        self, task: Task, limit: int, sampling: SamplingConfig
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Shares that the task itself defines (helpfulness, refusal), over held-out prompts, and the samples."""
        values: dict[str, list[float]] = defaultdict(list)
        groups = self.sample(task.problems("test", limit, SEED), sampling, GENERAL_SAMPLES)
        for group in groups:
            for rollout in group.rollouts:
                for name, value in task.measure(group.prompt.meta, rollout.text).items():
                    values[name].append(value)
        return {name: sum(v) / len(v) for name, v in sorted(values.items())}, groups

    def evaluate(self, protocol: EvaluationConfig) -> tuple[dict, Measured, list[RolloutGroup]]:
        """The whole protocol on the test split: its numbers, the samples at the protocol's own temperature, and those
        of the general task."""
        began = time.perf_counter()
        task = self.tasks[protocol.task or next(iter(self.tasks))]
        problems = task.problems("test", protocol.limit, SEED)
        main = self.measure(task, problems, protocol.sampling, protocol.samples)
        low, high = bootstrap_interval([sum(row) / len(row) for row in main.correct])
        at_one = greedy = None
        if protocol.at_one:
            plain = protocol.sampling.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": 0})
            at_one = self.measure(task, problems, plain, protocol.at_one).pass_at_1
        if protocol.greedy:
            cold = protocol.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0, "top_k": 0})
            greedy = self.measure(task, problems, cold, 1).pass_at_1
        general, general_groups = {}, []
        if protocol.general is not None:
            task_general = self.tasks[protocol.general]
            general, general_groups = self.measure_general(task_general, protocol.limit, protocol.sampling)
        result = {
            "task": task.name,
            "problems": len(problems),
            "samples": protocol.samples,
            "k": protocol.samples,
            "pass@1": main.pass_at_1,
            "pass@1_low": low,
            "pass@1_high": high,
            "cons@k": main.consensus,
            "pass@1_t1": at_one,
            "greedy": greedy,
            "format": main.mean("format"),
            "language": main.mean("language"),
            "length": main.length,
            "truncated": main.truncated,
            "errors": main.errors,
            "seconds": time.perf_counter() - began,
            "general": general,
        }
        return result, main, general_groups


def log_sample(ctx: StageContext, step: int, moment: str, group: RolloutGroup) -> None:
    """The first sample of a group, as a line of samples.jsonl. `moment`: "evaluation" or "train"."""
    rollout = group.rollouts[0]
    ctx.log.sample(
        stage=ctx.name,
        step=step,
        moment=moment,
        prompt=group.prompt.text,
        answer=group.prompt.answer,
        completion=rollout.text,
        reward=rollout.reward,
        rewards=dict(rollout.rewards),
        finish=rollout.finish,
    )


def log_evaluation(ctx: StageContext, step: int, result: dict, shown: list[RolloutGroup]) -> None:
    """The evaluation as a line of metrics.jsonl, and a sample of each shown group."""
    ctx.log.event(event="evaluation", stage=ctx.name, step=step, **result)
    for group in shown:
        log_sample(ctx, step, "evaluation", group)


def evaluate_stage(ctx: StageContext, model, tokenizer, step: int, sampler: Sampler | None = None) -> dict | None:
    """The evaluation that follows a stage, where the stage asks for it."""
    if not ctx.stage.evaluate:
        return None
    ctx.progress.note("evaluating")
    result, main, general = Evaluator.of(ctx, model, tokenizer, sampler).evaluate(ctx.recipe.evaluation)
    log_evaluation(ctx, step, result, main.groups[:SHOWN] + general[:SHOWN])
    return result


def run(ctx: StageContext) -> StageOutcome:
    """The stage kind `evaluate`."""
    stage: EvaluateStage = ctx.stage
    model, tokenizer = start_model(ctx, stage.from_)
    ctx.progress.stage(ctx.name, "evaluate", 1)
    protocol = stage.protocol or ctx.recipe.evaluation
    result, main, general = Evaluator.of(ctx, model, tokenizer).evaluate(protocol)
    log_evaluation(ctx, 0, result, main.groups[:SHOWN] + general[:SHOWN])
    return StageOutcome(stats={"pass@1": result["pass@1"], "cons@k": result["cons@k"]}, evaluation=result)
