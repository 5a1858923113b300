"""What the person who waits sees: in a terminal a live line with a bar, the key numbers and a small curve of the
stage's main one; elsewhere (a pipe, a log file) one plain line every ten seconds.

Stages call `update` after every step, thousands of times a second in the tiny pretraining, so it only notes the
numbers (about 2 us); drawing happens four times a second in rich's own thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 48  # columns of the sparkline
PLAIN_SECONDS = 10.0
_SHARES = ("pass_rate", "accuracy", "format", "language", "kept")  # numbers shown in percent


class Curve:
    """A bounded history of one number: when full, neighbours are averaged and each point stands for twice the steps."""

    def __init__(self, points: int = CURVE_POINTS):
        self.values: list[float] = []
        self._points, self._stride = points, 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        if value != value:  # nan: a step without this number
            return
        self._sum += value
        self._count += 1
        if self._count < self._stride:
            return
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) >= 2 * self._points:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2

    def draw(self) -> str:
        """At most CURVE_POINTS block characters from the least to the greatest value."""
        values = self.values
        if len(values) > self._points:
            values = [sum(pair) / len(pair) for pair in (values[i : i + 2] for i in range(0, len(values), 2))]
        if not values:
            return ""
        low, high = min(values), max(values)
        scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(BLOCKS[round((v - low) * scale)] for v in values)


def shown(name: str, value: float) -> str:
    """A number as a person reads it."""
    label = name.replace("_", " ")
    if name in _SHARES:
        return f"{label} {100 * value:.0f}%"
    if name == "learning_rate":
        return f"lr {value:.1e}"
    if name.endswith("length"):
        return f"{label} {value:.0f}"
    return f"{label} {value:.3f}" if abs(value) < 100 else f"{label} {value:,.0f}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _State:
    """The stage that is running, as last told."""

    def __init__(self, name: str, kind: str, steps: int):
        self.name, self.kind, self.steps = name, kind, steps
        self.step = 0
        self.numbers: dict[str, float] = {}
        self.curve = Curve()
        self.note = ""
        self.began = time.monotonic()

    def update(self, step: int, numbers: dict[str, float]) -> None:
        self.step, self.note = step, ""
        self.numbers = numbers
        for value in numbers.values():  # the first is the main one
            self.curve.add(value)
            break

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def remaining(self) -> float | None:
        if not self.step or not self.steps or self.step >= self.steps:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    def facts(self) -> str:
        return "  ".join(shown(name, value) for name, value in self.numbers.items())


class PlainProgress:
    """Lines for a pipe or a file."""

    def __init__(self, stages: Iterable[str] = (), file=None):
        self._order = list(stages)
        self._file = file or sys.stdout
        self._state: _State | None = None
        self._last = 0.0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_) -> None:
        pass

    def _say(self, text: str) -> None:
        print(text, file=self._file, flush=True)
        self._last = time.monotonic()

    def stage(self, name: str, kind: str, steps: int) -> None:
        self._state = _State(name, kind, steps)
        of = f"[{self._order.index(name) + 1}/{len(self._order)}] " if name in self._order else ""
        if steps:
            self._say(f"{of}{name} ({kind}): {steps:,} steps")

    def update(self, step: int, **numbers: float) -> None:
        state = self._state
        state.update(step, numbers)
        if time.monotonic() - self._last < PLAIN_SECONDS:
            return
        left = f"  {clock(state.remaining)} left" if state.remaining is not None else ""
        self._say(f"  {state.name} {step:,}/{state.steps:,}  {state.facts()}{left}  {state.curve.draw()}")

    def note(self, text: str) -> None:
        if self._state is not None:
            self._state.note = text

    def tell(self, text: str) -> None:
        self._say(f"  {text}")

    def warn(self, text: str) -> None:
        self._say(f"! {text}")

    def finish(self, summary: str) -> None:
        state = self._state
        if state is None:
            return
        curve = state.curve.draw()
        self._say(f"✓ {state.name}  {clock(state.seconds)}  {summary}" + (f"  {curve}" if curve else ""))
        self._state = None


class LiveProgress:
    """A terminal: finished stages scroll up as lines of their own, the running one is drawn below them."""

    def __init__(self, stages: Iterable[str] = (), console: Console | None = None):
        self._order = list(stages)
        self._console = console or Console()
        self._state: _State | None = None
        self._width = max((len(name) for name in self._order), default=0)
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stderr=False,
        )

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def stage(self, name: str, kind: str, steps: int) -> None:
        self._state = _State(name, kind, steps)

    def update(self, step: int, **numbers: float) -> None:
        self._state.update(step, numbers)

    def note(self, text: str) -> None:
        if self._state is not None:
            self._state.note = text

    def tell(self, text: str) -> None:
        self._console.print(Text(f"  {text}", style="dim"))

    def warn(self, text: str) -> None:
        self._console.print(Text.assemble(("! ", "yellow"), text))

    def finish(self, summary: str) -> None:
        state, self._state = self._state, None
        if state is None:
            return
        line = Text.assemble(
            ("✓ ", "green"), (state.name.ljust(self._width), "bold"), f"  {clock(state.seconds):>6}  ", summary
        )
        curve = state.curve.draw()
        if curve:
            first = next(iter(state.numbers), "")
            line.append(f"\n  {'':{self._width}}          {first.replace('_', ' ')} ", "dim")
            line.append(curve, "cyan")
        self._console.print(line)

    def _draw(self) -> Group | Text:
        state = self._state
        if state is None:
            return Text("")
        done = f"{self._order.index(state.name) + 1}/{len(self._order)} " if state.name in self._order else ""
        head = Table.grid(padding=(0, 1))
        remaining = "" if state.remaining is None else f"{clock(state.remaining)} left"
        head.add_row(
            Text.assemble(("▶ ", "cyan"), (done, "dim"), (state.name, "bold"), (f" {state.kind}", "dim")),
            ProgressBar(total=state.steps or 1, completed=state.step, width=24),
            Text(f"{state.step:,}/{state.steps:,}"),
            Text(f"{clock(state.seconds)}  {remaining}", style="dim"),
            Text(state.note, style="italic"),
        )
        return Group(head, Text(f"  {state.facts()}"), Text(f"  {state.curve.draw()}", style="cyan"))


class NoProgress:
    """Of a rank that does not speak; what it must say all the same (its own hang) goes to standard error."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_) -> None:
        pass

    def _nothing(self, *_, **__) -> None:
        pass

    stage = update = note = tell = finish = _nothing

    def warn(self, text: str) -> None:
        print(f"! rank {self._rank}: {text}", file=sys.stderr, flush=True)


def for_output(stages: Iterable[str], rank: int = 0) -> LiveProgress | PlainProgress | NoProgress:
    """The live display where standard output is a terminal, plain lines elsewhere; of several ranks the first's."""
    if rank:
        return NoProgress(rank)
    console = Console()
    return LiveProgress(stages, console) if console.is_terminal else PlainProgress(stages)
