"""The curves of the paper, for every RL stage, and the losses of the supervised ones."""

from __future__ import annotations

from r1fast.report.charts import Line, Panel, drawable, line_chart
from r1fast.report.markup import Html, tag, text
from r1fast.report.run import SUPERVISED, Run, StageRecord, number

REWARD_UNITS = {
    "accuracy": "share of answers that are right",
    "format": "share in both tags",
    "language": "words in the question's language",
    "preference": "reward model's score, general prompts",
}
VALIDATED = (  # key of the curve events, panel
    ("language", Panel("Language", "share of the question's, validation", share=True, whole=True, smooth=False)),
    ("format", Panel("Format", "share in both tags, validation", share=True, whole=True, smooth=False)),
)
LEARNING = (  # key of the step events, panel
    ("reward", Panel("Reward", "weighted sum of all kinds, mean of a step")),
    ("kl", Panel("KL to the reference", "nats a token")),
    ("entropy", Panel("Entropy", "nats a token")),
    ("clip_fraction", Panel("Clip fraction", "tokens the clip held back", share=True)),
    ("grad_norm", Panel("Gradient norm", "before clipping")),
    ("truncated", Panel("Cut off", "completions that met the token limit", share=True)),
)


def sections(run: Run) -> list[tuple[str, str, Html]]:
    """(id, heading, body) of the parts about curves that this run has something for."""
    reinforced = [stage for stage in run.of_kind("grpo") if stage.steps or stage.curve]
    supervised = [stage for stage in run.of_kind(*SUPERVISED) if len(stage.steps) > 1]
    parts = []
    if reinforced:
        parts.append(("curves", "What RL does, step by step", _reinforced(reinforced)))
    if supervised:
        parts.append(("losses", "Losses of the supervised stages", _supervised(run, supervised)))
    return parts


def _reinforced(stages: list[StageRecord]) -> Html:
    points = [_validation(stage) for stage in stages]
    points += [_validated(stages, key, panel) for key, panel in VALIDATED]
    parts = []
    if any(points):
        parts += [
            tag(
                "p",
                "Solid: pass@1, the mean over k samples. Dashed: cons@k, the majority answer. Measured on validation "
                "problems as training goes; the stage table below uses test problems, which training never sees.",
                class_="how",
            ),
            tag("div", points, class_="charts"),
        ]
    parts += [
        tag("h3", "While training"),
        tag(
            "p",
            "Means over what each step sampled: faint as measured, solid as a local trend. Colours are the stages'.",
            class_="how",
        ),
        tag("div", _training(stages), class_="charts"),
    ]
    if silent := _silent(stages):
        parts.append(tag("p", silent, class_="how"))
    return tag("div", parts)


def _validation(stage: StageRecord) -> Html:
    """pass@1 and cons@k over steps, as the paper's figure 1 shows them."""
    steps = sorted(stage.curve)
    points = [stage.curve[step] for step in steps]
    k = next((int(p["k"]) for p in points if p.get("k")), "k")
    lines = [
        Line("pass@1", steps, [number(p, "pass@1") for p in points], stage.paint, marked=True),
        Line(f"cons@{k}", steps, [number(p, "cons@k") for p in points], stage.paint, dashed=True, marked=True),
    ]
    return line_chart(
        Panel(stage.name, f"pass@1 and cons@{k}, validation", share=True, whole=True, smooth=False), lines
    )


def _validated(stages: list[StageRecord], key: str, panel: Panel) -> Html:
    """One more measure of the validation points, all stages in one chart."""
    lines = []
    for stage in stages:
        steps = sorted(stage.curve)
        lines.append(Line(stage.name, steps, [number(stage.curve[s], key) for s in steps], stage.paint, marked=True))
    return line_chart(panel, lines)


def _training(stages: list[StageRecord]) -> Html:
    charts = [line_chart(Panel("Response length", "tokens, mean of a step"), _lines(stages, "response_length"))]
    kinds = [kind for stage in stages for event in stage.steps.values() for kind in event.get("rewards") or {}]
    for kind in dict.fromkeys(kinds):
        share = kind in REWARD_UNITS
        panel = Panel(f"Reward: {kind}", REWARD_UNITS.get(kind, "mean of a step"), share=share, whole=share)
        charts.append(line_chart(panel, _lines(stages, f"rewards.{kind}")))
    charts += [line_chart(panel, _lines(stages, key)) for key, panel in LEARNING]
    difference = Panel("Sampler and learner", "log-prob difference a token, nats, mean; log scale", log=True)
    charts.append(line_chart(difference, _lines(stages, "logprob_difference_mean")))
    largest = Panel("Sampler and learner", "largest log-prob difference of a step; log scale", log=True)
    charts.append(line_chart(largest, _lines(stages, "logprob_difference_max")))
    return text(charts)


def _lines(stages: list[StageRecord], key: str) -> list[Line]:
    return [Line(stage.name, *stage.series(key), stage.paint) for stage in stages]


def _silent(stages: list[StageRecord]) -> str:
    """Names the charts that are missing because there was nothing but zeros, so that nobody looks for them."""
    names = [panel.title for key, panel in LEARNING if not drawable(_lines(stages, key))]
    return f"Not drawn, because zero or not recorded in every step: {', '.join(names)}." if names else ""


def _supervised(run: Run, stages: list[StageRecord]) -> Html:
    charts = []
    eased = [s for s in stages if s.kind == "pretrain" and run.config["stages"][s.name].get("curriculum")]
    names = " and ".join(stage.name for stage in eased)
    jump = f"The loss of {names} jumps where the easy documents of the first part of pretraining end." if eased else ""
    for stage in stages:
        unit = {"reward_model": "pairwise loss"}.get(stage.kind, "loss, nats a token")
        charts.append(line_chart(Panel(stage.name, unit), [Line("loss", *stage.series("loss"), stage.paint)]))
        accuracy = Line("accuracy", *stage.series("accuracy"), stage.paint)
        charts.append(line_chart(Panel(stage.name, "pairs ordered right", share=True, whole=True), [accuracy]))
    return tag("div", tag("p", jump, class_="how") if jump else None, tag("div", charts, class_="charts"))
