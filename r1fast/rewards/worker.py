"""The other side of the reward pool: a process that judges one completion at a time and may be killed at any moment.

Each has a thread, because a program that made way is tended by its own until its turn comes again. One JSON object a
line, in on standard input, out on what was standard output:
    <- {"settings": ..., "plugins": [...]}          first, once
    <- {"job": number, "module": ..., "reward": ..., "completion": ..., "reference": ..., "seconds": ...}
    -> {"job": number, "says": "prepared"}          only before the first verdict of each reward
    -> {"job": number, "says": "beside", "resident": bytes}     its lane is free (lane.py)
    -> {"job": number, "says": "parked", "resident": bytes}
    <- {"go": number}                               after `parked`
    -> {"job": number, "says": "verdict", "value": ..., "error": ...}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any, TextIO

from r1fast import plugins
from r1fast.rewards import lane
from r1fast.rewards.base import Reward, Score, configure, get
from r1fast.schema import RewardsConfig

MEMORY = 2 << 30  # bytes of address space; sympy needs a tenth of it, 9^9^9^9 would take all there is
STACK = 8 << 20  # bytes of each thread's: the usual main thread's, which parsers are made for
GRACE = 5.0  # seconds after the deadline at which a worker whose parent is gone ends itself


def limit_memory() -> None:
    """Makes a computation that grows without bound fail by itself; where there are no limits (Windows), nothing."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))


class _Alarm:
    """The process's one timer, set for whichever of its jobs must end first."""

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}
        self._lock = threading.Lock()

    def set(self, job: int, seconds: float) -> None:
        with self._lock:
            self._ends[job] = time.monotonic() + seconds + GRACE
            self._arm()

    def clear(self, job: int) -> float:
        """The seconds that were left."""
        with self._lock:
            left = self._ends.pop(job) - time.monotonic() - GRACE
            self._arm()
        return left

    def _arm(self) -> None:
        # The default action of the signal ends the process from the kernel: it works inside C code too.
        if hasattr(signal, "setitimer"):
            first = min(self._ends.values(), default=0.0)
            signal.setitimer(signal.ITIMER_REAL, max(0.001, first - time.monotonic()) if first else 0.0)


class _Place:
    """A job's lane, as far as this side knows of it."""

    def __init__(self, job: int, worker: _Worker) -> None:
        self._job, self._worker = job, worker
        self.held, self.go = True, threading.Event()

    def leave(self, resident: int) -> None:
        self.held = False
        self._worker.say(self._job, "beside", resident=resident)

    def park(self, resident: int) -> None:
        left = self._worker.alarm.clear(self._job)
        self._worker.say(self._job, "parked", resident=resident)
        self.go.wait()
        self.go.clear()
        self._worker.alarm.set(self._job, left)
        self.held = True
        if self._worker.over:
            raise SystemExit  # of this thread: whatever it holds is let go of


class _Worker:
    """What the jobs of this process share."""

    def __init__(self, replies: TextIO) -> None:
        self._replies, self._lock = replies, threading.Lock()
        self._known: dict[str, Reward] = {}
        self._jobs: dict[int, tuple[_Place, threading.Thread]] = {}
        self.alarm = _Alarm()
        self.over = False

    def say(self, job: int, what: str, **more: Any) -> None:
        with self._lock:
            print(json.dumps({"job": job, "says": what, **more}), file=self._replies)

    def take(self, message: dict) -> None:
        """A question, or the word that a parked job's turn has come."""
        if "go" in message:
            self._jobs[message["go"]][0].go.set()
            return
        number = message["job"]
        place = _Place(number, self)
        thread = threading.Thread(target=self._serve, args=(message, place), daemon=True)
        self._jobs[number] = place, thread
        thread.start()

    def end(self) -> None:
        """Nobody asks any more: what stands still is let go of, what runs may end."""
        self.over = True
        jobs = list(self._jobs.values())
        for place, _ in jobs:
            place.go.set()
        deadline = time.monotonic() + GRACE
        for _, thread in jobs:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, job: dict, place: _Place) -> None:
        number, name = job["job"], job["reward"]
        lane.current.set(place)
        try:
            if name not in self._known:
                self._known[name] = _find(job["module"], name)
                self.say(number, "prepared")
            self.alarm.set(number, job["seconds"])
            try:
                score = self._known[name].attempt(job["completion"], job["reference"])
            finally:
                self.alarm.clear(number)
        except Exception as error:  # a reward that cannot even be loaded
            score = Score(0.0, f"{type(error).__name__}: {error}"[:300])
        finally:
            del self._jobs[number]
        with contextlib.suppress(BrokenPipeError):  # nobody asks any more
            self.say(number, "verdict", value=score.value, error=score.error)


def _find(module: str, name: str) -> Reward:
    importlib.import_module(module)  # registers it
    reward = get(name)
    reward.prepare()
    return reward


def main() -> None:
    """Serves until standard input ends."""
    # What libraries print must not be taken for a verdict: the real output is kept aside, and 1 goes where 2 goes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    limit_memory()
    threading.stack_size(STACK)
    given = json.loads(sys.stdin.readline())
    configure(RewardsConfig(**given["settings"]))
    plugins.load(given["plugins"])
    worker = _Worker(replies)
    for line in sys.stdin:
        worker.take(json.loads(line))
    worker.end()


if __name__ == "__main__":
    main()
