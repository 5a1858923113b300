"""How a program that turns out to be long makes way, so that those behind it need not wait for its end.

A pool has as many lanes as there are cores. Whoever has had his share of one says so from wherever he is (the clock
beside a program does, watch.py), and the pool decides: `current` leads from there to the pool, through the worker.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol


class Lane(Protocol):
    """The lane that an item is judged in."""

    held: bool

    def leave(self, resident: int) -> None:
        """Gives it up and goes on beside it: what is judged waits rather than computes. It has `resident` bytes."""

    def park(self, resident: int) -> None:
        """Gives it up and returns when there is one again. What is judged stands still meanwhile; no time of its
        deadline passes."""


current: ContextVar[Lane | None] = ContextVar("current", default=None)  # None: nobody waits for this one


def hold() -> None:
    """Waits for a lane where this item has given its own up: what it starts next is to have one."""
    lane = current.get()
    if lane is not None and not lane.held:
        lane.park(0)
