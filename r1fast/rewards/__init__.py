"""Rewards by rule. `get("math")(completion, reference)` gives a `Score`; each file registers its own."""

from r1fast.rewards import exact, format, gsm8k, language, math
from r1fast.rewards.base import Reward, Score, get, names, register

__all__ = ["Reward", "Score", "exact", "format", "get", "gsm8k", "language", "math", "names", "register"]
