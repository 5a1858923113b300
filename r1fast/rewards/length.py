"""Rewards for the length of a response, in tokens: DAPO's penalty for overlong ones, and Kimi k1.5's for long ones.

A length is known only where completions are tokens, so the reference says it: scoring.py fills it in from the rollout
and its group.
"""

from __future__ import annotations

from collections.abc import Mapping

from r1fast.rewards.base import Reference, Reward, register, settings


def overlong_penalty(length: int, max_tokens: int, window: int) -> float:
    """What DAPO adds to the reward of a long response (arXiv 2503.14476, eq. 13): 0 up to `max_tokens - window` tokens,
    then falling linearly to -1 at `max_tokens`."""
    return -min(1.0, max(0.0, (length - (max_tokens - window)) / window))


def length_reward(length: int, shortest: int, longest: int, right: bool) -> float:
    """Kimi k1.5 (arXiv 2501.12599, section 2.3.3): from 0.5 for the shortest of a group's responses to -0.5 for the
    longest; a wrong response gets no more than 0, and all get 0 where all are of one length."""
    if longest <= shortest:
        return 0.0
    value = 0.5 - (length - shortest) / (longest - shortest)
    return value if right else min(0.0, value)


def _numbers(reference: Reference, *names: str) -> list[int]:
    missing = [name for name in names if not isinstance(reference, Mapping) or name not in reference]
    if missing:
        raise ValueError(
            f"the length of a response is not known from its text: the reference needs {', '.join(missing)}"
        )
    return [reference[name] for name in names]


@register("overlong")
class Overlong(Reward):
    """0 to -1 over the last `rewards.overlong.window` tokens before `rewards.overlong.max_tokens`.

    Reference: {"tokens": n}. A stage's own `overlong` adds the same penalty to the reward of every response.
    """

    def why_not(self) -> str | None:
        if settings().overlong is None:
            return "the reward `overlong` needs rewards.overlong.max_tokens and rewards.overlong.window"
        return None

    def judge(self, completion: str, reference: Reference) -> float:
        (tokens,) = _numbers(reference, "tokens")
        bounds = settings().overlong
        if bounds is None:
            raise ValueError(self.why_not())
        return overlong_penalty(tokens, bounds.max_tokens, bounds.window)


@register("length")
class Length(Reward):
    """0.5 for the shortest right response of a group, down to -0.5 for the longest.

    Reference: {"tokens": n, "shortest": n, "longest": n, "right": whether its accuracy is 1}.
    """

    def judge(self, completion: str, reference: Reference) -> float:
        return length_reward(*_numbers(reference, "tokens", "shortest", "longest", "right"))
