"""What the README shows of a run: its curves as one picture, and the stage table over several seeds as markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from r1fast.config import UserError
from r1fast.report.charts import trend
from r1fast.report.dag import KIND_WORDS
from r1fast.report.measures import Column, columns
from r1fast.report.run import Run, StageRecord, load, number
from r1fast.report.scale import short

PALETTE = ("#2b6cd4", "#d2690a", "#14855a", "#b53f97", "#55575f", "#0d8a96", "#7a5ad0", "#c23f3a", "#8a6a1f", "#6f8418")


def write_picture(run_dir: Path, path: Path) -> Path:
    """pass@1 (solid) and cons@k (dashed) of the RL stages over steps, and response length; .png or .svg by its name.

    Drawn on white, so that it reads on a light and on a dark page. UserError: no RL stage has curves, other suffix.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a picture is a .png or a .svg file; name it so.")
    run = load(run_dir)
    stages = [stage for stage in run.of_kind("grpo") if len(stage.curve) > 1]
    if not stages:
        raise UserError(f"{run_dir}: no RL stage of this run has a curve to draw; set evaluate_every in its recipe.")
    import matplotlib  # a second to import, and only here
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "r1fast",  # the same file for the same run
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9a9ca3",
        "xtick.color": "#55575e",
        "ytick.color": "#55575e",
        "text.color": "#1d1e22",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        scores, lengths = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_scores(scores, stages)
        _draw_lengths(lengths, stages)
        temporary = path.with_name(path.name + ".part")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=170, facecolor="white", metadata=metadata)
    os.replace(temporary, path)
    return path


def _draw_scores(axes: Any, stages: Sequence[StageRecord]) -> None:
    k = next(point.get("k", "k") for stage in stages for point in stage.curve.values())
    for stage in stages:
        color, steps = PALETTE[(stage.color or 0) % len(PALETTE)], sorted(stage.curve)
        for key, style, width in (("pass@1", "-", 2.0), ("cons@k", (0, (3, 2)), 1.2)):
            values = [number(stage.curve[step], key) for step in steps]
            known = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None]
            label = stage.name if key == "pass@1" else None
            axes.plot(*zip(*known, strict=True), ls=style, lw=width, color=color, label=label)
    axes.plot([], [], ls=(0, (3, 2)), lw=1.2, color="#6d6f78", label=f"cons@{k}, dashed")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_title("pass@1 of the RL stages, validation problems", loc="left", fontsize=10.5, fontweight="bold")
    axes.legend(frameon=False, loc="best")
    _finish(axes)


def _draw_lengths(axes: Any, stages: Sequence[StageRecord]) -> None:
    for stage in stages:
        steps, values = stage.series("response_length")
        known = [(float(x), y) for x, y in zip(steps, values, strict=True) if y is not None]
        if not known:
            continue
        color = PALETTE[(stage.color or 0) % len(PALETTE)]
        axes.plot(*zip(*known, strict=True), lw=0.8, alpha=0.3, color=color)
        axes.plot(*zip(*trend(known), strict=True), lw=2.0, color=color)
    axes.set_ylim(bottom=0)
    axes.set_title("response length, tokens", loc="left", fontsize=10.5, fontweight="bold")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#ece9e3", lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


# -- markdown -------------------------------------------------------------------------------------------------------


def markdown_table(run_dirs: Sequence[Path]) -> str:
    """The stage table of finished runs of one recipe: the median over the runs, and the range where there are several.

    Below it the measured claims, with the number of runs in which each holds. UserError: a run has not finished, or
    its stages are not those of the first.
    """
    runs = [load(Path(run_dir)) for run_dir in run_dirs]
    _comparable(runs)
    shown = columns(stage for run in runs for stage in run.stages.values())
    lines = [_line(["stage", "kind", "from", *(column.title for column in shown)])]
    lines.append(_line(["---", "---", "---", *(["---:"] * len(shown))]))
    for name, stage in runs[0].stages.items():
        cells = [_middle([run.stages[name] for run in runs], column) for column in shown]
        start = f"`{stage.start}`" if stage.start else "scratch"
        lines.append(_line([f"`{name}`", KIND_WORDS.get(stage.kind, stage.kind), start, *cells]))
    seeds = ", ".join(str(run.seed) for run in runs)
    problems = next((int(e["problems"]) for s in runs[0].stages.values() if (e := s.evaluation)), None)
    what = "Median and (range) over the seeds" if len(runs) > 1 else "Seed"
    about = f"{what} {seeds}; {problems} test problems." if problems else f"{what} {seeds}."
    claims = _claims(runs)
    return "\n".join([*lines, "", about, *([""] if claims else []), *claims])


def _comparable(runs: Sequence[Run]) -> None:
    for run in runs:
        if not run.finished:
            raise UserError(f"{run.path}: this run has not finished; finish it with --resume before tabling it.")
        if list(run.stages) != list(runs[0].stages):
            raise UserError(f"{run.path}: its stages are not those of {runs[0].path}; table runs of one recipe.")


def _middle(stages: Sequence[StageRecord], column: Column) -> str:
    values = [value for stage in stages if (value := column.read(stage)) is not None]
    if not values:
        return ""
    middle = column.write(median(values))
    low, high = (column.write(edge).removesuffix("%") for edge in (min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def _claims(runs: Sequence[Run]) -> list[str]:
    """A row a claim, in the first run's order: the median value and in how many runs it holds."""
    checks = [{_subject(run, check): check for check in (run.summary or {}).get("checks") or []} for run in runs]
    if not checks[0]:
        return []
    lines = [_line(["measured claim", "value", "holds"]), _line(["---", "---:", "---:"])]
    for subject in checks[0]:
        same = [each[subject] for each in checks if subject in each]
        values = [check["value"] for check in same]
        numeric = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        value = short(median(numeric)) if len(numeric) == len(values) else "; ".join(str(v) for v in values)
        unit = same[0].get("unit")
        value = f"{value} {unit}" if unit else value
        lines.append(_line([subject, value, f"{sum(bool(check['holds']) for check in same)} of {len(same)}"]))
    return lines


def _subject(run: Run, check: Mapping[str, Any]) -> str:
    """A claim without this run's numbers, which follow a colon: what it says, and of which stages."""
    says, _, measured = check["claim"].partition(": ")
    names = [f"`{word}`" for word in dict.fromkeys(re.findall(r"[\w-]+", measured)) if word in run.stages]
    return f"{says} ({', '.join(names)})" if names else says


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
