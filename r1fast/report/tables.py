"""The stage table, and where the seconds went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1fast.report.dag import KIND_WORDS
from r1fast.report.markup import Html, tag
from r1fast.report.measures import Column, columns
from r1fast.report.run import Run, StageRecord, number
from r1fast.report.scale import duration, percent, short

PHASES = ("data", "sample", "score", "logprob", "learn", "evaluate", "other")
RATED = ("sample", "learn")  # phases whose tokens a second are worth a column
PHASE_WORDS = {
    "data": "making training data",
    "sample": "sampling",
    "score": "scoring",
    "logprob": "log-probs of the policy and the reference",
    "learn": "learning",
    "evaluate": "evaluation",
    "other": "all else (checkpoints, start)",
}


def stage_table(run: Run) -> Html:
    """A row a stage in the recipe's order; a stage without an evaluation says what it made instead."""
    stages = list(run.stages.values())
    shown = columns(stages)
    head = [tag("th", "stage")]
    head += [tag("th", column.title, title=column.why) for column in shown]
    rows = [_row(stage, shown) for stage in stages]
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Stage table")


def _row(stage: StageRecord, shown: list[Column]) -> Html:
    cells = [
        tag("td", tag("span", stage.name, class_="stage"), tag("small", _what(stage), class_="kind"), style=stage.paint)
    ]
    measured = [column for column in shown if column.key != "seconds"]
    if stage.evaluation:
        cells += [_cell(stage, column) for column in measured]
    elif measured:
        words = stage.note or ("no evaluation of its own" if stage.done else f"{_state(stage)}")
        cells.append(tag("td", words, colspan=len(measured), class_="note"))
    cells += [_cell(stage, column) for column in shown if column.key == "seconds"]
    return tag("tr", cells, data_stage=stage.name)


def _what(stage: StageRecord) -> str:
    kind = KIND_WORDS.get(stage.kind, stage.kind).removesuffix(" sampling").removesuffix(" (SFT)")
    return f"{kind} from {stage.start}" if stage.start else kind


def _cell(stage: StageRecord, column: Column) -> Html:
    value = column.read(stage)
    if value is None:
        return tag("td", "–")
    content: list[Any] = [column.write(value)]
    if column.key == "pass@1":
        low, high = (number(stage.evaluation, f"pass@1_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            content += [" ", tag("small", f"{100 * low:.1f}–{100 * high:.1f}"), _interval(low, high, stage.paint)]
        return tag("td", content, class_="headline", data_value=repr(value), data_key=column.key)
    return tag("td", content, data_value=repr(value), data_key=column.key)


def _interval(low: float, high: float, paint: str) -> Html:
    """The 95% interval on a line from 0 to 1."""
    return tag(
        "svg",
        tag("title", f"95% interval {percent(low)} to {percent(high)}"),
        tag("rect", x=0, y=6, width=64, height=2, rx=1, class_="track"),
        tag("line", x1=1.5 + 61 * low, x2=1.5 + 61 * max(high, low + 0.01), y1=7, y2=7, class_="whisker"),
        viewBox="0 0 64 14",
        class_="interval",
        style=paint,
    )


def _state(stage: StageRecord) -> str:
    return {"planned": "not run yet", "started": "interrupted"}.get(stage.status, stage.status)


def phase_seconds(stage: StageRecord) -> dict[str, float]:
    """Seconds by phase, in the order of PHASES; what no phase claims of the stage's seconds is `other`."""
    seconds = {phase: 0.0 for phase in PHASES}
    for phase, spent in stage.phase_seconds().items():
        seconds[phase if phase in seconds else "other"] += spent
    seconds["evaluate"] += sum(number(point, "seconds") or 0.0 for point in stage.curve.values())
    seconds["evaluate"] += (number(stage.evaluation, "seconds") or 0.0) if stage.evaluation else 0.0
    seconds["other"] += max(0.0, (stage.seconds or 0.0) - sum(seconds.values()))
    return seconds


def time_section(run: Run) -> Html:
    """A stacked bar a stage, all on one scale, with its seconds and the tokens a second of sampling and learning."""
    spent = {stage.name: phase_seconds(stage) for stage in run.stages.values()}
    totals = {name: sum(seconds.values()) for name, seconds in spent.items()}
    longest = max(totals.values(), default=0.0)
    if longest <= 0:
        return tag("p", "No stage has reported any time yet.", class_="empty")
    rows = []
    for name, seconds in spent.items():
        if totals[name] > 0:
            rates = [_rate(run.stages[name], phase) for phase in RATED]
            hidden = sum(run.stages[name].overlap_seconds().values())
            rows.append(_time_row(tag("code", name), _bar(name, seconds, longest), totals[name], hidden, rates))
    whole = {phase: sum(seconds[phase] for seconds in spent.values()) for phase in PHASES}
    total_rates: Mapping[str, Any] = (run.summary or {}).get("tokens_per_second") or {}
    hidden = sum(sum(stage.overlap_seconds().values()) for stage in run.stages.values())
    rows.append(_time_row(tag("b", "all"), None, sum(whole.values()), hidden, [number(total_rates, p) for p in RATED]))
    titles = ("stage", "", "time", "and overlapped", "sampled tokens/s", "learned tokens/s")
    head = tag("tr", [tag("th", h) for h in titles])
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="times")
    key = [_phase(phase, s) for phase, s in whole.items() if s > 0]
    return tag("div", tag("ul", key, class_="phases"), tag("div", table, class_="scroll"))


def _time_row(name: Html, bar: Html | None, seconds: float, hidden: float, rates: list[float | None]) -> Html:
    """hidden: seconds of scoring and learning beside these, while something else was waited for."""
    cells = [tag("td", duration(hidden) if hidden >= 0.05 else "–")]
    cells += [tag("td", short(rate) if rate else "–") for rate in rates]
    return tag("tr", tag("td", name), tag("td", bar), tag("td", duration(seconds)), cells)


def _bar(name: str, seconds: Mapping[str, float], longest: float) -> Html:
    pieces = [
        tag("i", style=f"width: {100 * s / longest:.2f}%; --p: var(--p-{phase})", title=f"{phase}: {duration(s)}")
        for phase, s in seconds.items()
        if s > 0
    ]
    spoken = ", ".join(f"{phase} {duration(s)}" for phase, s in seconds.items() if s > 0)
    return tag("div", pieces, class_="bar", role="img", aria_label=f"{name}: {spoken}")


def _phase(phase: str, seconds: float) -> Html:
    """A line of the legend: colour, meaning, seconds of the whole run."""
    name = tag("span", PHASE_WORDS[phase], class_="swatch")
    return tag("li", name, " ", tag("b", duration(seconds)), style=f"--p: var(--p-{phase})")


def _rate(stage: StageRecord, phase: str) -> float | None:
    """Tokens of the steps over the seconds of the phase. In RL and rejection the tokens are the sampled ones."""
    seconds = tokens = 0.0
    for event in stage.steps.values():
        spent = number(event, f"phase_seconds.{phase}")
        if spent:
            seconds += spent
            tokens += number(event, "tokens") or 0.0
    return tokens / seconds if seconds > 0 and tokens > 0 else None
