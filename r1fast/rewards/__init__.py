"""Rewards by rule. `get("math")(completion, reference)` gives a `Score`; each file registers its own."""

from r1fast.rewards import code, drop, exact, format, gsm8k, language, math
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
    "language",
    "math",
    "names",
    "register",
    "settings",
]
