"""The base model from scratch, for recipes that have no checkpoint to start from.

The loss is on the completion only and batches are small (256 tokens): both were the largest levers when a model of
1e5 parameters has a minute to learn to copy operands out of its prompt (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from r1fast.config import UserError
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss
from r1fast.learn.packing import Row, loss_weights, pack
from r1fast.metrics import PhaseTimer
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.tensor_parallel import parameters_of, peers
from r1fast.model.tokenizer import build_word_tokenizer, set_template
from r1fast.model.weights import save
from r1fast.stages.context import StageOutcome
from r1fast.stages.evaluate import evaluate_stage
from r1fast.stages.inputs import example_stream, spread
from r1fast.stages.steps import PolicyState, Steps
from r1fast.stages.supervised import SupervisedLog

if TYPE_CHECKING:
    from r1fast.schema import PretrainStage
    from r1fast.stages.context import StageContext


def recipe_tokenizer(ctx: StageContext):
    """One word-level tokenizer over the vocabularies of all the recipe's tasks."""
    words: dict[str, None] = {}
    for task in ctx.tasks.values():
        vocabulary = task.words()
        if vocabulary is None:
            raise UserError(
                f"stage {ctx.name!r} builds a word-level tokenizer, but task {task.name!r} has no closed vocabulary: "
                f"start from a checkpoint instead (from: model)"
            )
        words.update(dict.fromkeys(vocabulary))
    tokenizer = build_word_tokenizer(list(words))
    set_template(tokenizer, ctx.recipe.model.template)
    return tokenizer


def batches_of(rows: Iterator[Row], budget: int) -> Iterator[list[Row]]:
    """Consecutive rows, as many as fit `budget` tokens; at least one."""
    batch: list[Row] = []
    used = 0
    for row in rows:
        if batch and used + len(row.tokens) > budget:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += len(row.tokens)


def run(ctx: StageContext) -> StageOutcome:
    stage: PretrainStage = ctx.stage
    task = ctx.tasks[stage.task]
    tokenizer = recipe_tokenizer(ctx)
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
        **stage.shape.model_dump(),
    )
    model = Decoder(config, device=ctx.device, dtype=ctx.torch_dtype, tensor=peers())
    model.initialize(ctx.seed)
    spread(ctx, model)
    learner = Learner(model, stage.optimizer, stage.steps)

    easy_steps = round(stage.curriculum * stage.steps)
    easy = batches_of(example_stream(task.corpus(ctx.seed, True), tokenizer), stage.batch_tokens)
    full = batches_of(example_stream(task.corpus(ctx.seed + 1, False), tokenizer), stage.batch_tokens)
    ctx.progress.stage(ctx.name, "pretrain", stage.steps)
    log = SupervisedLog(ctx, stage.steps, every=max(1, stage.steps // 150))
    timer = PhaseTimer()
    loop = Steps(ctx, stage.steps, {"model": PolicyState(model), "learner": learner, "log": log}, timer)
    for step in range(loop.done):  # a corpus is an endless generator: it can only be wound forward
        next(easy if step < easy_steps else full)
    for step in loop:
        with timer("data"):
            rows = next(easy if step <= easy_steps else full)
            weights = loss_weights(rows, "token")
            batch = pack(rows, weights, stage.batch_tokens, ctx.device)
        with timer("learn"):
            stats = learner.step(batch, cross_entropy_loss)
        log.step(step, stats, timer)
    save(model, tokenizer, ctx.directory / "checkpoint")
    parameters = parameters_of(model)
    return StageOutcome(
        stats={"loss": log.recent_loss, "parameters": parameters, "vocabulary": len(tokenizer)},
        evaluation=evaluate_stage(ctx, model, tokenizer, stage.steps),
        note=f"{parameters:,} parameters, {stage.steps:,} steps of {stage.batch_tokens} tokens",
    )
