"""A recipe small enough for a test: the graph of `tiny`, sums of one to three operations, seconds a stage."""

from __future__ import annotations

from pathlib import Path

from r1fast.config import load_recipe
from r1fast.progress import PlainProgress
from r1fast.recipe import run
from r1fast.schema import RecipeConfig

EASY = "{total_max: 20, start: [1, 10], operand: [1, 5], operations: [1, 3]}"
MICRO = (
    "threads=1",
    f"tasks.totals.options={EASY}",
    "model.max_length=96",
    "evaluation.limit=32",
    "evaluation.samples=4",
    "evaluation.at_one=4",
    "evaluation.curve_limit=8",
    "evaluation.curve_samples=4",
    "evaluation.sampling.max_tokens=40",
    "stages.base.steps=900",
    "stages.student_base.steps=300",
    *(f"stages.{name}.steps=8" for name in ("zero", "reasoning_rl", "all_rl", "student_rl")),
    *(f"stages.{name}.evaluate_every=4" for name in ("zero", "reasoning_rl", "all_rl", "student_rl")),
    *(f"stages.{name}.prompts_per_step=8" for name in ("zero", "reasoning_rl", "all_rl", "student_rl")),
    *(
        f"stages.{name}.sampling.max_tokens=40"
        for name in ("zero", "reasoning_rl", "all_rl", "student_rl", "cold_data", "rejection", "distill_data")
    ),
    *(f"stages.{name}.prompts=60" for name in ("cold_data", "rejection", "distill_data")),
    "stages.preference.pairs=128",
)


class Silent(PlainProgress):
    """No lines; the calls are still checked by the class it comes from."""

    def _say(self, text: str) -> None:
        pass


def run_micro(out: Path, *overrides: str, resume: bool = False) -> dict:
    """Runs (or resumes) the small recipe in `out` and returns its summary."""
    return run(load_recipe("tiny", [*MICRO, *overrides]), out, progress=Silent(), resume=resume)


def run_micro_stages(
    out: Path, micro: Path, stages: dict[str, dict], settings: dict | None = None, resume: bool = False
) -> dict:
    """Runs (or resumes) `stages` (blocks of a recipe) alone, each from the base of the small run in `micro`.

    settings: other blocks of the recipe."""
    recipe = {**load_recipe("tiny", MICRO).model_dump(by_alias=True), **(settings or {})}
    base = str(micro / "stages" / "base" / "checkpoint")
    recipe["stages"] = {
        name: stage if stage["kind"] == "pretrain" else {"from": base, **stage} for name, stage in stages.items()
    }
    return run(RecipeConfig.model_validate(recipe), out, progress=Silent(), resume=resume)
