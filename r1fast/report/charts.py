"""Line charts as inline SVG, drawn here so that the page needs no library, follows the reader's light or dark setting
(every colour is a CSS variable of page.css) and stays small: a chart is a few kilobytes.

A chart is 360 units wide and meant to be shown about that wide: a page has one, two or three beside each other, so
that text keeps its size from a phone to a desk. page.js reads the data-* attributes to say values under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from r1fast.report.markup import Html, tag
from r1fast.report.scale import Scale, linear, logarithmic, percent, short, steps_axis
from r1fast.report.spread import spread, within

WIDTH, HEIGHT = 360.0, 214.0
TOP, BOTTOM = 12.0, 24.0
CHARACTER = 6.7  # width of a character of the 11 px label font, measured; labels decide the margins
MOST_POINTS = 240  # more do not show at 360 px; longer series are averaged in equal runs of steps
FEWEST_SMOOTHED = 24  # shorter series are drawn as they are


@dataclass(frozen=True, slots=True)
class Line:
    """One series. `ys` may hold None (nothing measured there)."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    paint: str  # the style that colours it: StageRecord.paint
    dashed: bool = False
    marked: bool = False  # a dot at each point: for the few points of an evaluation

    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


@dataclass(frozen=True, slots=True)
class Panel:
    """What a chart says besides its lines."""

    title: str
    unit: str = ""  # beside the title
    share: bool = False  # written as percentages
    whole: bool = False  # the axis is 0 to 1, whatever was measured
    log: bool = False
    smooth: bool = True  # noisy series: the raw line faint, its trend over it
    zero: bool = True  # the axis includes 0


def downsample(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of a run of neighbours; a shorter list is returned as it is."""
    if len(points) <= most:
        return points
    edges = [len(points) * i // most for i in range(most + 1)]
    runs = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def trend(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At each point the least-squares straight line through its neighbours: an eighth of the series, 11 points at most.

    A plain running mean lies beside a steep curve and ends in a hook; a local line does neither (Cleveland 1979).
    """
    half = min(5, max(2, len(points) // 16))
    smooth = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        mean_x, mean_y = (sum(values) / len(near) for values in zip(*near, strict=True))
        spread_x = sum((a - mean_x) ** 2 for a, _ in near)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in near) / spread_x if spread_x else 0.0
        smooth.append((x, mean_y + slope * (x - mean_x)))
    return smooth


def drawable(lines: Sequence[Line]) -> list[Line]:
    """The lines with something to see: two points at least, not all of them zero."""
    return [line for line in lines if len(line.known()) > 1 and any(y for _, y in line.known())]


def line_chart(panel: Panel, lines: Sequence[Line]) -> Html:
    """A figure with its title, or nothing where no line has two points or all are zero."""
    lines = drawable(lines)
    if panel.log:
        lines = [line for line in lines if sum(y > 0 for _, y in line.known()) > 1]
    if not lines:
        return Html("")
    points = [downsample([(x, y) for x, y in line.known() if y > 0 or not panel.log]) for line in lines]
    y = _y_scale(panel, [value for series in points for _, value in series])
    write = _writer(panel, y)
    left = 10 + CHARACTER * max(len(write(tick)) for tick in y.ticks)
    right = 14 + CHARACTER * max(len(line.label) for line in lines)
    x = steps_axis([step for series in points for step, _ in series], left, WIDTH - right)
    body = [_grid(x, y, write), *_series(panel, lines, points, x, y)]
    svg = tag(
        "svg",
        body,
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=_spoken(panel, lines, points, write),
        class_="chart",
        data_left=left,
        data_right=WIDTH - right,
        data_low=f"{x.low:g}",
        data_high=f"{x.high:g}",
        data_share=panel.share,
    )
    caption = tag("figcaption", tag("b", panel.title), tag("span", panel.unit) if panel.unit else None)
    return tag("figure", caption, svg)


def _writer(panel: Panel, y: Scale) -> Callable[[float], str]:
    """How the values of an axis are written: percentages with the digits that tell one tick from the next."""
    if not panel.share:
        return short
    digits = max(0, math.ceil(-math.log10(100 * (y.ticks[1] - y.ticks[0])) - 1e-9))
    return lambda value: percent(value, digits)


def _y_scale(panel: Panel, values: list[float]) -> Scale:
    low, high = HEIGHT - BOTTOM, TOP
    if panel.log:
        return logarithmic(values, low, high)
    if panel.whole:
        return linear([0.0, 1.0], low, high)
    return linear([*values, 0.0] if panel.zero else values, low, high)


def _grid(x: Scale, y: Scale, write: Callable[[float], str]) -> list[Html]:
    parts = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", write(tick), x=x.start - 6, y=at + 3.8, class_="tick", text_anchor="end"))
    for index, tick in enumerate(x.ticks):
        last = index == len(x.ticks) - 1
        anchor = "end" if last and x.end - x(tick) < 8 else "middle"
        words = f"step {short(tick)}" if last else short(tick)
        parts.append(tag("text", words, x=x(tick), y=HEIGHT - 7, class_="tick", text_anchor=anchor))
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    return parts


def _series(panel: Panel, lines: list[Line], points: list[list[tuple[float, float]]], x: Scale, y: Scale) -> list[Html]:
    """The lines, then their names at the right end, moved apart where the ends are close."""
    parts, ends = [], []
    for line, series in zip(lines, points, strict=True):
        shown = series
        style = line.paint
        if panel.smooth and not line.marked and len(series) >= FEWEST_SMOOTHED:
            parts.append(_polyline(series, x, y, class_="raw", style=style))
            shown = trend(series)
        parts.append(
            _polyline(
                shown,
                x,
                y,
                class_="line dashed" if line.dashed else "line",
                style=style,
                data_label=line.label,
                data_x=",".join(f"{a:.6g}" for a, _ in series),
                data_y=",".join(f"{b:.4g}" for _, b in series),
            )
        )
        if line.marked:
            parts += [tag("circle", cx=x(a), cy=y(b), r=2.4, class_="dot", style=style) for a, b in shown]
        ends.append(y(shown[-1][1]))
    order = sorted(range(len(lines)), key=lambda i: ends[i])
    places = within(spread([ends[i] for i in order], [12.5] * (len(order) - 1)), TOP, HEIGHT - BOTTOM)
    for i, place in zip(order, places, strict=True):
        parts.append(tag("text", lines[i].label, x=x.end + 7, y=place + 3.8, class_="name", style=lines[i].paint))
    return parts


def _polyline(points: list[tuple[float, float]], x: Scale, y: Scale, **attributes: str) -> Html:
    where = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return tag("polyline", points=where, **attributes)


def _spoken(panel: Panel, lines: list[Line], points: list[list[tuple[float, float]]], write: Callable) -> str:
    """What a screen reader says: every line's first and last value."""
    ends = [
        f"{line.label} from {write(series[0][1])} to {write(series[-1][1])}"
        for line, series in zip(lines, points, strict=True)
    ]
    return f"{panel.title}: " + "; ".join(ends)
