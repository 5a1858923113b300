"""What a checkpoint can do, by the paper's protocol: k samples a problem at T = 0.6 and top-p 0.95, pass@1 as their
mean, pass@k, cons@k by majority, with format, language consistency and length beside it. Stages, curves and the
command `python -m r1fast.evaluate` all measure here, so that their numbers mean the same thing."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from r1fast import rewards
from r1fast.model.sharding import gathered
from r1fast.parallel import world
from r1fast.rewards.scoring import score
from r1fast.stages.answers import Answered, AnswerFile, Judging, Sample, Tally, unscored
from r1fast.stages.context import StageOutcome
from r1fast.stages.inputs import encode_problems, sample_texts, sampler_for, sampling_params, start_model, with_texts
from r1fast.stages.lengths import Lengths
from r1fast.stages.measures import (
    Verdicts,
    bootstrap_interval,
    by_category,
    consensus,
    means,
    pass_at_1,
    pass_at_k,
    steps_of_k,
)
from r1fast.stages.steps import Steps
from r1fast.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from r1fast.rollout.sampler import Sampler
    from r1fast.schema import EvaluateStage, EvaluationConfig, SamplingConfig
    from r1fast.stages.context import StageContext
    from r1fast.tasks import Task
    from r1fast.types import Problem

ANSWERS = "answers.jsonl"  # in the stage's folder: every sample of its evaluation
SHOWN = 8  # problems whose first sample goes to samples.jsonl: the first of the split, not chosen
GENERAL_SAMPLES = 2  # samples of each general prompt; its measures are shares over all of them
SEED = 20_501  # evaluation noise is the same for every stage, so that stages differ by their weights alone


@dataclass(frozen=True, slots=True)
class Measured:
    """One sampled and scored set of problems."""

    answered: list[Answered]

    @property
    def correct(self) -> Verdicts:
        return [[sample.correct for sample in a.samples] for a in self.answered]

    @property
    def pass_at_1(self) -> float:
        return pass_at_1(self.correct)

    @property
    def consensus(self) -> float:
        return consensus([[sample.answer for sample in a.samples] for a in self.answered], self.correct)

    @property
    def samples(self) -> list[Sample]:
        return [sample for a in self.answered for sample in a.samples]

    def mean(self, kind: str) -> float:
        values = [sample.rewards[kind] for sample in self.samples if kind in sample.rewards]
        return sum(values) / len(values) if values else float("nan")

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def length(self) -> float:
        return self.tokens / len(self.samples)

    @property
    def truncated(self) -> float:
        return sum(sample.finish == "length" for sample in self.samples) / len(self.samples)

    @property
    def errors(self) -> int:
        return sum(bool(sample.errors) for sample in self.samples)

    def numbers(self) -> dict[str, Any]:
        """What is told of it, but for what the task adds."""
        correct = self.correct
        low, high = bootstrap_interval(means(correct))
        categories = [str(a.prompt.meta.get("category", "")) for a in self.answered]
        return {
            "pass@1": self.pass_at_1,
            "pass@1_low": low,
            "pass@1_high": high,
            "pass@k": {str(k): pass_at_k(correct, k) for k in steps_of_k(len(correct[0]))},
            "cons@k": self.consensus,
            "format": self.mean("format"),
            "language": self.mean("language"),
            "length": self.length,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "errors": self.errors,
            "categories": by_category(categories, correct) if len(set(categories)) > 1 else {},
        }


class Evaluator:
    """One model under the protocol; the sampler's buffers are kept between its calls."""

    def __init__(self, model, tokenizer, tasks: Mapping[str, Task], max_length: int, pool=None, sampler=None):
        self.tokenizer, self.tasks, self.max_length, self.pool = tokenizer, tasks, max_length, pool
        self.sampler: Sampler = sampler or sampler_for(model, tokenizer)
        self.lengths = Lengths()  # from this evaluator's own answers alone: a resumed one must cut the same shares

    @classmethod
    def of(cls, ctx: StageContext, model, tokenizer, sampler: Sampler | None = None) -> Evaluator:
        return cls(model, tokenizer, ctx.tasks, ctx.recipe.model.max_length, ctx.pool, sampler)

    def sample(self, problems: list[Problem], sampling: SamplingConfig, n: int) -> list[RolloutGroup]:
        prompts = encode_problems(problems, self.tokenizer, self.max_length, sampling)
        return sample_texts(self.sampler, prompts, sampling_params(sampling, n, SEED), self.tokenizer)

    def measure(
        self,
        task: Task,
        problems: list[Problem],
        sampling: SamplingConfig,
        n: int,
        answers: AnswerFile | None = None,
        part: str = "main",
    ) -> Measured:
        """Samples and scores what `answers` does not hold yet, and adds it there: accuracy by the task's verifier;
        format, language and what else the task names beside it."""
        answers = answers or AnswerFile(None, {})
        kinds = {"accuracy": 1.0, "format": 0.0, "language": 0.0, **dict.fromkeys(task.beside, 0.0)}
        extract = rewards.get(task.verifier).extract

        def judge(batch: Sequence[Answered]) -> None:
            groups = score([_group(a) for a in batch], kinds, task.verifier, pool=self.pool)
            for group, (prompt, samples) in zip(groups, ((a.prompt, a.samples) for a in batch), strict=True):
                scored = [
                    replace(s, rewards=dict(r.rewards), errors=dict(r.errors), answer=extract(s.text))
                    for s, r in zip(samples, group.rollouts, strict=True)
                ]
                answers.keep(part, prompt.id, scored, scored=True)

        prompts = encode_problems(problems, self.tokenizer, self.max_length, sampling)

        def unknown(prompt: Prompt) -> bool:
            return answers.scored(part, prompt.id) is None and answers.drawn(part, prompt.id) is None

        def answer(own: list[Prompt]) -> list[Answered]:
            """Peers draw what the one that speaks for them does not have; it alone keeps and judges."""
            speaks, new = world().speaks_for_peers, world().of_peers(lambda: [unknown(prompt) for prompt in own])
            failed = None
            try:
                with Judging(judge) as judging:
                    missing = [p for p in own if answers.scored(part, p.id) is None]
                    for prompt in missing:
                        if (drawn := answers.drawn(part, prompt.id)) is not None:
                            judging.add(Answered(prompt, drawn))
                    wanted = [prompt for prompt, is_new in zip(own, new, strict=True) if is_new]
                    for group in self._draw(wanted, prompts, sampling, n):
                        if not speaks:
                            continue
                        answers.keep(part, group.prompt.id, unscored(group), scored=False)
                        judging.add(Answered(group.prompt, unscored(group)))
            except Exception as error:  # peers of the one that judges wait for it
                failed = error
            return world().of_peers(lambda: [Answered(p, answers.scored(part, p.id)) for p in own], failed)

        found = Measured(world().map(prompts, answer, self.lengths.costs(prompts, n)))
        self.lengths.seen(prompts, [sum(s.tokens for s in a.samples) / len(a.samples) for a in found.answered])
        return found

    def _draw(
        self, wanted: list[Prompt], prompts: list[Prompt], sampling: SamplingConfig, n: int
    ) -> Iterator[RolloutGroup]:
        """Groups of the wanted prompts as they are finished. The sampler tells equal prompts of a call apart by their
        order; here they are drawn in calls of their own with other seeds, so that a prompt's samples do not depend on
        which others are still wanted."""
        turns: Counter[tuple[int, ...]] = Counter()
        turn = {}
        for prompt in prompts:
            turn[prompt.id] = turns[prompt.tokens]
            turns[prompt.tokens] += 1
        for number in sorted({turn[prompt.id] for prompt in wanted}):
            call = [prompt for prompt in wanted if turn[prompt.id] == number]
            for _, group in self.sampler.stream(call, sampling_params(sampling, n, SEED + number)):
                yield with_texts(group, self.tokenizer)

    def measure_general(
        self, task: Task, limit: int, sampling: SamplingConfig
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Shares that the task itself defines (helpfulness, refusal), over held-out prompts, and the samples."""
        values: dict[str, list[float]] = defaultdict(list)
        problems = task.problems("test", limit, SEED)
        groups = world().map(problems, lambda own: self.sample(own, sampling, GENERAL_SAMPLES), [1.0] * len(problems))
        for group in groups:
            for rollout in group.rollouts:
                for name, value in task.measure(group.prompt.meta, rollout.text).items():
                    values[name].append(value)
        return {name: sum(v) / len(v) for name, v in sorted(values.items())}, groups

    def evaluate(
        self, protocol: EvaluationConfig, answers: AnswerFile | None = None
    ) -> tuple[dict, Measured, list[RolloutGroup]]:
        """The whole protocol on the test split: its numbers, the samples at the protocol's own temperature, and those
        of the general task. What `answers` holds is not drawn again, and what it does not hold is added to it."""
        began = time.perf_counter()
        task = self.tasks[protocol.task or next(iter(self.tasks))]
        problems = task.problems("test", protocol.limit, SEED)
        main = self.measure(task, problems, protocol.sampling, protocol.samples, answers)
        at_one = greedy = None
        if protocol.at_one:
            plain = protocol.sampling.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": 0})
            at_one = self.measure(task, problems, plain, protocol.at_one, answers, "at one").pass_at_1
        if protocol.greedy:
            cold = protocol.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0, "top_k": 0})
            greedy = self.measure(task, problems, cold, 1, answers, "greedy").pass_at_1
        general, general_groups = {}, []
        if protocol.general is not None:
            task_general = self.tasks[protocol.general]
            general, general_groups = self.measure_general(task_general, protocol.limit, protocol.sampling)
        result = {
            "task": task.name,
            "problems": len(problems),
            "samples": protocol.samples,
            "k": protocol.samples,
            **main.numbers(),
            **({} if _votes(task) else {"cons@k": None}),
            "pass@1_t1": at_one,
            "greedy": greedy,
            "seconds": time.perf_counter() - began,
            "general": general,
            "summary": task.summary([(a.prompt.meta, a.samples) for a in main.answered]),
        }
        return result, main, general_groups


def _votes(task: Task) -> bool:
    """Whether answers can be compared: prose and programs have no majority."""
    return type(rewards.get(task.verifier)).extract is not rewards.Reward.extract


def _group(answered: Answered) -> RolloutGroup:
    """For the rewards, which read texts: the tokens are no longer there when an evaluation goes on from a file."""
    return RolloutGroup(answered.prompt, [Rollout([], [], s.finish, s.text) for s in answered.samples], -1)


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


def log_evaluation(
    ctx: StageContext, step: int, result: dict, main: Measured, general: Sequence[RolloutGroup] = ()
) -> None:
    """The evaluation as a line of metrics.jsonl, and the first sample of the first problems."""
    ctx.log.event(event="evaluation", stage=ctx.name, step=step, **result)
    shown = []
    for answered in main.answered[:SHOWN]:
        group, first = _group(answered), answered.samples[0]
        rollout = replace(group.rollouts[0], rewards=first.rewards, reward=first.correct or 0.0)
        shown.append(replace(group, rollouts=[rollout]))
    for group in [*shown, *general[:SHOWN]]:
        log_sample(ctx, step, "evaluation", group)


def _answer_file(ctx: StageContext, on_scored: Callable[[list[Sample]], None] | None = None) -> AnswerFile:
    """Each rank has its own: it draws and judges its share of the problems. Of peers one has it for all."""
    place = world()
    if not place.speaks_for_peers:
        return AnswerFile(None, {})
    name = ANSWERS if place.first else f"answers-{place.rank}.jsonl"
    return AnswerFile(ctx.directory / name, {"stage": ctx.name, "ranks": place.size, **ctx.snapshot_key}, on_scored)


def evaluate_stage(ctx: StageContext, model, tokenizer, step: int, sampler: Sampler | None = None) -> dict | None:
    """The evaluation that follows a stage, where the stage asks for it."""
    if not ctx.stage.evaluate:
        return None
    ctx.progress.note("evaluating")
    with _answer_file(ctx) as answers, gathered(model):
        evaluator = Evaluator.of(ctx, model, tokenizer, sampler)
        result, main, general = evaluator.evaluate(ctx.recipe.evaluation, answers)
    log_evaluation(ctx, step, result, main, general)
    return result


def run(ctx: StageContext) -> StageOutcome:
    """The stage kind `evaluate`."""
    stage: EvaluateStage = ctx.stage
    model, tokenizer = start_model(ctx, stage.from_)
    protocol = stage.protocol or ctx.recipe.evaluation
    parts = 1 + bool(protocol.at_one) + protocol.greedy
    ctx.progress.stage(ctx.name, "evaluate", parts * protocol.limit)
    if ctx.resume is None:
        Steps(ctx, 0, {}).save(
            last=True
        )  # an empty one: it keeps the folder, and so the answers, for a run that goes on
    with _answer_file(ctx, Tally(ctx.progress.update)) as answers:
        result, main, general = Evaluator.of(ctx, model, tokenizer).evaluate(protocol, answers)
    log_evaluation(ctx, 0, result, main, general)
    return StageOutcome(stats={"pass@1": result["pass@1"], "cons@k": result["cons@k"]}, evaluation=result)
