"""What a stage's training takes of memory: chosen before its first step, said, and tried with the longest
micro-batch; and what it leaves."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from r1fast.config import UserError
from r1fast.device import free_memory
from r1fast.learn.learner import Learner
from r1fast.learn.memory import Asked, TrainingPlan, cache_bytes, plan_training, working_bytes
from r1fast.model.decoder import Decoder
from r1fast.model.lora import adapters, fold, save_adapter
from r1fast.model.recall import recalls
from r1fast.model.sharding import is_sharded, own, shards_of, used_in
from r1fast.model.tensor_parallel import tensor_of
from r1fast.model.weights import save
from r1fast.parallel import world
from r1fast.stages.inputs import checkpoint_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from r1fast.learn.learner import Loss
    from r1fast.model.decoder_config import DecoderConfig
    from r1fast.schema import GRPOStage, RewardModelStage, SFTStage
    from r1fast.stages.context import StageContext


def fit(
    ctx: StageContext, model: nn.Module, config: DecoderConfig, steps: int, sequences: int = 0
) -> tuple[Learner, TrainingPlan]:
    """A learner of `model`, a Decoder or one within another module, set up as its memory plan says. UserError where it
    is sharded and cannot be gathered to be sampled with.

    steps: of the optimizer. sequences: that decode together at most. All models of the stage must be loaded: what is
    still free is what there is.
    """
    stage: GRPOStage | SFTStage | RewardModelStage = ctx.stage
    parameters = list(model.parameters())
    # all ranks must plan alike, or their micro-batches would differ
    width, free = used_in(model).itemsize, min(world().everyone.gather(free_memory(ctx.device)))
    config = config if (tensor := tensor_of(model)) is None else tensor.local(config)
    longest = ctx.recipe.model.max_length
    states = stage.optimizer.states
    plan = plan_training(
        config,
        Asked(stage.micro_batch_tokens, stage.recompute, None if states == "auto" else states),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        width=width,
        free=free,
        device=ctx.device,
        longest=longest,
        **_of_shares(model, config, bool(sequences) or getattr(stage, "evaluate", False)),
        # the sampler takes no more than half
        cache=min(cache_bytes(config, sequences, longest, width), free / 2) + _copies(model, sequences),
        weights=sum(own(p).nbytes for p in parameters),
        recall=recalls(ctx.device, tensor is not None),
    )
    if not plan.gather_fits:
        raise UserError(f"stage {ctx.name!r}: {plan.ungathered}")
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = plan.recompute
    optimizer = stage.optimizer.model_copy(update={"states": plan.states})
    return Learner(model, optimizer, steps, plan.micro_batch_tokens, ctx.progress.warn), plan


def _of_shares(model: nn.Module, config: DecoderConfig, sampled: bool) -> dict[str, float]:
    """What `plan_training` is told of a sharded model. sampled: whether the stage samples with it."""
    if not is_sharded(model):
        return {}
    width, frozen = used_in(model).itemsize, not next(model.parameters()).requires_grad
    return {
        "shards": shards_of(model),
        "gathered": sum(p.numel() for p in model.parameters()) * width if sampled else 0.0,
        "working": working_bytes(config, width, trained=not frozen),
    }


def _copies(model: nn.Module, sequences: int) -> int:
    """Bytes of the weights that are kept beside the merged ones while adapters are sampled with; shares are kept anyway
    (learn/memory.py counts what is gathered)."""
    if not sequences or not isinstance(model, Decoder) or is_sharded(model):
        return 0
    return sum(getattr(layer, name).nbytes for layer, name, _ in adapters(model))


def keep(ctx: StageContext, model: Decoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """The stage's `checkpoint/`; of adapters also `adapter/`, for peft, with the checkpoint they were trained on named
    in it. The model has no adapters after it: they are merged into its weights."""
    lora = ctx.stage.adapters
    if lora is not None:
        base = str(checkpoint_path(ctx, ctx.stage.from_).absolute())
        save_adapter(model, lora, base, ctx.directory / "adapter")
        fold(model)
    save(model, tokenizer, ctx.directory / "checkpoint")


def announce(ctx: StageContext, learner: Learner, plan: TrainingPlan, loss: Loss | None = None) -> None:
    """Says what the plan is; where memory is scarce, or a GPU's, runs the largest micro-batch of `loss` at once, so
    that it is halved now and not in the tenth hour."""
    (ctx.progress.tell if plan.fits else ctx.progress.warn)(plan.told())
    told = {name: value for name, value in asdict(plan).items() if name != "memory"}
    told |= {f"{name}_bytes": value for name, value in asdict(plan.memory).items()}
    if ctx.resume is None:  # else the log has it already
        ctx.log.event(event="memory", stage=ctx.name, **told)
    if loss is not None and (ctx.device == "cuda" or 2 * plan.needed > plan.free):
        learner.rehearse(ctx.recipe.model.max_length, loss)
