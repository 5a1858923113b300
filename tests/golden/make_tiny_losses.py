"""Ten steps of pretraining and ten of RL with the preset `tiny`, step by step: the numbers that a refactoring must not
change. `python tests/golden/make_tiny_losses.py` writes tiny_losses.json anew; do so only where a change is meant, and
say why in the commit.

RL starts from a base of a hundred steps, which speaks but solves nothing: the language reward is what its samples
differ in.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).parent / "tiny_losses.json"
SETTINGS = (
    "threads=1",
    "stages.base.steps=100",
    "stages.base.evaluate=false",
    "stages.zero.steps=10",
    "stages.zero.evaluate=false",
    "stages.zero.evaluate_every=0",
    "stages.zero.sampling.max_tokens=24",
    "stages.zero.mix=[{task: totals, rewards: {language: 1.0}}]",
    "stages.zero.objective.kl_coef=0.01",
)
KEYS = ("loss", "grad_norm", "reward", "kl", "entropy", "response_length")


def ten_steps() -> dict[str, list[dict[str, float]]]:
    """Stage -> what each of its first ten steps reported."""
    from r1fast.config import load_recipe
    from r1fast.metrics import read_events
    from r1fast.progress import PlainProgress
    from r1fast.recipe import run

    names = load_recipe("tiny").stages
    dropped = [f"stages.{name}=null" for name in names if name not in ("base", "zero")]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("tiny", [*SETTINGS, *dropped])
        run(recipe, Path(folder) / "run", progress=PlainProgress(file=sys.stderr))
        steps = [e for e in read_events(Path(folder) / "run") if e["event"] == "step"]
    return {
        stage: [{key: e[key] for key in KEYS if key in e} for e in steps if e["stage"] == stage][:10]
        for stage in ("base", "zero")
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(ten_steps(), indent=1) + "\n", encoding="utf-8")
    print(FILE)
