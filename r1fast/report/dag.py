"""The recipe as a picture: a box a stage, an arrow for every thing a stage needs, laid out by layers.py from the top
down, so that it is as readable on a phone as on a desk; beside it what each stage does, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from r1fast.graph import Edge
from r1fast.report.layers import Placed, place
from r1fast.report.markup import Html, tag
from r1fast.report.run import Run, StageRecord, number
from r1fast.report.scale import percent

LINK_CLASSES = {"from": "from", "data": "data", "reward model": "reward", "teacher": "teacher"}
LINK_WORDS = {
    "from": "starts from these weights",
    "data": "is trained on these rows",
    "reward model": "is rewarded by this model",
    "teacher": "is taught by this model",
}
KIND_WORDS = {
    "pretrain": "pretraining",
    "grpo": "RL (GRPO)",
    "sft": "SFT",
    "distill": "distillation (SFT)",
    "reject": "rejection sampling",
    "reward_model": "reward model",
}
WIDTH, HEIGHT = 136.0, 56.0  # of a box
BETWEEN, GAP, BEAD = 30.0, 16.0, 8.0  # layers; neighbours in a layer; an arrow that passes a layer
MARGIN = 6.0
CHARACTER = 7.3  # width of a character of the boxes' 12 px monospaced names


def picture(run: Run) -> Html:
    """The drawing with the legend of its arrows, and the list of what the stages do."""
    used = {link.kind for link in run.links}
    legend = [tag("li", _key(kind), words) for kind, words in LINK_WORDS.items() if kind in used]
    lines = []
    for stage in run.stages.values():
        name = tag("dt", tag("span", stage.name, class_="stage"), style=stage.paint)
        what = describe(run.config["stages"][stage.name], counts=not stage.note)
        note = f" {stage.note[:1].upper()}{stage.note[1:]}." if stage.note else ""
        lines.append(tag("div", name, tag("dd", what, note)))
    return tag(
        "div",
        tag("div", drawing(run), tag("ul", legend, class_="key")),
        tag("dl", lines, class_="does"),
        class_="recipe",
    )


def drawing(run: Run) -> Html:
    """The SVG. Starts that are no stage (`model`, a folder) get a box too."""
    links = run.links
    names = list(dict.fromkeys([*(k.source for k in links if k.source not in run.stages), *run.stages]))
    placed = place(names, [(k.source, k.target) for k in links], WIDTH, BEAD, GAP)
    width = max(cross for _, cross in placed.nodes.values()) + WIDTH / 2
    width = max([width, *(cross + BEAD for route in placed.routes for _, cross in route)]) + 2 * MARGIN
    height = placed.layers * (HEIGHT + BETWEEN) - BETWEEN + 2 * MARGIN
    ports = _ports(links, placed)
    return tag(
        "svg",
        _heads(),
        [_arrow(link, i, placed, ports) for i, link in enumerate(links)],
        [_box(run, name, placed) for name in names],
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"max-width: {width:.0f}px",
        role="img",
        aria_label="The recipe: " + "; ".join(f"{k.target} {LINK_WORDS[k.kind]}: {k.source}" for k in links),
        class_="graph",
    )


def describe(block: Mapping[str, Any], counts: bool = True) -> str:
    """A stage's settings in a line, from its block of config.yaml. `counts`: how much of everything, which the note of
    a finished stage says already."""
    parts = [KIND_WORDS.get(block["kind"], block["kind"])]
    if block["kind"] == "pretrain":
        parts[0] += " from scratch"
    elif block.get("from"):
        parts[0] += f" from {block['from']}"
    parts += _counts(block) if counts else []
    if block.get("mix"):
        parts.append("rewards " + "; ".join(_rewards(entry, len(block["mix"]) > 1) for entry in block["mix"]))
    if sources := [_source(source) for source in block.get("data") or []]:
        parts.append(f"on {' and '.join(sources)}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _counts(block: Mapping[str, Any]) -> list[str]:
    parts = []
    for unit in ("step", "epoch", "pair"):
        if count := block.get(f"{unit}s"):
            parts.append(f"{count:,g} {unit}" if count == 1 else f"{count:,g} {unit}s")
    if block.get("prompts_per_step") and block.get("group_size"):
        parts.append(f"{block['prompts_per_step']} prompts × {block['group_size']} samples a step")
    if block["kind"] == "reject" and block.get("prompts") and block.get("samples"):
        parts.append(f"{block['prompts']:,} prompts × {block['samples']} samples")
    return parts


def _rewards(entry: Mapping[str, Any], several: bool) -> str:
    kinds = [kind if weight == 1 else f"{weight:g} {kind}" for kind, weight in (entry.get("rewards") or {}).items()]
    late = f", after {percent(entry['start'], 0)} of the steps" if entry.get("start") else ""
    return " + ".join(kinds) + (f" on {entry.get('task')}{late}" if several else late)


def _source(source: Mapping[str, Any]) -> str:
    limit = f"{source['limit']:,} " if source.get("limit") else ""
    if source.get("stage"):
        return f"{limit}rows of {source['stage']}"
    return f"{limit}written rows of {source['task']}" if source.get("task") else f"{limit}rows of a file"


# -- the drawing ----------------------------------------------------------------------------------------------------


def _top(layer: int) -> float:
    return MARGIN + layer * (HEIGHT + BETWEEN)


def _ports(links: list[Edge], placed: Placed) -> dict[tuple[int, bool], float]:
    """Where on a box's side each arrow leaves (False) or enters (True): in the order they come from, spread out around
    the one that comes straight."""
    ports = {}
    for entering in (False, True):
        for name in placed.nodes:
            mine = [i for i, k in enumerate(links) if (k.target if entering else k.source) == name]

            def towards(i: int, entering: bool = entering) -> float:
                route = placed.routes[i]
                if route:
                    return route[-1 if entering else 0][1]
                return placed.nodes[links[i].source if entering else links[i].target][1]

            mine.sort(key=towards)
            pitch = min(26.0, 0.7 * WIDTH / max(1, len(mine)))
            own = placed.nodes[name][1]
            straight = next((rank for rank, i in enumerate(mine) if abs(towards(i) - own) < 1), (len(mine) - 1) / 2)
            for rank, i in enumerate(mine):
                ports[i, entering] = MARGIN + own + (rank - straight) * pitch
    return ports


def _arrow(link: Edge, index: int, placed: Placed, ports: Mapping[tuple[int, bool], float]) -> Html:
    """A curve through the arrow's beads, upright wherever it leaves, enters or passes a layer."""
    stops = [(ports[index, False], _top(placed.nodes[link.source][0]) + HEIGHT)]
    for layer, cross in placed.routes[index]:
        stops += [(MARGIN + cross, _top(layer)), (MARGIN + cross, _top(layer) + HEIGHT)]
    stops.append((ports[index, True], _top(placed.nodes[link.target][0]) - 5))
    path = f"M{stops[0][0]:.1f},{stops[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(stops):
        middle = (y0 + y1) / 2
        path += f" C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"
    name = LINK_CLASSES[link.kind]
    title = tag("title", f"{link.target} {LINK_WORDS[link.kind]}: {link.source}")
    return tag("path", title, d=path, class_=f"link {name}", marker_end=f"url(#{name}-head)")


def _heads() -> Html:
    """One arrow head a kind of link, because a marker does not take its line's colour everywhere."""
    size = {"viewBox": "0 0 8 8", "refX": 3, "refY": 4, "markerWidth": 8, "markerHeight": 8, "orient": "auto"}
    markers = [
        tag(
            "marker",
            tag("path", d="M0,0 L8,4 L0,8 z", class_=f"head {name}"),
            id=f"{name}-head",
            markerUnits="userSpaceOnUse",
            **size,
        )
        for name in LINK_CLASSES.values()
    ]
    return tag("defs", markers)


def _box(run: Run, name: str, placed: Placed) -> Html:
    """Name, kind, and pass@1 as a number and a bar; what has not run yet is pale."""
    layer, cross = placed.nodes[name]
    x, y = MARGIN + cross - WIDTH / 2, _top(layer)
    stage = run.stages.get(name)
    kind = "checkpoint" if stage is None else KIND_WORDS.get(stage.kind, stage.kind)
    shown = PurePath(name).name  # a start that is no stage may be a folder
    room = int((WIDTH - 24) / CHARACTER)
    parts = [
        tag("rect", x=x, y=y, width=WIDTH, height=HEIGHT, rx=6, class_="box"),
        tag("rect", x=x, y=y + 6, width=3.5, height=HEIGHT - 12, rx=1.7, class_="stripe"),
        tag("text", shown if len(shown) <= room else shown[: room - 1] + "…", x=x + 13, y=y + 20, class_="stage"),
        tag("text", kind, x=x + 13, y=y + 34.5, class_="kind"),
    ]
    bottom = y + HEIGHT - 8
    value = number(stage.evaluation, "pass@1") if stage and stage.evaluation else None
    if value is not None:
        track = WIDTH - 72
        parts += [
            tag("rect", x=x + 13, y=bottom - 6, width=track, height=4, rx=2, class_="track"),
            tag("rect", x=x + 13, y=bottom - 6, width=max(1.0, track * value), height=4, rx=2, class_="fill"),
            tag("text", percent(value), x=x + WIDTH - 10, y=bottom, class_="value", text_anchor="end"),
        ]
    elif (words := _progress(stage)) is not None:
        parts.append(tag("text", words, x=x + 13, y=bottom, class_="kind"))
    state = "node planned" if stage and not stage.done else "node"
    color = stage.paint if stage else "--c: var(--muted)"
    return tag("g", tag("title", f"{name} ({kind})"), parts, class_=state, style=color)


def _progress(stage: StageRecord | None) -> str | None:
    """The last line of a box that has no pass@1."""
    if stage is None or stage.done:
        return None
    if stage.status == "started" and stage.steps:
        last = stage.steps[max(stage.steps)]
        return f"step {last['step']:,} of {last['steps']:,}" if "steps" in last else "started"
    return "not run yet" if stage.status == "planned" else stage.status


def _key(kind: str) -> Html:
    """The line of the legend that shows how an arrow of this kind looks."""
    name = LINK_CLASSES[kind]
    return tag(
        "svg",
        tag("path", d="M1,6 L30,6", class_=f"link {name}"),
        tag("path", d="M29,2 L37,6 L29,10 z", class_=f"head {name}"),
        viewBox="0 0 38 12",
        width=38,
        height=12,
        aria_hidden="true",
    )
