"""Worker processes for rewards that may hang or crash: a deadline for every item, and a kill that always works.

A hang or a crash costs one sample its score (an error, never a zero) and one worker its life; the rest goes on.
A pool has as many lanes as there are cores. An item that takes longer than SLOW leaves its lane to another worker and
goes on beside them, so that completions that hang do not stand in the way of those that do not.

Our own small pool, because a library's (pebble, concurrent.futures) starts workers through multiprocessing, which
imports the caller's main module again: rewards are called from scripts and notebooks that do not expect it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

from r1fast import plugins
from r1fast.rewards.base import Reference, Score, get, settings

STARTUP = 120.0  # seconds for a worker to import what a reward needs; sympy takes several on a busy machine
SLOW = 0.5  # seconds after which an item no longer holds up its lane
CROWD = 4  # workers at most, times the lanes
CACHED = 65_536  # verdicts remembered; the same answer comes again and again within a group

Item = tuple[str, str, Reference]  # reward's name, completion, reference


class _Worker:
    """One process and what it is doing."""

    def __init__(self, deadline: float) -> None:
        # -P keeps the working directory from the front of the path; the parent's own path is handed on whole.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "r1fast.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self.prepared: set[str] = set()
        self.buffer = b""
        self.job: int | None = None
        self.reward = ""
        self.seconds = self.deadline = deadline
        self.expires = self.slow = 0.0
        given = {"settings": settings().model_dump(mode="json"), "plugins": plugins.loaded()}
        with contextlib.suppress(BrokenPipeError):  # found dead when it is asked something
            self._write(given)

    def _write(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def send(self, job: int, item: Item) -> None:
        name, completion, reference = item
        seconds = get(name).deadline(reference) or self.deadline
        message = {
            "module": type(get(name)).__module__,
            "reward": name,
            "completion": completion,
            "reference": reference,
            "seconds": seconds,
        }
        self.job, self.reward, self.seconds = job, name, seconds
        self._expect(seconds if name in self.prepared else STARTUP)
        self._write(message)

    def _expect(self, seconds: float) -> None:
        now = time.monotonic()
        self.expires, self.slow = now + seconds, now + (SLOW if self.reward in self.prepared else STARTUP)

    def receive(self) -> Score | None:
        """What has arrived: a verdict, or None for "not yet". EOFError when the process is gone."""
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "prepared" in reply:
                self.prepared.add(reply["prepared"])
                self._expect(self.seconds)  # the clock starts when the imports are done
            else:
                self.job = None
                return Score(**reply)
        return None

    def kill(self) -> int:
        """Ends the process whatever it is doing; its exit code."""
        self.process.kill()
        code = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # the rest of a message to a process that died while reading it
            self.process.stdin.close()
        return code


class RewardPool:
    """Judges items in parallel. Starts no process before the first `run`; use as a context, or `close` it."""

    def __init__(self, workers: int | None = None, deadline: float | None = None) -> None:
        """workers: lanes, by default those of the settings, or one per core up to 8. deadline: seconds for one item
        of a reward that does not set its own, by default those of the settings."""
        self.size = workers or settings().workers or min(8, _cores())
        self.deadline = deadline or settings().deadline
        self.restarts = 0  # workers that hung or crashed so far
        self._workers: list[_Worker] = []
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
            while waiting or any(worker.job is not None for worker in self._workers):
                self._assign(waiting, items, scores)
                self._collect(scores, bool(waiting))
        except BaseException:  # an interrupt: what is in flight must not answer the next run
            self.close()
            raise
        while len(self._workers) > self.size:
            self._workers.pop().kill()
        return scores  # type: ignore[return-value]

    def _assign(self, waiting: deque[int], items: list[Item], scores: list[Score | None]) -> None:
        """Gives every free lane an item, starting workers where none is idle."""
        now = time.monotonic()
        idle = [worker for worker in self._workers if worker.job is None]
        taken = sum(worker.job is not None and worker.slow > now for worker in self._workers)
        while waiting and taken < self.size and (idle or len(self._workers) < CROWD * self.size):
            if not idle:
                self._workers.append(_Worker(self.deadline))
                idle.append(self._workers[-1])
            worker, job = idle.pop(), waiting.popleft()
            taken += 1
            try:
                worker.send(job, items[job])
            except BrokenPipeError:
                self._lose(worker, scores)

    def _collect(self, scores: list[Score | None], more: bool) -> None:
        """Waits for the next verdict, death, deadline or (with `more` to give) free lane, and deals with what came."""
        busy = [worker for worker in self._workers if worker.job is not None]
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            now = time.monotonic()
            soonest = min(worker.expires for worker in busy)
            if more:
                soonest = min([soonest, *(worker.slow for worker in busy if worker.slow > now)])
            ready = selector.select(max(0.0, soonest - now))
        for key, _ in ready:
            worker, job = key.data, key.data.job
            try:
                verdict = worker.receive()
            except EOFError:
                self._lose(worker, scores)
                continue
            if verdict is not None:
                scores[job] = verdict
        now = time.monotonic()
        for worker in busy:
            if worker.job is not None and worker.expires <= now:
                self._lose(worker, scores, late=True)

    def _lose(self, worker: _Worker, scores: list[Score | None], late: bool = False) -> None:
        """Buries a worker; its item gets the error. `_assign` starts another when there is need."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self.restarts += 1
        code = worker.kill()
        allowed = worker.seconds if worker.reward in worker.prepared else STARTUP
        why = f"no verdict within {allowed:g} s" if late else f"the verifier's process died (exit code {code})"
        scores[worker.job] = Score(0.0, f"{worker.reward}: {why}")
        worker.job = None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(item: Item) -> bytes:
    """The item's content, in a size that does not keep a megabyte of completion alive."""
    return hashlib.blake2b(json.dumps(item, sort_keys=True, default=str).encode(), digest_size=16).digest()


_shared: RewardPool | None = None
_shared_lock = threading.Lock()


def shared() -> RewardPool:
    """The process's own pool, for whoever has none: rewards called directly, scoring without a pool."""
    global _shared
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
