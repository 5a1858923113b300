"""One module a stage kind; each has `run(ctx) -> StageOutcome`. A new kind is a file here, a class in schema.py and a
line below."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1fast.stages.context import StageContext, StageOutcome

KINDS = ("pretrain", "sft", "grpo", "reject", "reward_model", "distill", "evaluate")


def run_stage(ctx: StageContext) -> StageOutcome:
    """Runs the stage of `ctx`; what it makes lies under `ctx.directory`."""
    if ctx.stage.kind not in KINDS:
        raise ValueError(f"no stage kind {ctx.stage.kind!r}; kinds: {', '.join(KINDS)}")
    return import_module(f"r1fast.stages.{ctx.stage.kind}").run(ctx)
