"""The columns of the stage table, said once for the page and for the README's markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from r1fast.report.run import StageRecord, number
from r1fast.report.scale import percent, short


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    key: str  # of the evaluation, `general.x` for a measure of general prompts, or "seconds" of the stage
    write: Callable[[float], str]
    why: str  # what the heading means, for who points at it

    def read(self, stage: StageRecord) -> float | None:
        if self.key == "seconds":
            return stage.seconds
        return number(stage.evaluation, self.key) if stage.evaluation else None


def columns(stages: Iterable[StageRecord]) -> list[Column]:
    """Those that some stage has a value for, in the order of the table."""
    stages = list(stages)
    evaluations = [stage.evaluation for stage in stages if stage.evaluation]
    k = next((int(k) for e in evaluations if (k := number(e, "k")) is not None), None)
    general = sorted({name for e in evaluations for name in e.get("general") or {}})
    every = [
        Column("pass@1", "pass@1", percent, "mean over the samples of each problem, then over problems"),
        Column("T = 1", "pass@1_t1", percent, "pass@1 at temperature 1, where RL trains"),
        Column("greedy", "greedy", percent, "one sample at temperature 0"),
        Column(f"cons@{k}" if k else "cons@k", "cons@k", percent, "problems whose majority answer is right"),
        Column("format", "format", percent, "answers in think and answer tags, each once"),
        Column("language", "language", percent, "words of the reasoning that are in the question's language"),
        Column("length", "length", lambda v: f"{v:.1f}" if v < 100 else f"{v:.0f}", "tokens of a completion, mean"),
        *(Column(name, f"general.{name}", percent, f"{name}, over prompts without a right answer") for name in general),
        Column("seconds", "seconds", lambda v: f"{v:.1f}" if v < 10 else short(round(v)), "wall clock"),
    ]
    return [column for column in every if any(column.read(stage) is not None for stage in stages)]
