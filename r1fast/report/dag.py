"""The recipe as a picture: a box a stage, an arrow for every thing a stage needs, laid out by layers.py.

Drawn twice, along the page for wide screens and down it for narrow ones; the style sheet shows one of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

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
KIND_WORDS = {"grpo": "RL (GRPO)", "sft": "SFT", "reject": "rejection sampling", "reward_model": "reward model"}
MARGIN = 6.0


@dataclass(frozen=True, slots=True)
class Direction:
    """Sizes in pixels. A box is `width` by `height` either way; the flow goes along x or along y."""

    across: bool  # True: left to right
    width: float = 132.0
    height: float = 58.0
    between: float = 40.0  # from one layer's boxes to the next one's
    gap: float = 16.0  # between neighbours in a layer
    bead: float = 8.0

    @property
    def depth(self) -> float:
        return self.width if self.across else self.height

    @property
    def breadth(self) -> float:
        return self.height if self.across else self.width

    def point(self, flow: float, cross: float) -> tuple[float, float]:
        return (flow, cross) if self.across else (cross, flow)


WIDE = Direction(across=True)
NARROW = Direction(across=False, width=122.0, between=34.0, gap=10.0)


def picture(run: Run) -> Html:
    """Both drawings and the legend of the arrows."""
    used = {link.kind for link in run.links}
    legend = [tag("li", _key(kind), LINK_WORDS[kind]) for kind in LINK_WORDS if kind in used]
    return tag(
        "div",
        tag("div", drawing(run, WIDE, "w"), class_="wide"),
        tag("div", drawing(run, NARROW, "n"), class_="narrow"),
        tag("ul", legend, class_="key"),
        class_="recipe",
    )


def drawing(run: Run, direction: Direction, prefix: str) -> Html:
    """One SVG. `prefix` keeps the ids of its arrow heads apart from another drawing's on the page."""
    links = run.links
    names = list(dict.fromkeys([*(k.source for k in links if k.source not in run.stages), *run.stages]))
    placed = place(
        names, [(link.source, link.target) for link in links], direction.breadth, direction.bead, direction.gap
    )
    reach = max(cross for _, cross in placed.nodes.values()) + direction.breadth / 2
    reach = max([reach, *(cross + direction.bead for route in placed.routes for _, cross in route)])
    length = placed.layers * (direction.depth + direction.between) - direction.between
    width, height = direction.point(length + 2 * MARGIN, reach + 2 * MARGIN)
    ports = _ports(links, placed, direction)
    body = [_heads(prefix)]
    body += [_arrow(link, i, placed, ports, direction, prefix) for i, link in enumerate(links)]
    body += [_box(run, name, _corner(placed, name, direction), direction) for name in names]
    return tag(
        "svg",
        body,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"max-width: {width:.0f}px",
        role="img",
        aria_label="The recipe: " + "; ".join(f"{k.target} {LINK_WORDS[k.kind]}: {k.source}" for k in links),
        class_="graph",
    )


def _start(layer: int, direction: Direction) -> float:
    return MARGIN + layer * (direction.depth + direction.between)


def _corner(placed: Placed, name: str, direction: Direction) -> tuple[float, float]:
    layer, cross = placed.nodes[name]
    return direction.point(_start(layer, direction), MARGIN + cross - direction.breadth / 2)


def _ports(links: list[Edge], placed: Placed, direction: Direction) -> dict[tuple[int, bool], float]:
    """Where on a box's side each arrow leaves (False) or enters (True): spread out, in the order they come from."""
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
            pitch = min(16.0, 0.7 * direction.breadth / max(1, len(mine)))
            for rank, i in enumerate(mine):
                offset = (rank - (len(mine) - 1) / 2) * pitch
                ports[i, entering] = MARGIN + placed.nodes[name][1] + offset
    return ports


def _arrow(link: Edge, index: int, placed: Placed, ports: dict, direction: Direction, prefix: str) -> Html:
    """A curve through the arrow's beads, along the flow wherever it passes a layer."""
    source, target = placed.nodes[link.source][0], placed.nodes[link.target][0]
    stops = [(_start(source, direction) + direction.depth, ports[index, False])]
    for layer, cross in placed.routes[index]:
        stops += [
            (_start(layer, direction), MARGIN + cross),
            (_start(layer, direction) + direction.depth, MARGIN + cross),
        ]
    stops.append((_start(target, direction) - 5, ports[index, True]))
    path = "M{:.1f},{:.1f}".format(*direction.point(*stops[0]))
    for (f0, c0), (f1, c1) in pairwise(stops):
        middle = (f0 + f1) / 2
        points = [direction.point(middle, c0), direction.point(middle, c1), direction.point(f1, c1)]
        path += " C" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    name = LINK_CLASSES[link.kind]
    title = tag("title", f"{link.target} {LINK_WORDS[link.kind]}: {link.source}")
    return tag("path", title, d=path, class_=f"link {name}", marker_end=f"url(#{prefix}-{name})")


def _heads(prefix: str) -> Html:
    """One arrow head a kind of link, because a marker does not take its line's colour everywhere."""
    markers = [
        tag(
            "marker",
            tag("path", d="M0,0 L8,4 L0,8 z", class_=f"head {name}"),
            id=f"{prefix}-{name}",
            viewBox="0 0 8 8",
            refX=3,
            refY=4,
            markerWidth=8,
            markerHeight=8,
            markerUnits="userSpaceOnUse",
            orient="auto",
        )
        for name in LINK_CLASSES.values()
    ]
    return tag("defs", markers)


def _box(run: Run, name: str, corner: tuple[float, float], direction: Direction) -> Html:
    """Name, kind, and pass@1 as a number and a bar; what has not run yet is pale."""
    x, y = corner
    stage = run.stages.get(name)
    kind = "checkpoint" if stage is None else KIND_WORDS.get(stage.kind, stage.kind)
    color = f"--c: var(--s{stage.color % 10})" if stage else "--c: var(--muted)"
    room = int((direction.width - 24) / 7.4)
    shown = PurePath(name).name  # a start that is no stage may be a folder
    parts = [
        tag("rect", x=x, y=y, width=direction.width, height=direction.height, rx=6, class_="box"),
        tag("rect", x=x, y=y + 6, width=3.5, height=direction.height - 12, rx=1.7, class_="stripe"),
        tag("text", shown if len(shown) <= room else shown[: room - 1] + "…", x=x + 13, y=y + 21, class_="stage"),
        tag("text", kind, x=x + 13, y=y + 36, class_="kind"),
    ]
    value = number(stage.evaluation, "pass@1") if stage and stage.evaluation else None
    if value is not None:
        right, at = x + direction.width - 10, y + direction.height - 9
        bar = direction.width - 68
        parts += [
            tag("rect", x=x + 13, y=at - 4.5, width=bar, height=4, rx=2, class_="track"),
            tag("rect", x=x + 13, y=at - 4.5, width=max(1.0, bar * value), height=4, rx=2, class_="fill"),
            tag("text", percent(value), x=right, y=at, class_="value", text_anchor="end"),
        ]
    elif (words := _without_score(stage)) is not None:
        parts.append(tag("text", words, x=x + 13, y=y + direction.height - 9, class_="kind"))
    state = "planned" if stage and not stage.done else None
    return tag("g", tag("title", f"{name} ({kind})"), parts, class_=f"node {state or ''}".strip(), style=color)


def _without_score(stage: StageRecord | None) -> str | None:
    """The last line of a box that has no pass@1."""
    if stage is None or stage.done:
        return None
    if stage.status == "started" and stage.steps:
        last = stage.steps[max(stage.steps)]
        return f"at step {last['step']} of {last['steps']}" if "steps" in last else "started"
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
