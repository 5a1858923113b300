"""What a reward is, and the registry that recipes choose from by name.

A reward judges one completion against one reference. When it cannot (a reference it does not understand, a parser
that dies) it says so in `Score.error`: a failure of the verifier is not a wrong answer, and scoring keeps the two
apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from r1fast.config import UserError, nearest
from r1fast.schema import RewardsConfig

Reference = str | int | float | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Score:
    """`value` counts only where `error` is None."""

    value: float
    error: str | None = None  # why the verifier failed


class Reward:
    """Base of every reward: a subclass writes `judge`, and `extract` where completions hold an answer."""

    name: ClassVar[str] = ""
    cheap: ClassVar[bool] = True  # False: `judge` may hang or crash, and is run in a worker process with a deadline
    makes_way: ClassVar[bool] = False  # True: `judge` itself gives its lane up to others when it takes long (lane.py)

    def prepare(self) -> None:
        """Slow imports, done once in each worker process before its clock starts."""

    def why_not(self) -> str | None:
        """Why this reward cannot be used on this machine, with what to do; asked before any work starts."""
        return None

    def deadline(self, reference: Reference) -> float | None:
        """Seconds that a worker may take for one completion, where that depends on the reference; None: the pool's."""
        return None

    def judge(self, completion: str, reference: Reference) -> float:
        """The value, in this process and without a deadline; raises where it cannot tell."""
        raise NotImplementedError

    def extract(self, completion: str) -> str | None:
        """What counts as the completion's answer, in a form that equal answers share: majority votes compare it."""
        return None

    def attempt(self, completion: str, reference: Reference) -> Score:
        """`judge` in this process; whatever it raises becomes the score's error."""
        try:
            value = float(self.judge(completion, reference))
            return Score(value) if math.isfinite(value) else Score(0.0, f"{self.name}: the value is {value}")
        except Exception as error:  # any failure of a verifier is the same to the caller: this sample has no score
            return Score(0.0, f"{type(error).__name__}: {error}"[:300])

    def __call__(self, completion: str, reference: Reference = None) -> Score:
        """Safe from anywhere: never raises on any completion, never hangs."""
        if self.cheap:
            return self.attempt(completion, reference)
        from r1fast.rewards import pool  # the pool asks the registry for rewards, so it cannot come first

        return pool.shared().run([(self.name, completion, reference)])[0]


_settings = RewardsConfig()


def settings() -> RewardsConfig:
    """How rewards are run in this process: the recipe's `rewards` block, or its defaults. A worker has its pool's."""
    return _settings


def configure(given: RewardsConfig) -> None:
    """Makes `given` the settings of this process; workers that are there already end, for they have the old ones."""
    global _settings
    if given != _settings:
        from r1fast.rewards import pool

        pool.close_shared()
        _settings = given


T = TypeVar("T", bound=type[Reward])
_REWARDS: dict[str, Reward] = {}


def register(name: str) -> Callable[[T], T]:
    """Class decorator: makes a `Reward` known under `name`, the word that recipes use."""

    def add(cls: T) -> T:
        cls.name = name
        _REWARDS[name] = cls()
        return cls

    return add


def names() -> list[str]:
    return sorted(_REWARDS)


def get(name: str) -> Reward:
    """The reward of that name; an unknown one is a `UserError` with the nearest known."""
    if name not in _REWARDS:
        raise UserError(f"rewards: there is no reward {name!r}{nearest(name, names())}; known are {', '.join(names())}")
    return _REWARDS[name]
