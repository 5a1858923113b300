"""The steps of a stage, so that a run killed at any moment goes on as if it had not been.

    for step in Steps(ctx, total, {"model": model, "learner": learner, "random": random, ...}):
        ...  # one step

Everything that a later step depends on is named in `state`. A snapshot of it is taken after the last step, after every
`checkpoint.steps` steps or `checkpoint.minutes` minutes, and when the run is asked to stop; it also says how many lines
of the log belong to the steps so far, and the lines that follow are dropped on resume. A resumed stage begins after
its newest whole snapshot, with the same bits: what the steps in between did is done again, and only that.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from r1fast import snapshot
from r1fast.config import UserError
from r1fast.metrics import PhaseTimer
from r1fast.model.sharding import load_whole, weights_of
from r1fast.model.tensor_parallel import own_state, spread_state
from r1fast.parallel import world
from r1fast.stages import saved
from r1fast.stages.nonfinite import Nonfinite
from r1fast.stages.profiling import StepProfile
from r1fast.stages.saving import Saver
from r1fast.stop import Stopped
from r1fast.watchdog import Watchdog

if TYPE_CHECKING:
    from r1fast.model.decoder import Decoder
    from r1fast.model.reward_model import RewardModel
    from r1fast.stages.best import Best
    from r1fast.stages.context import StageContext


class Stateful(Protocol):
    """What goes into a snapshot: plain values and tensors in dicts, lists and tuples, read back with weights_only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class PolicyState:
    """A model: its weights, and the version that rollouts on disk are compared with where it is sampled from."""

    def __init__(self, model: Decoder | RewardModel) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        version = getattr(self._model, "weights_version", None)
        return {"weights": spread_state(self._model, weights_of(self._model)), "version": version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_whole(self._model, own_state(self._model, state["weights"]))
        if state["version"] is not None:
            self._model.weights_version = state["version"]


class RandomState:
    """A `random.Random` as a Stateful."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = self._source.getstate()
        return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))


class GlobalRandomness:
    """The generators that libraries share: Python's, numpy's, torch's of the CPU and of every GPU."""

    def state_dict(self) -> dict[str, Any]:
        name, words, *rest = np.random.get_state()
        return {
            "python": RandomState(random._inst).state_dict(),
            "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        RandomState(random._inst).load_state_dict(state["python"])
        name, words, *rest = state["numpy"]
        np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


class Steps:
    """Iterates over the numbers of the steps still to be done, from `done + 1` to `total`; see the module.

    `done` is known after the constructor, which has then restored `state`: what is not in it (an iterator over data)
    is wound forward by the stage itself.
    """

    def __init__(
        self,
        ctx: StageContext,
        total: int,
        state: Mapping[str, Stateful],
        timer: PhaseTimer | None = None,
        best: Best | None = None,
    ) -> None:
        """state: of all that changes from step to step. timer: of the stage's phases, which the watchdog watches.
        best: which the stage tells its scores, where it has any."""
        self._ctx, self.total, self._timer, self.best = ctx, total, timer, best
        self._saver = Saver(ctx.snapshots, ctx.recipe.checkpoint)
        self._bad = Nonfinite(ctx, state, self._saver.wait)
        self._state = {**state, **({} if best is None else {"best": best}), "globals": GlobalRandomness()}
        self._config = ctx.recipe.checkpoint
        self.done = 0
        if ctx.resume is not None:
            self._restore(ctx.resume)
        self._saver.saved = self._taken = self.done
        self._taken_at = time.monotonic()

    @property
    def saved(self) -> int:
        """The step of the newest snapshot that is on disk (on the rank that wrote it)."""
        return self._saver.saved

    def __iter__(self) -> Iterator[int]:
        ctx, stop = self._ctx, self._ctx.stop
        watchdog = Watchdog(self._timer or PhaseTimer(), ctx.log.directory, ctx.recipe.watchdog, stop.stalled)
        with watchdog, self._saver, StepProfile(ctx, self.total - self.done) as profile:
            for step in range(self.done + 1, self.total + 1):
                with stop.step():
                    yield step
                    profile.step()
                    self.done = step
                    self._saver.look()
                    healthy = self._bad.look(step)
                    ends, due = world().any(stop.requested, self._due())
                    if healthy and (ends or due):
                        self.save(last=ends or step == self.total)
                if ends:
                    raise Stopped

    def _due(self) -> bool:
        if self.done == self.total:  # what follows (an evaluation) may take long
            return True
        if self.best is not None and self.best.due(self.done):
            return True
        if self._config.steps and self.done - self._taken >= self._config.steps:
            return True
        return bool(self._config.minutes) and time.monotonic() - self._taken_at >= 60 * self._config.minutes

    def save(self, last: bool = False) -> None:
        """A snapshot of the state as it is now; whole when this returns if it is the `last` one."""
        ctx = self._ctx
        self._taken, self._taken_at = self.done, time.monotonic()
        if self.best is not None:
            self.best.saved(self.done)
        notes: dict[str, Any] = {}
        if world().first:  # who has the log
            ctx.log.sync()
            notes = {**ctx.snapshot_key, "stage": ctx.name, "lines": ctx.log.lines(ctx.name), "seconds": ctx.seconds()}
        state = {name: part.state_dict() for name, part in self._state.items()}
        self._saver.save(self.done, state, notes, () if self.best is None else (self.best.step,), last)

    @contextmanager
    def as_of(self, step: int, parts: Collection[str]) -> Iterator[bool]:
        """Within the block these parts of the state are as they were after `step`, then as after the last step again;
        False, and nothing is done, where one of the two snapshots is not whole any more."""
        tell, place = self._ctx.progress.warn, world()
        found, last = (snapshot.of_step(self._ctx.snapshots, s, tell, place) for s in (step, self.done))
        if found is None or last is None:
            yield False
            return
        try:
            self._load(found, parts)
            yield True
        finally:
            self._load(last, parts)

    def _load(self, found: snapshot.Snapshot, parts: Collection[str]) -> None:
        state = saved.read(found.path, self._mesh(), parts)
        for name in parts:
            self._state[name].load_state_dict(state[name])

    def _mesh(self) -> tuple[Any, Any] | None:
        return saved.mesh_of([part.state_dict() for part in self._state.values()])

    def _restore(self, found: snapshot.Snapshot) -> None:
        state = saved.read(found.path, self._mesh())
        if state.keys() != self._state.keys():
            raise UserError(
                f"{found.path} holds the state of {', '.join(sorted(state))}, this stage has "
                f"{', '.join(sorted(self._state))}: it was written by another version; --fresh starts again"
            )
        for name, part in self._state.items():
            part.load_state_dict(state[name])
        self.done = found.step
