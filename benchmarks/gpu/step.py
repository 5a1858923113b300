"""A whole GRPO step, 32 prompts x 16 completions of 1,000 tokens, by phase; TRL's on the same card; and a profile.

Ours is the stage that `python -m r1fast.train` runs, TRL's its trainer with transformers' sampler (whole_step.py). Both
first take a step that compiles and captures. TRL's sampler needs minutes for a thousand tokens, so within a few minutes
it is measured at completions of 256 tokens, and ours there too; `--long` measures it at full length.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import roofline, targets
from benchmarks.gpu.checkpoints import shape_of, wait_for
from benchmarks.gpu.measure import NO_TIME, SMALL, Report, arguments, ceilings, in_short
from benchmarks.gpu.shapes import MODELS
from benchmarks.vs_trl import Contender
from benchmarks.whole_step import Shape

WORK = (
    {"prompts": 2, "group": 4, "prompt": (8, 12), "completion": 16}
    if SMALL
    else {"prompts": 32, "group": 16, "prompt": (96, 160), "completion": 1000}
)
BRIEF = 8 if SMALL else 256
TRL_SETTINGS = {"micro_batch": 8 if SMALL else 32, "attention": "sdpa"}
PHASES = ("sample", "score", "logprob", "learn", "other")


class Steps:
    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.deadline = folder, time.monotonic() + seconds
        self.report = Report("step", folder)
        self.card = roofline.Card(**ceilings(folder))

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, who: str, name: str, shape: Shape, settings: dict, most: int = 2) -> dict | None:
        """The last of up to `most` steps, as many as there is time for; a row of the report, or why there is none."""
        what, steps = f"{name}, {shape.completion} tokens", []
        if self.left < 5:
            self.report.skip(f"{what} by {who}", NO_TIME)
            return None
        try:
            checkpoint = wait_for(self.folder, name, min(60, self.left))
            with Contender(who, shape, checkpoint, settings) as contender:
                while len(steps) < most and (not steps or self.left > 1.5 * steps[-1]["seconds"]):
                    steps.append(contender.step())
        except Exception as error:  # a contender's failure is a row, and the next one is measured
            if not steps:
                self.report.skip(f"{what} by {who}", in_short(error))
                return None
        return self.report.add(**self.row(what, who, name, shape, steps))

    def row(self, what: str, who: str, name: str, shape: Shape, steps: list[dict]) -> dict:
        last = steps[-1]
        floor = roofline.grpo_step(
            MODELS[name], self.card, shape.prompts, shape.group, shape.mean_prompt, shape.completion, shared=True
        )
        return {
            "what": what, "by": who, "seconds": round(last["seconds"], 3), "steps": len(steps),
            "first": round(steps[0]["seconds"], 3),
            "phases": {p: round(last["phases"].get(p, 0.0), 3) for p in PHASES},
            "tokens/s": round(last["tokens"] / last["seconds"]), "peak MiB": round(last["peak"] / 2**20),
            "roofline": {"sample": round(floor.sample, 3), "learn": round(floor.learn + floor.optimize, 3)},
            "fraction": round(floor.seconds / last["seconds"], 4),
        }  # fmt: skip

    def run(self, long: bool) -> None:
        shapes = {name: replace(shape_of(config, **WORK), kl=False) for name, config in MODELS.items()}
        for name in reversed(shapes):  # the target speaks of the larger one
            row = self.measure("r1fast", name, shapes[name], {})
            limit = targets.STEP_SECONDS.get(name)
            if row and limit and not SMALL:
                self.report.say(**{f"{name} within {limit:g} s": row["seconds"] <= limit})
        for name, shape in shapes.items():
            beside = shape if long else replace(shape, completion=BRIEF)
            ours = None if long else self.measure("r1fast", name, beside, {})
            ours = next((r for r in self.rows(name, beside) if r["by"] == "r1fast"), ours)
            theirs = self.measure("TRL", name, beside, TRL_SETTINGS, most=1 if long else 2)
            if ours and theirs:
                ratio = round(theirs["seconds"] / ours["seconds"], 2)
                self.report.say(**{f"{name}: TRL over r1fast at {beside.completion} tokens": ratio})
                wanted = targets.STEP_TIMES_TRL
                self.report.say(**{f"{name}: at least {wanted:g}x": ratio >= wanted} if not SMALL else {})

    def rows(self, name: str, shape: Shape) -> list[dict]:
        found = self.report.data["rows"]
        return [row for row in found if row["what"] == f"{name}, {shape.completion} tokens" and "seconds" in row]


def main() -> int:
    parser = arguments("step", __doc__)
    parser.add_argument("--long", action="store_true", help="TRL too at completions of full length")
    options = parser.parse_args()
    Steps(options.folder, options.seconds).run(options.long)
    return 0


if __name__ == "__main__":
    sys.exit(main())
