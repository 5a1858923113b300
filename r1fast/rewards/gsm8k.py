"""Grade-school arithmetic: the final number of a completion against the final number of the worked answer."""

from __future__ import annotations

import re
from fractions import Fraction

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import THINK_END, boxed, tagged_answer
from r1fast.rewards.numbers import first_number, last_number

# `A: 18`, `answer : 18`, `the answer is 18`; the number follows within the line.
_STATED = re.compile(r"\b(?:A|answer|答案)[ \t]{0,8}(?:[:：]|\bis\b|是)", re.IGNORECASE)
_LINE = 200  # characters after a mark in which its number must stand


def final_number(completion: str) -> Fraction | None:
    """The number that a completion commits to.

    The most explicit statement wins, whatever else is said, and of several equal ones the last: `<answer>`, then
    `#### N`, `\\boxed{N}`, and `A: N` / `answer : N` / `answer is N`. An explicit statement without a number is no
    answer. Only where there is none at all, the last number after the reasoning (or anywhere) is taken.
    """
    tagged = tagged_answer(completion)
    if tagged is not None:
        return last_number(boxed(tagged) or tagged)
    _, mark, tail = completion.rpartition("####")
    if mark:
        return first_number(tail[:_LINE].split("\n", 1)[0])
    inside = boxed(completion)
    if inside is not None:
        return last_number(inside)
    ends = [stated.end() for stated in _STATED.finditer(completion)]
    if ends:
        return first_number(completion[ends[-1] : ends[-1] + _LINE].split("\n", 1)[0])
    after = completion.rpartition(THINK_END)[2]
    return last_number(after if after.strip() else completion)


@register("gsm8k")
class GSM8K(Reward):
    """1 where the completion's final number equals the reference's: a number, or a worked answer with `#### N`."""

    def extract(self, completion: str) -> str | None:
        number = final_number(completion)
        return None if number is None else str(number)

    def judge(self, completion: str, reference: Reference) -> float:
        text = str(reference)
        right = first_number(text.rpartition("####")[2]) if "####" in text else last_number(text)
        if right is None:
            raise ValueError(f"the reference has no number: {text[-80:]!r}")
        return float(final_number(completion) == right)
