"""Rewards by rule. `get("math")(completion, reference)` gives a `Score`; each file registers its own."""

from r1fast.rewards import (
    code,
    drop,
    exact,
    format,
    gsm8k,
    ifeval,
    judge,
    language,
    length,
    math,
    multiple_choice,
    repetition,
)
from r1fast.rewards.base import Reward, Score, configure, get, names, register, settings

__all__ = [
    "Reward",
    "Score",
    "code",
    "configure",
    "drop",
    "exact",
    "format",
    "get",
    "gsm8k",
    "ifeval",
    "judge",
    "language",
    "length",
    "math",
    "multiple_choice",
    "names",
    "register",
    "repetition",
    "settings",
]
