"""Rejection sampling: a checkpoint's own right and readable samples become supervised rows (R1 B.3.3).

What is dropped, and why, is counted: a recipe that keeps nothing should say which rule did it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from random import Random
from typing import TYPE_CHECKING

from r1fast.config import UserError
from r1fast.metrics import PhaseTimer
from r1fast.parallel import world
from r1fast.rewards.scoring import readable, score, stop_above
from r1fast.stages.context import StageOutcome
from r1fast.stages.inputs import (
    collect_examples,
    encode_problems,
    sample_texts,
    sampler_for,
    sampling_params,
    start_model,
    write_rows,
)
from r1fast.stages.lengths import Lengths, mean_lengths
from r1fast.stages.steps import Steps
from r1fast.types import Example

if TYPE_CHECKING:
    from r1fast.schema import RejectStage
    from r1fast.stages.context import StageContext
    from r1fast.types import Prompt, Rollout, RolloutGroup

CHUNK = 256  # prompts sampled between two updates of the progress bar


@dataclass(slots=True)
class Found:
    """What the chunks so far have given."""

    rows: list[Example] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    sampled: int = 0

    def state_dict(self) -> dict:
        return {"rows": [asdict(row) for row in self.rows], "dropped": dict(self.dropped), "sampled": self.sampled}

    def load_state_dict(self, state: dict) -> None:
        self.rows = [Example(**row) for row in state["rows"]]
        self.dropped, self.sampled = Counter(state["dropped"]), state["sampled"]


def why_dropped(rollout: Rollout, group: RolloutGroup, stage: RejectStage) -> str | None:
    """The first rule that `rollout` breaks, or None where it is kept."""
    if rollout.finish == "length":
        return "unfinished"
    for kind in stage.require:
        if kind in rollout.errors:
            return f"{kind} could not be checked"
        least = stage.readable if kind == "language" else 1.0
        if rollout.rewards.get(kind, 0.0) < least:
            return f"{kind} below {least:g}"
    language = group.prompt.meta.get("language")
    return readable(rollout.text, language, stage.readable, stage.max_paragraph)


def keep(group: RolloutGroup, stage: RejectStage, dropped: Counter) -> list[Example]:
    """The samples of one prompt that are kept: de-duplicated, at most `keep_per_prompt`, so that easy prompts do not
    outweigh hard ones."""
    kept: dict[str, Example] = {}
    for rollout in group.rollouts:
        reason = why_dropped(rollout, group, stage)
        if reason is None and rollout.text in kept:
            reason = "duplicate"
        if reason is None and len(kept) >= stage.keep_per_prompt:
            reason = "more than keep_per_prompt"
        if reason is not None:
            dropped[reason] += 1
            continue
        kept[rollout.text] = Example(group.prompt.text, rollout.text, group.prompt.task, dict(group.prompt.meta))
    return list(kept.values())


def run(ctx: StageContext) -> StageOutcome:
    stage: RejectStage = ctx.stage
    model, tokenizer = start_model(ctx, stage.from_)
    sampler = sampler_for(model, tokenizer)
    task = ctx.tasks[stage.task]
    problems = task.problems("train", stage.prompts, ctx.seed)
    prompts = encode_problems(problems, tokenizer, ctx.recipe.model.max_length, stage.sampling)
    ctx.progress.stage(ctx.name, "reject", len(prompts))
    timer, found, lengths = PhaseTimer(), Found(), Lengths()
    loop = Steps(ctx, -(-len(prompts) // CHUNK), {"found": found, "lengths": lengths})
    kinds = dict.fromkeys(["accuracy", "format", "language", *stage.require], 1.0)
    for chunk in loop:
        start = (chunk - 1) * CHUNK
        params = sampling_params(stage.sampling, stage.samples, ctx.seed + start)

        def draw(own: list[Prompt], params=params) -> list[RolloutGroup]:
            with timer("sample"):
                groups = sample_texts(sampler, own, params, tokenizer)
            with timer("score"):
                return world().of_peers(lambda: score(groups, kinds, task.verifier, pool=ctx.pool))

        part = prompts[start : start + CHUNK]
        groups, tokens = world().map(part, draw, lengths.costs(part, stage.samples)), 0
        lengths.seen(part, mean_lengths(groups))
        stop_above(groups, ctx.recipe.rewards.max_failures)
        for group in groups:
            found.rows += keep(group, stage, found.dropped)
            tokens += sum(len(r.tokens) for r in group.rollouts)
        found.sampled += sum(len(g.rollouts) for g in groups)
        phases = timer.take()
        done = start + len(groups)
        ctx.log.event(
            event="step",
            stage=ctx.name,
            kind="reject",
            step=done,
            steps=len(prompts),
            kept=len(found.rows),
            sampled=found.sampled,
            tokens=tokens,
            tokens_per_second=tokens / max(sum(phases.values()), 1e-9),
            phase_seconds=phases,
        )
        ctx.progress.update(done, kept=len(found.rows) / found.sampled)
    rows, sampled, dropped = found.rows, found.sampled, found.dropped
    if len(rows) < stage.at_least:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise UserError(
            f"stage {ctx.name!r} kept {len(rows)} of {sampled:,} samples, at_least is {stage.at_least} (dropped: "
            f"{reasons}): the checkpoint of {stage.from_!r} does not solve task {stage.task!r} yet, or `require` asks "
            f"too much"
        )
    general = collect_examples(ctx, stage.general, ctx.seed) if stage.general else []
    Random(ctx.seed).shuffle(rows)
    write_rows(ctx.directory / "rows.jsonl", rows + general)
    note = f"kept {len(rows):,} of {sampled:,} samples" + (f", {len(general):,} general rows added" if general else "")
    return StageOutcome(
        stats={"sampled": sampled, "kept": len(rows), "general": len(general), "dropped": dict(dropped.most_common())},
        evaluation=None,
        note=note,
    )
