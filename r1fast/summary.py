"""What a finished run says of itself: summary.json, the claims it measured, and the table in the terminal."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1fast.metrics import read_events

if TYPE_CHECKING:
    from rich.console import RenderableType

    from r1fast.schema import RecipeConfig

RL_GAIN = 25.0  # points of pass@1 that RL is claimed to add to what it starts from


def summarize(
    recipe: RecipeConfig, records: Sequence[Mapping], out: Path, seconds: float, device: str
) -> dict[str, Any]:
    """The content of summary.json. records: the stages' stage.json in order; seconds: of the run, pauses left out."""
    import torch

    phases, rates = phase_totals(read_events(out))
    keys = ("name", "kind", "from", "seconds", "note", "stats", "evaluation")
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "seed": recipe.seed,
        "seconds": seconds,
        "machine": machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stages": [{key: record[key] for key in keys} for record in records],
        "checks": claims(recipe, {record["name"]: record.get("evaluation") for record in records}),
        "phase_seconds": phases,
        "tokens_per_second": rates,
    }


def machine(device: str) -> str:
    """The processor's name: the GPU's, or the CPU's as the system knows it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def phase_totals(events: Sequence[Mapping]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds by phase over all stages, evaluations included; tokens per second of each phase that steps report:
    the tokens of the steps that had the phase over its seconds)."""
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("event") == "step":
            for phase, spent in (event.get("phase_seconds") or {}).items():
                seconds[phase] += spent
                tokens[phase] += event.get("tokens") or 0
        elif event.get("event") in ("evaluation", "curve"):
            seconds["evaluate"] += event.get("seconds") or 0.0
    rates = {phase: tokens[phase] / spent for phase, spent in seconds.items() if tokens[phase] and spent > 0}
    return dict(seconds), {phase: rate for phase, rate in rates.items() if phase != "other"}


# -- claims -------------------------------------------------------------------------------------------------------


def claims(recipe: RecipeConfig, evaluations: Mapping[str, Mapping | None]) -> list[dict[str, Any]]:
    """What the recipe promises, each with the value measured in this run and whether it holds. A claim that does not
    hold is told like one that does; one whose stages were not evaluated is not made."""
    scores = {name: e["pass@1"] for name, e in evaluations.items() if e and e.get("pass@1") is not None}
    # A start from outside the run has a score where a stage of kind `evaluate` measured it as all others are.
    measured = [n for n, s in recipe.stages.items() if s.kind == "evaluate" and s.protocol is None and n in scores]
    scores = {**{recipe.stages[name].from_: scores[name] for name in measured}, **scores}
    found = []
    for name, stage in recipe.stages.items():
        if stage.kind == "grpo" and name in scores and stage.from_ in scores:
            before, after = scores[stage.from_], scores[name]
            gain = 100 * (after - before)
            room = "" if 100 * (1 - before) >= RL_GAIN else f", which left no room for {RL_GAIN:.0f}"
            found.append(
                _claim(
                    f"RL adds at least {RL_GAIN:.0f} points of pass@1: {name} {after:.1%} from {stage.from_} "
                    f"{before:.1%}{room}",
                    gain,
                    "points",
                    gain >= RL_GAIN,
                )
            )
    judged = [e for e in evaluations.values() if e and e.get("cons@k") is not None and e.get("pass@1") is not None]
    if judged:
        above = sum(e["cons@k"] >= e["pass@1"] for e in judged)
        k = judged[0].get("k")
        text = f"cons@{k} is at least pass@1 in most evaluations: in {above} of {len(judged)}"
        found.append(_claim(text, 100 * above / len(judged), "% of them", above * 2 > len(judged)))
    for name, stage in recipe.stages.items():
        if stage.kind != "distill" or name not in scores:
            continue
        for other, rival in recipe.stages.items():
            if rival.kind == "grpo" and rival.from_ == stage.from_ and other in scores:
                ahead = 100 * (scores[name] - scores[other])
                text = f"{name} {scores[name]:.1%}, {other} {scores[other]:.1%}"
                says = f"distilling beats RL alone in the same student: {text}"
                found.append(_claim(says, ahead, "points", ahead > 0))
    return found


def _claim(text: str, value: float, unit: str, holds: bool) -> dict[str, Any]:
    return {"claim": text, "value": round(value, 4), "unit": unit, "holds": bool(holds)}


# -- for the terminal ---------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def one_line(record: Mapping) -> str:
    """What a stage reached, as half a line: its evaluation, or its note where it has none."""
    evaluation = record.get("evaluation")
    if not evaluation:
        return record.get("note") or ""
    parts = [f"pass@1 {percent(evaluation['pass@1'])}%"]
    if evaluation["cons@k"] is not None:
        parts.append(f"cons@{evaluation['k']} {percent(evaluation['cons@k'])}%")
    parts += [f"format {percent(evaluation['format'])}%", f"language {percent(evaluation['language'])}%"]
    return "  ".join([*parts, f"length {evaluation['length']:.0f}"])


def table(summary: Mapping, width: int = 200) -> RenderableType:
    """The stage table and the claims, for a rich console of so many columns; a narrow one gets the main measures."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = {title: cells for title, cells in _columns(summary).items() if any(cells)}
    if width < _WIDE:
        columns = {title: cells for title, cells in columns.items() if title in _NARROW or title.startswith("cons@")}
    grid = Table(title=f"{summary['recipe']}, seed {summary['seed']}", title_justify="left")
    for title in columns:
        grid.add_column(title, justify="left" if title in ("stage", "kind", "from") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        grid.add_row(*row)
    lines = [
        Text(f"{'✓' if c['holds'] else '✗'} {c['claim']}", style="green" if c["holds"] else "yellow")
        for c in summary["checks"]
    ]
    return Group(grid, *lines)


_WIDE = 130  # columns of a terminal that hold the whole table
_NARROW = ("stage", "pass@1", "format", "language", "length", "s")


def _columns(summary: Mapping) -> dict[str, list[str]]:
    """Title -> a cell for every stage, empty where it was not measured."""
    stages = summary["stages"]
    evaluations = [stage["evaluation"] or {} for stage in stages]
    general = list(dict.fromkeys(name for e in evaluations for name in e.get("general") or {}))
    k = next((e["k"] for e in evaluations if e), 16)
    shares = {"T=1": "pass@1_t1", "greedy": "greedy", "format": "format", "language": "language"}
    return {
        "stage": [stage["name"] for stage in stages],
        "kind": [stage["kind"] for stage in stages],
        "from": [stage["from"] or "" for stage in stages],
        "pass@1": [percent(e.get("pass@1")) for e in evaluations],
        "95%": [f"{percent(e['pass@1_low'])}-{percent(e['pass@1_high'])}" if e else "" for e in evaluations],
        f"cons@{k}": [percent(e.get("cons@k")) for e in evaluations],
        **{title: [percent(e.get(key)) for e in evaluations] for title, key in shares.items()},
        "length": [f"{e['length']:.0f}" if e else "" for e in evaluations],
        **{name: [percent((e.get("general") or {}).get(name)) for e in evaluations] for name in general},
        "s": [f"{stage['seconds']:.1f}" for stage in stages],
    }
