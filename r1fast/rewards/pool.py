"""Worker processes for rewards that may hang or crash: a deadline for every item, and a kill that always works.

A hang or a crash costs one sample its score (an error, never a zero) and one worker its life; the rest goes on.

A pool has as many lanes as there are cores. A program that has had its share of one makes way (lane.py): it stands
still until no fresh one waits, so that a hostile one costs the others its share and not its limit. Fresh ones come
first, then the parked in their order; where those become too many or too large, they come first. An item of a reward
that cannot make way leaves its lane to another worker after SLOW seconds and goes on beside it.

Our own small pool, because a library's (pebble, concurrent.futures) starts workers through multiprocessing, which
imports the caller's main module again: rewards are called from scripts and notebooks that do not expect it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import selectors
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

from r1fast import plugins
from r1fast.rewards.base import Score, get, settings
from r1fast.rewards.process import Item, Job, Worker

CROWD = 4  # workers at most, times the lanes
STANDING = 16  # programs parked at most, and as many beside, times the lanes: each has some processes and a thread
BARE = 1  # the same without namespaces, where the limit on processes counts all of the user's together
RESIDENT = 1 << 30  # bytes that they may hold together, times the lanes: what one that runs may
CACHED = 65_536  # verdicts remembered; the same answer comes again and again within a group


class RewardPool:
    """Judges items in parallel. Starts no process before the first `run`; use as a context, or `close` it."""

    def __init__(self, workers: int | None = None, deadline: float | None = None) -> None:
        """workers: lanes, by default those of the settings, or one per core up to 8. deadline: seconds for one item
        of a reward that does not set its own, by default those of the settings."""
        self.size = workers or settings().workers or min(8, _cores())
        self.deadline = deadline or settings().deadline
        self.plugins = plugins.loaded()
        self.restarts = 0  # workers that hung or crashed so far
        self._workers: list[Worker] = []
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the next `run` starts new ones."""
        while self._workers:
            self._workers.pop().kill()

    def run(self, items: Sequence[Item]) -> list[Score]:
        """The score of every item, in order. Equal items are judged once; errors are not remembered, for a hang may
        have been the machine's."""
        with self._lock:
            keys = [_key(item) for item in items]
            fresh: dict[bytes, Item] = {}
            scores: dict[bytes, Score] = {}
            for key, item in zip(keys, items, strict=True):
                if key in self._cache:
                    self._cache.move_to_end(key)
                    scores[key] = self._cache[key]
                else:
                    fresh[key] = item
            for key, score in zip(fresh, self._judge(list(fresh.values())), strict=True):
                scores[key] = score
                if score.error is None:
                    self._cache[key] = score
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return [scores[key] for key in keys]

    def _judge(self, items: list[Item]) -> list[Score]:
        scores: list[Score | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        try:
            while waiting or any(worker.jobs for worker in self._workers):
                self._assign(waiting, items, scores)
                self._collect(waiting, scores)
        except BaseException:  # an interrupt: what is in flight must not answer the next run
            self.close()
            raise
        while len(self._workers) > self.size:
            self._workers.pop().kill()
        return scores  # type: ignore[return-value]

    def _jobs(self, *places: str) -> list[tuple[Worker, Job]]:
        """Every item on its way, or those in these places."""
        jobs = ((worker, job) for worker in self._workers for job in worker.jobs.values())
        return [(worker, job) for worker, job in jobs if not places or job.place in places]

    def _assign(self, waiting: deque[int], items: list[Item], scores: list[Score | None]) -> None:
        """Gives every free lane a fresh item, or a parked one."""
        now = time.monotonic()
        most = self.size * (BARE if settings().sandbox == "rlimits" else STANDING)
        crowding = max(0, len(self._jobs("beside")) - most)
        free = self.size - sum(job.holds(now) for _, job in self._jobs()) - crowding
        while free > 0:
            parked = self._jobs("parked")
            large = sum(job.resident for _, job in self._jobs("parked", "beside")) > RESIDENT * self.size
            full = large or len(parked) > most
            worker = self._idle() if waiting and not full else None
            try:
                if worker is not None:
                    number = waiting.popleft()
                    name, _, reference = items[number]
                    worker.send(number, items[number], get(name).deadline(reference) or self.deadline)
                elif parked:
                    worker, job = min(parked, key=lambda entry: (-entry[1].resident * large, entry[1].number))
                    worker.resume(job)
                else:
                    return
            except BrokenPipeError:
                self._lose(worker, waiting, scores)
            free -= 1

    def _idle(self) -> Worker | None:
        """The worker for a fresh item, started where there is none and may be; the least burdened."""
        idle = [worker for worker in self._workers if worker.idle]
        if not idle and len(self._workers) < CROWD * self.size:
            self._workers.append(Worker())
            return self._workers[-1]
        return min(idle, key=lambda worker: len(worker.jobs), default=None)

    def _collect(self, waiting: deque[int], scores: list[Score | None]) -> None:
        """Waits for the next word, death, deadline or (while items wait) free lane, and deals with what came."""
        busy = self._jobs("lane", "beside")
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in {worker for worker, _ in busy}:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            now = time.monotonic()
            soonest = min(job.expires for _, job in busy)
            if waiting:
                soonest = min([soonest, *(job.slow for _, job in busy if job.holds(now))])
            ready = selector.select(max(0.0, soonest - now))
        for key, _ in ready:
            try:
                for number, score in key.data.receive().items():
                    scores[number] = score
            except EOFError:
                self._lose(key.data, waiting, scores)
        now = time.monotonic()
        for worker, job in busy:
            if job.number in worker.jobs and job.place != "parked" and job.expires <= now:
                self._lose(worker, waiting, scores, late=job)

    def _lose(self, worker: Worker, waiting: deque[int], scores: list[Score | None], late: Job | None = None) -> None:
        """Buries a worker. The item that was late gets the error; where none was, those that ran. Those that stood by
        are judged anew."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self.restarts += 1
        code = worker.kill()
        jobs = list(worker.jobs.values())
        places = [place for place in ("lane", "beside", "parked") if any(job.place == place for job in jobs)]
        for job in reversed(jobs):
            if job is late:
                why = f"no verdict within {worker.allowed(job):g} s"
            elif late is None and job.place == places[0]:
                why = f"the verifier's process died (exit code {code})"
            else:
                waiting.appendleft(job.number)
                continue
            scores[job.number] = Score(0.0, f"{job.reward}: {why}")
        worker.jobs.clear()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(item: Item) -> bytes:
    """The item's content, in a size that does not keep a megabyte of completion alive."""
    return hashlib.blake2b(json.dumps(item, sort_keys=True, default=str).encode(), digest_size=16).digest()


_shared: RewardPool | None = None
_shared_lock = threading.Lock()


def shared() -> RewardPool:
    """The process's own pool, for whoever has none: rewards called directly, scoring without a pool. A new one when
    plugins have been loaded since it was made: its workers do not know their rewards."""
    global _shared
    if _shared is not None and _shared.plugins != plugins.loaded():
        close_shared()
    with _shared_lock:
        if _shared is None:
            _shared = RewardPool()
            atexit.register(close_shared)
        return _shared


def close_shared() -> None:
    """Ends the shared pool; the next use starts it again."""
    global _shared
    with _shared_lock:
        if _shared is not None:
            _shared.close()
            _shared = None
            atexit.unregister(close_shared)
