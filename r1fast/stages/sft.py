"""Supervised fine-tuning: the cold start, the second SFT from the base, and distillation (which differs only in whose
samples the rows are). Packed, loss on the completion only (B.4.2, B.4.3 of the R1 paper)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from r1fast.learn.losses import cross_entropy_loss
from r1fast.learn.packing import supervised_steps
from r1fast.metrics import PhaseTimer
from r1fast.model.lora import add_adapters
from r1fast.stages.context import StageOutcome
from r1fast.stages.evaluate import evaluate_stage
from r1fast.stages.fitting import announce, fit, keep
from r1fast.stages.inputs import collect_examples, encode_examples, spread, start_model
from r1fast.stages.steps import PolicyState, Steps
from r1fast.stages.supervised import SupervisedLog

if TYPE_CHECKING:
    from r1fast.schema import SFTStage
    from r1fast.stages.context import StageContext


def run(ctx: StageContext) -> StageOutcome:
    stage: SFTStage = ctx.stage
    model, tokenizer = start_model(ctx, stage.from_, spreads=True)
    examples = collect_examples(ctx, stage.data, ctx.seed)
    rows, too_long = encode_examples(ctx, examples, tokenizer)
    steps = max(1, math.ceil(stage.epochs * len(rows) / stage.batch_examples))
    if stage.adapters is not None:
        add_adapters(model, stage.adapters, ctx.seed)
    spread(ctx, model)
    learner, plan = fit(ctx, model, model.config, steps)
    ctx.progress.stage(ctx.name, stage.kind, steps)
    announce(ctx, learner, plan, cross_entropy_loss)
    log, timer = SupervisedLog(ctx, steps, every=max(1, steps // 150)), PhaseTimer()
    loop = Steps(ctx, steps, {"model": PolicyState(model), "learner": learner, "log": log}, timer)
    batches = supervised_steps(
        rows,
        first=loop.done,
        steps=steps,
        batch_examples=stage.batch_examples,
        micro_batch_tokens=learner.micro_batch_tokens,
        device=ctx.device,
        seed=ctx.seed,
    )
    for step in loop:
        with timer("data"):
            batch = next(batches)
        with timer("learn"):
            stats = learner.step(batch, cross_entropy_loss)
        log.step(step, stats, timer)
    keep(ctx, model, tokenizer)
    note = f"{len(rows):,} rows, {stage.epochs:g} epochs"
    if too_long:
        note += f"; {too_long:,} rows longer than model.max_length left out"
    return StageOutcome(
        stats={"rows": len(rows), "left_out": too_long, "steps": steps, "loss": log.recent_loss},
        evaluation=evaluate_stage(ctx, model, tokenizer, steps),
        note=note,
    )
