"""Where the boxes and arrows of a recipe go: a small layered layout (Sugiyama, Tagawa and Toda 1981).

A stage lies one layer behind the last thing it needs; an arrow that passes layers gets a bead in each, so that it has
room of its own and goes round the boxes; the order within a layer is swept towards the fewest crossings; and the
places are the least-squares ones that keep the gaps. `flow` is the direction of the arrows, `cross` the other one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from r1fast.report.spread import spread

Item = str | tuple[int, int]  # a node's name, or the bead of edge i in layer l
SWEEPS = 24
FIXED = 1e6  # weight of the spine's boxes, which are to lie in one line
STRAIGHT = 6.0  # how much more a bead wants to be straight than a box wants to be near its neighbours


@dataclass(frozen=True, slots=True)
class Placed:
    """`nodes[name]` is (layer, cross); `routes[i]` the (layer, cross) of edge i's beads, in its direction."""

    nodes: dict[str, tuple[int, float]]
    routes: list[list[tuple[int, float]]]
    layers: int


def place(nodes: Sequence[str], edges: Sequence[tuple[str, str]], size: float, bead: float, gap: float) -> Placed:
    """Lays out an acyclic graph. `size` and `bead` are the extents of a box and of a passing arrow across the flow."""
    layer = _layers(nodes, edges)
    count = max(layer.values()) + 1
    columns: list[list[Item]] = [[n for n in nodes if layer[n] == level] for level in range(count)]
    links: list[tuple[Item, Item]] = []
    beads: list[list[Item]] = []
    for index, (source, target) in enumerate(edges):
        between: list[Item] = [(index, level) for level in range(layer[source] + 1, layer[target])]
        for item in between:
            columns[item[1]].append(item)
        path = [source, *between, target]
        links += list(pairwise(path))
        beads.append(between)
    neighbours = _neighbours(links)
    columns = _order(columns, links, neighbours)
    spine = _spine(nodes, edges, layer)
    cross = _places(columns, neighbours, spine, size, bead, gap)
    low = min(c - (size if isinstance(i, str) else bead) / 2 for i, c in cross.items())
    cross = {item: c - low for item, c in cross.items()}
    return Placed(
        nodes={n: (layer[n], cross[n]) for n in nodes},
        routes=[[(item[1], cross[item]) for item in route] for route in beads],
        layers=count,
    )


def _layers(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from the sources; then a source that is needed late moves there with all that needs it alone."""
    parents = defaultdict(list)
    children = defaultdict(list)
    for source, target in edges:
        parents[target].append(source)
        children[source].append(target)
    layer: dict[str, int] = {}

    def depth(node: str) -> int:
        if node not in layer:
            layer[node] = 1 + max((depth(p) for p in parents[node]), default=-1)
        return layer[node]

    for node in nodes:
        depth(node)
    for source in (n for n in nodes if not parents[n]):
        own = _only_from(source, nodes, parents)
        slack = [layer[c] - layer[n] - 1 for n in own for c in children[n] if c not in own]
        if slack:
            for node in own:
                layer[node] += min(slack)
    return layer


def _only_from(source: str, nodes: Sequence[str], parents: Mapping[str, list[str]]) -> set[str]:
    """The nodes that nothing but `source` leads to, itself included."""
    own = {source}
    for _ in nodes:
        own |= {n for n in nodes if parents[n] and all(p in own for p in parents[n])}
    return own


def _neighbours(links: Sequence[tuple[Item, Item]]) -> dict[Item, list[Item]]:
    near: dict[Item, list[Item]] = defaultdict(list)
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    return near


def _order(columns: list[list[Item]], links: Sequence[tuple[Item, Item]], near: Mapping[Item, list[Item]]):
    """Barycentre sweeps to and fro; the order with the fewest crossings of all seen."""
    best, fewest = columns, _crossings(columns, links)
    for sweep in range(SWEEPS):
        columns = [list(column) for column in columns]
        levels = range(1, len(columns)) if sweep % 2 == 0 else range(len(columns) - 2, -1, -1)
        for level in levels:
            beside = columns[level - 1] if sweep % 2 == 0 else columns[level + 1]
            rank = {item: i for i, item in enumerate(beside)}

            def key(item: Item, rank: dict = rank, own: list = columns[level]) -> float:
                ranks = [rank[n] for n in near[item] if n in rank]
                return sum(ranks) / len(ranks) if ranks else own.index(item)

            columns[level] = sorted(columns[level], key=key)
        crossings = _crossings(columns, links)
        if crossings < fewest:
            best, fewest = columns, crossings
    return best


def _crossings(columns: list[list[Item]], links: Sequence[tuple[Item, Item]]) -> int:
    spot = {item: (level, i) for level, column in enumerate(columns) for i, item in enumerate(column)}
    by_level: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, b in links:
        by_level[spot[a][0]].append((spot[a][1], spot[b][1]))
    return sum(
        (a - c) * (b - d) < 0 for pairs in by_level.values() for i, (a, b) in enumerate(pairs) for c, d in pairs[:i]
    )


def _spine(nodes: Sequence[str], edges: Sequence[tuple[str, str]], layer: Mapping[str, int]) -> set[str]:
    """The boxes of a longest path: drawn in one straight line, the rest of the picture goes round them."""
    longest: dict[str, list[str]] = {}
    for node in sorted(nodes, key=layer.__getitem__):
        before = [longest[a] for a, b in edges if b == node and layer[a] == layer[node] - 1]
        longest[node] = [*max(before, key=len, default=[]), node]
    return set(max(longest.values(), key=len))


def _places(
    columns: list[list[Item]], near: Mapping[Item, list[Item]], spine: set[str], size: float, bead: float, gap: float
) -> dict[Item, float]:
    """Every item moves towards the mean of its neighbours, layer by layer, until the picture has settled."""
    extent = {item: size if isinstance(item, str) else bead for column in columns for item in column}
    cross = {}
    for column in columns:
        at = 0.0
        for item in column:
            cross[item] = at + extent[item] / 2
            at += extent[item] + gap
    routes: dict[int, list[Item]] = defaultdict(list)
    for item in cross:
        if isinstance(item, tuple):
            routes[item[0]].append(item)

    def wish(item: Item, settled: bool) -> tuple[float, float]:
        """(where to, how strongly): the spine to 0, late beads to their route's outermost, all else to the mean."""
        if item in spine:
            return 0.0, FIXED
        if settled and isinstance(item, tuple):
            return max((cross[bead] for bead in routes[item[0]]), key=abs), STRAIGHT
        pulls = [STRAIGHT if isinstance(n, tuple) and isinstance(item, tuple) else 1.0 for n in near[item]]
        total = sum(p * cross[n] for p, n in zip(pulls, near[item], strict=True))
        return (total / sum(pulls), max(1.0, sum(pulls))) if pulls else (cross[item], 1.0)

    for sweep in range(SWEEPS * 2):
        for column in columns:
            wishes = [wish(item, sweep >= SWEEPS) for item in column]
            gaps = [(extent[a] + extent[b]) / 2 + gap for a, b in pairwise(column)]
            places = spread([to for to, _ in wishes], gaps, [weight for _, weight in wishes])
            cross.update(zip(column, places, strict=True))
    return cross
