"""A run directory read back into one object, finished or not, so that the page and the tables never touch a file.

What a run leaves is described in r1fast/metrics.py and r1fast/recipe.py: config.yaml (always there), metrics.jsonl
(one event a line, growing), stages/<name>/stage.json (there when a stage is done), samples.jsonl and summary.json
(there when the run is done). A run that was killed leaves a last line half-written: that line alone is forgiven.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1fast.config import UserError
from r1fast.graph import Edge
from r1fast.metrics import EVENTS, SAMPLES, read_rows

COLORS = 10  # of page.css and export.py
SUPERVISED = ("pretrain", "sft", "distill", "reward_model")  # kinds whose curve is a loss


@dataclass(slots=True)
class StageRecord:
    """All that is known of one stage."""

    name: str
    kind: str
    start: str | None  # the stage, or "model", whose weights it starts from; None: from scratch
    color: int | None  # its place in the palette, the same everywhere; None: a kind that draws no line
    status: str = "planned"  # | "started" | "finished" | "reused"
    seconds: float | None = None  # wall clock, evaluation included
    evaluation: Mapping[str, Any] | None = None
    note: str = ""
    steps: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # step -> event; a repeated step's last one
    curve: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # step -> validation point

    @property
    def paint(self) -> str:
        """The style that gives an element this stage's colour, as `--c`."""
        return "--c: var(--none)" if self.color is None else f"--c: var(--s{self.color % COLORS})"

    @property
    def done(self) -> bool:
        return self.status in ("finished", "reused")

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """(steps, values) of a number of the step events; `a.b` looks b up in a. Missing and non-finite are None."""
        steps = sorted(self.steps)
        return steps, [number(self.steps[step], key) for step in steps]

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase, summed over its steps."""
        return self._summed("phase_seconds")

    def overlap_seconds(self) -> dict[str, float]:
        """Seconds of scoring and learning that were done while something else was waited for."""
        return self._summed("overlap_seconds")

    def _summed(self, key: str) -> dict[str, float]:
        total: dict[str, float] = {}
        for event in self.steps.values():
            for phase, seconds in (event.get(key) or {}).items():
                total[phase] = total.get(phase, 0.0) + float(seconds)
        return total


@dataclass(slots=True)
class Run:
    """A run directory, read."""

    path: Path
    recipe: str
    description: str
    config: Mapping[str, Any]
    config_text: str
    stages: dict[str, StageRecord]
    links: list[Edge]  # sources that are no stage (`model`, a folder) included
    summary: Mapping[str, Any] | None  # None: the run was interrupted
    samples: list[Mapping[str, Any]]  # of evaluations, in file order

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def from_scratch(self) -> bool:
        return any(stage.kind == "pretrain" for stage in self.stages.values())

    @property
    def seed(self) -> int | None:
        return (self.summary or {}).get("seed", self.config.get("seed"))

    def of_kind(self, *kinds: str) -> list[StageRecord]:
        return [stage for stage in self.stages.values() if stage.kind in kinds]

    def root(self, name: str) -> str:
        """The stage from scratch (or "model") that a stage's weights descend from."""
        seen = set()
        while name in self.stages and self.stages[name].start and name not in seen:
            seen.add(name)
            name = self.stages[name].start
        return name

    def main_line(self) -> list[StageRecord]:
        """Evaluated stages that descend from where the first stage does, in order: students are not of them."""
        root = self.root(next(iter(self.stages)))
        return [s for s in self.stages.values() if s.evaluation and s.kind != "distill" and self.root(s.name) == root]


def number(event: Mapping[str, Any], key: str) -> float | None:
    """A finite number of an event, or None; `a.b` looks b up in a."""
    value: Any = event
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def load(directory: Path) -> Run:
    """Reads RUN_DIR. UserError where it is not a run directory or a file in it cannot be read."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the one that r1fast.train wrote (runs/<recipe>).")
    for name in ("config.yaml", EVENTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: it holds no {name}; give a run directory that r1fast.train wrote.")
    config_text = (directory / "config.yaml").read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(config_text)
        blocks = dict(config["stages"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'config.yaml'}: not a recipe ({type(error).__name__}: {error}).") from error
    stages = _stages(blocks)
    _read_events(directory / EVENTS, stages)
    for stage in stages.values():
        _read_stage(directory / "stages" / stage.name / "stage.json", stage)
    summary = _json(directory / "summary.json") if (directory / "summary.json").is_file() else None
    for row in (summary or {}).get("stages", []):
        if row["name"] in stages:
            stages[row["name"]].note = row.get("note") or ""
            stages[row["name"]].seconds = number(row, "seconds") or stages[row["name"]].seconds
    return Run(
        path=directory,
        recipe=str(config.get("name") or directory.name),
        description=str(config.get("description") or ""),
        config=config,
        config_text=config_text,
        stages=stages,
        links=_links(blocks),
        summary=summary,
        samples=_samples(directory / SAMPLES),
    )


def _stages(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, StageRecord]:
    """Records in the recipe's order; the first colours, the most distinct ones, go to the RL stages."""
    drawn = [name for name, block in blocks.items() if block["kind"] in ("grpo", *SUPERVISED)]
    drawn.sort(key=lambda name: blocks[name]["kind"] != "grpo")
    return {
        name: StageRecord(
            name=name,
            kind=block["kind"],
            start=None if block["kind"] == "pretrain" else block.get("from", "model"),
            color=drawn.index(name) if name in drawn else None,
        )
        for name, block in blocks.items()
    }


def _links(blocks: Mapping[str, Mapping[str, Any]]) -> list[Edge]:
    """The arrows, in the recipe's order: weights, rows, reward model, teacher (where its rows do not say it).

    Read from the YAML and not by r1fast.graph.edges, which checks what is about to run: a report may be asked for long
    after a run, when the checkpoint that it started from has moved.
    """
    links = []
    for name, block in blocks.items():
        if block["kind"] != "pretrain":
            links.append(Edge(block.get("from", "model"), name, "from"))
        rows = [*(block.get("data") or []), *(block.get("general") or [])]
        sources = list(dict.fromkeys(row["stage"] for row in rows if row.get("stage")))
        links += [Edge(source, name, "data") for source in sources]
        for key in ("reward_model", "safety_model"):
            if block.get(key):
                links.append(Edge(block[key], name, "reward model"))
        if block.get("teacher") and block["teacher"] not in sources:
            links.append(Edge(block["teacher"], name, "teacher"))
    return links


def _read_events(path: Path, stages: dict[str, StageRecord]) -> None:
    for line, event in enumerate(_lines(path), 1):
        name = event.get("stage")
        stage = stages.get(name) if isinstance(name, str) else None
        if stage is None:
            continue
        step = number(event, "step")
        if event.get("event") in ("step", "curve") and step is None:
            raise UserError(f"{path}, line {line}: an event without the number of its step; mend or delete it.")
        match event.get("event"):
            case "step":
                stage.steps[int(step)] = event
                stage.status = "started" if stage.status == "planned" else stage.status
            case "curve":
                stage.curve[int(step)] = event
            case "evaluation":
                stage.evaluation = event
            case "stage":
                status = str(event.get("status"))
                stage.status = "started" if status == "resumed" else status
                stage.seconds = number(event, "seconds") or stage.seconds


def _read_stage(path: Path, stage: StageRecord) -> None:
    """stage.json is written last and whole, so what it says goes before the events."""
    if not path.is_file():
        return
    record = _json(path)
    stage.status = stage.status if stage.status == "reused" else "finished"
    stage.evaluation = record.get("evaluation") or stage.evaluation
    stage.seconds = number(record, "seconds") or stage.seconds
    stage.note = record.get("note") or stage.note


def _samples(path: Path) -> list[Mapping[str, Any]]:
    """Rows of evaluations; what training drew is left out, for it is most of the file and of other problems."""
    return [row for row in _lines(path) if row.get("moment") == "evaluation"] if path.is_file() else []


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The log's objects, as metrics.py reads them: a last line without its end was cut by a kill and is left out."""
    rows, count = read_rows(path), 0
    while True:
        try:
            row = next(rows, None)
            if not isinstance(row, dict | None):
                raise ValueError(f"it holds {row!r:.40}")
        except ValueError as error:
            raise UserError(f"{path}, line {count + 1}: not a JSON object ({error}); mend or delete it.") from error
        if row is None:
            return
        count += 1
        yield row


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run again with --resume to write it anew.") from error
