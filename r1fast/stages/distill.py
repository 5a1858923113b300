"""Distillation: a teacher's kept samples into a smaller student, by supervised fine-tuning alone (R1 B.4.3).

The training is sft.py's; what this kind adds is to say whose samples they are and how much smaller the student is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from r1fast.stages import sft
from r1fast.stages.inputs import checkpoint_path

if TYPE_CHECKING:
    from pathlib import Path

    from r1fast.schema import DistillStage
    from r1fast.stages.context import StageContext, StageOutcome


def parameter_count(checkpoint: Path) -> int:
    """Parameters of a checkpoint, read from its safetensors headers alone."""
    from safetensors import safe_open

    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                size = 1
                for extent in tensors.get_slice(name).get_shape():
                    size *= extent
                total += size
    return total


def run(ctx: StageContext) -> StageOutcome:
    outcome = sft.run(ctx)
    stage: DistillStage = ctx.stage
    if stage.teacher is None:
        return outcome
    teacher = parameter_count(checkpoint_path(ctx, stage.teacher))
    student = parameter_count(ctx.directory / "checkpoint")
    return replace(
        outcome,
        stats={**outcome.stats, "teacher_parameters": teacher, "student_parameters": student},
        note=f"{outcome.note}; teacher {stage.teacher} {teacher:,} parameters, student {student:,}",
    )
