"""What can be done with a finished group while others are still being drawn: scoring it, and learning from it.

Groups go to the learner in the order in which the sampler finished them, which depends on seeds and weights alone. How
long scoring takes, and whether the learner begins early, decides when a sum is made and never which, so that all ways
give the same bits. The weights move when the last group is there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch

from r1fast.metrics import PhaseTimer

if TYPE_CHECKING:
    from r1fast.types import RolloutGroup

Score = Callable[[list[int], list["RolloutGroup"]], Sequence["RolloutGroup"]]
Learn = Callable[[int, "RolloutGroup"], None]
When = Literal["after", "between", "beside"]


class Scoring:
    """Groups in, scored groups out, in any order; a context, which ends its thread.

    aside: rewards are worker processes' or a judge's work, and this process only waits: a thread does, which hands on
    together all that has finished meanwhile. Otherwise groups are scored at once, by whoever adds them.
    """

    def __init__(self, score: Score, aside: bool) -> None:
        self._score, self._aside = score, aside
        self.seconds = 0.0  # that scoring has taken
        self._results: dict[int, Future[RolloutGroup]] = {}
        self._arrived: queue.SimpleQueue[tuple[int, RolloutGroup] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._thread is not None:
            self._arrived.put(None)
            if failed is None:  # an interrupt does not wait for what hangs; the thread ends with the process
                self._thread.join()

    def add(self, groups: list[tuple[int, RolloutGroup]]) -> None:
        """Groups with their numbers, to be scored."""
        self._results.update((index, Future()) for index, _ in groups)
        if not self._aside:
            self._all(groups)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
            self._thread.start()
        for one in groups:
            self._arrived.put(one)

    def ready(self, index: int) -> bool:
        return self._results[index].done()

    def result(self, index: int) -> RolloutGroup:
        """Waits for it; raises what its scoring raised."""
        return self._results[index].result()

    def _work(self) -> None:
        while True:
            arrived = [self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get())
            groups = [one for one in arrived if one is not None]
            self._all(groups)
            if len(groups) < len(arrived):
                return

    def _all(self, groups: list[tuple[int, RolloutGroup]]) -> None:
        if not groups:
            return
        began = time.perf_counter()
        try:
            scored = self._score([index for index, _ in groups], [group for _, group in groups])
        except BaseException as error:  # raised again where the result is asked for
            for index, _ in groups:
                self._results[index].set_exception(error)
            return
        finally:
            self.seconds += time.perf_counter() - began
        for (index, _), group in zip(groups, scored, strict=True):
            self._results[index].set_result(group)


class Feed:
    """Hands groups to the learner in the order in which they finished.

    when: `after` the last one has been drawn, each as soon as it is scored; `between` two of the sampler's steps, what
    is scored by then; `beside` the sampler, in a thread and on a GPU on a stream of its own.
    """

    def __init__(self, learn: Learn, scoring: Scoring, when: When, device: str, timer: PhaseTimer) -> None:
        """timer: charged under "score" while waiting for scores and under "learn", by the thread that draws alone."""
        self._learn, self._scoring, self._when = learn, scoring, when
        self.seconds = 0.0  # that learning has taken in a thread of its own
        self.waited: dict[str, float] = {}  # by phase of that thread, seconds after the last group had been drawn
        self._timer = timer if when != "beside" else PhaseTimer()
        self.order: list[int] = []
        self._handed = 0
        self._error: BaseException | None = None
        self._finished: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stream = None
        if when == "beside":
            if device == "cuda":
                self._stream = torch.cuda.Stream()
                self._stream.wait_stream(torch.cuda.current_stream())  # the last optimizer step is on it
            self._thread = threading.Thread(target=self._work, name="learning", daemon=True)
            self._thread.start()

    def finished(self, index: int) -> None:
        """A group has been drawn and given to be scored; told by the sampler's loop."""
        self.order.append(index)
        if self._when == "beside":
            self._finished.put(index)
        while self._when == "between" and self._handed < len(self.order) and self._scoring.ready(self._next()):
            self._hand(self._next())

    def rest(self) -> None:
        """All have been drawn: waits for what is left, and learns from it. Raises what scoring or learning raised."""
        if self._when == "beside":
            before = dict(self._timer.seconds)
            self._finished.put(None)
            self._thread.join()
            self.waited = {name: s - before.get(name, 0.0) for name, s in self._timer.seconds.items()}
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
        if self._error is not None:
            raise self._error
        while self._handed < len(self.order):
            self._hand(self._next())

    def _next(self) -> int:
        return self.order[self._handed]

    def _hand(self, index: int) -> None:
        with self._timer("score"):
            group = self._scoring.result(index)
        with self._timer("learn"):
            began = time.perf_counter()
            self._learn(index, group)
            if self._when == "beside":
                self.seconds += time.perf_counter() - began
        self._handed += 1

    def _work(self) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                while (index := self._finished.get()) is not None:
                    self._hand(index)
        except BaseException as error:  # raised again by `rest`
            self._error = error
