"""Axes: which values get a tick, where a value lies in pixels, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear or logarithmic map of [low, high] onto the pixels [start, end], with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear(values: Sequence[float], start: float, end: float, count: int = 4, *, whole: bool = False) -> Scale:
    """A scale whose ends are ticks, 1, 2, 2.5 or 5 times a power of ten apart. `whole`: integers only."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (0.0, 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * low))
    step = _step((high - low) / count, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * i for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def steps_axis(values: Sequence[float], start: float, end: float, count: int = 4) -> Scale:
    """A scale for training steps: its ends are the data's own, so that the curve fills the width."""
    inside = linear(values, start, end, count, whole=True)
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    return Scale(low, high, start, end, tuple(t for t in inside.ticks if low <= t <= high))


def logarithmic(values: Sequence[float], start: float, end: float, count: int = 4) -> Scale:
    """A scale whose ends and ticks are powers of ten; at most about `count` ticks. Values must be positive."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / count))
    ticks = tuple(10.0**e for e in range(first, last + 1, every))
    return Scale(10.0**first, 10.0**last, start, end, ticks, log=True)


def _step(rough: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return max(1.0, math.ceil(step)) if whole else step


def short(value: float) -> str:
    """A number of four digits at most: 0.0123, 1.25, 27.3, 812, 7.5k, 2e-07."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit, mark in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / unit:.3g}{mark}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage: 0.974 -> 97.4%."""
    return f"{100 * value:.{digits}f}%"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 47 s, 4 min 43 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
