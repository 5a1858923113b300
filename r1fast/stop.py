"""Being asked to stop: the first SIGINT or SIGTERM ends a run in good order, the second at once.

While a step is under way the first signal is only noted: the step is finished and saved, and then the run ends with
`Stopped`. Anywhere else nothing is lost by stopping, so it ends there. `Stopped` is a KeyboardInterrupt: all that
cleans up after one cleans up after it.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run ended because it was asked to; all that is finished is on disk."""


class Stalled(KeyboardInterrupt):
    """The run was ended because it hung (watchdog.py); the message says where."""


class StopRequest:
    """Whether somebody has asked, and whether it has to wait. Inert until `listening`."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.requested = False
        self._stalled: str | None = None
        self._waiting = 0
        self._say = say or (lambda text: print(text, file=sys.stderr))

    def request(self) -> None:
        """What the first signal does: noted inside `step`, Stopped outside of it."""
        self.requested = True
        if not self._waiting:
            raise Stopped

    def stalled(self, what: str) -> None:
        """Makes the main thread raise Stalled(what), in a step or not. From any thread."""
        self._stalled = what
        _thread.interrupt_main()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within the block a first signal is only noted: whoever opened it looks at `requested` when it is over."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Takes the signals over for the block. Only a main thread can: elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _frame: object) -> None:
        if self._stalled is not None:
            raise Stalled(self._stalled)
        if self.requested:
            raise KeyboardInterrupt
        if self._waiting:
            name = signal.Signals(number).name
            self._say(f"{name}: this step is finished and saved, then the run stops; once more stops it at once")
        self.request()
