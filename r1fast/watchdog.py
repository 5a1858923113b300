"""A run that hangs says where, and ends: nobody finds it the next morning still waiting.

The watchdog asks the phase timer which phase is open and for how long. A phase may take `factor` times the longest it
has taken so far in this run, and at least `least_seconds`; a run that has not been through it once is given
`first_seconds`. Past that the stacks of all threads, and what the processes it started are doing, go to
RUN_DIR/stall-<pid>.txt, and the run is ended: first by an interrupt of its main thread, which cleans up, and where that
is not heard (a thread that waits in a library) by leaving the process. Native code that hangs and holds Python's lock
stops this thread too: then faulthandler's own thread, which needs no lock, writes the stacks to standard error and
leaves. What was saved is on disk, so --resume goes on from there.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1fast.metrics import PhaseTimer
    from r1fast.schema import WatchdogConfig

STALLED = 75  # exit code of a run that was ended where it could not clean up (EX_TEMPFAIL: try again)
GRACE = 20.0  # seconds for the main thread to hear the interrupt
UNHEARD = 120.0  # seconds that this thread may be kept from running, beyond what the phase is allowed


class Watchdog:
    """Watches one stage's phase timer from a thread of its own; use as a context."""

    def __init__(
        self,
        timer: PhaseTimer,
        directory: Path,
        config: WatchdogConfig,
        interrupt: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
        every: float = 1.0,
    ) -> None:
        """interrupt(what happened): makes the main thread raise. leave(code): ends the process where it did not."""
        self.timer, self.directory, self.config = timer, directory, config
        self._interrupt, self._leave, self._every = interrupt, leave, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.config.enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def allowed(self, phase: str) -> float:
        """Seconds that the phase may take now."""
        longest = self.timer.longest.get(phase)
        if longest is None:
            return self.config.first_seconds
        return max(self.config.least_seconds, self.config.factor * longest)

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            phase, seconds = self.timer.running()
            if phase is None:
                faulthandler.cancel_dump_traceback_later()
            elif seconds > self.allowed(phase):
                self._end(phase, seconds)
                break
            else:
                left = self.allowed(phase) - seconds + UNHEARD
                faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, phase: str, seconds: float) -> None:
        path, longest = self.directory / f"stall-{os.getpid()}.txt", self.timer.longest.get(phase, 0.0)
        told = (
            f"the phase {phase!r} has taken {seconds:.0f} s, {self.allowed(phase):.0f} s were allowed (the longest so "
            f"far took {longest:.1f} s): the run is taken for hung and ends. The stacks of its threads are in {path}; "
            f"watchdog.factor and watchdog.least_seconds allow more"
        )
        try:
            write_stacks(path, told)
        except OSError as error:
            told += f" ({path} could not be written: {error.strerror})"
        self._interrupt(told)
        if not self._over.wait(GRACE):
            print(f"error: {told}", file=sys.stderr, flush=True)
            self._leave(STALLED)


def write_stacks(path: Path, why: str) -> None:
    """The Python stacks of all threads of this process, and what the processes below it are doing."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()
        file.write(f"\nprocesses below {os.getpid()}:\n{_children()}")
        file.flush()
        os.fsync(file.fileno())


def _children() -> str:
    command = ["ps", "-o", "pid,ppid,stat,etime,wchan:20,args", "--ppid", str(os.getpid())]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "ps could not be asked\n"
