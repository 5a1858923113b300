"""Grade-school arithmetic: the final number of a completion against the final number of the worked answer."""

from __future__ import annotations

import re
from fractions import Fraction

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import THINK_END, boxed, tagged_answer
from r1fast.rewards.numbers import first_number, joined, last_number

# `A: 18`, `answer : 18`, `the answer is 18`; the number follows within the line.
_STATEMENT = re.compile(r"\b(?:A|answer|答案)[ \t]{0,8}(?:[:：]|\bis\b|是)", re.IGNORECASE)
# `#### 18`; not a heading of Markdown, `#### Step 2` or `#### 2. Adding up`.
_MARK = re.compile(r"####[ \t]{0,4}(?=[^\w\n]{0,4}[0-9])(?![^\w\n]{0,4}[0-9]{1,2}[.):][ \t]{1,4}[A-Za-z])")
_SUM = re.compile(r"(?:(?:[^A-Za-z\n=\\]|\\(?:times|cdot|div|[,;!$]))*=)+")  # `5 + 13 = 18` states 18
_DIGIT = re.compile(r"[0-9]")
_LINE = 200  # characters after a mark in which its number must stand


def final_number(completion: str) -> Fraction | None:
    """The number that a completion commits to.

    The most explicit statement wins, whatever else is said, and of several equal ones the last: `<answer>`, then
    `#### N`, `\\boxed{N}`, and `A: N` / `answer : N` / `answer is N`. An explicit statement without a number is no
    answer. Only where there is none at all, the last number is taken. What is said after the reasoning counts, and the
    reasoning only where nothing after it holds a number.
    """
    tagged = tagged_answer(completion)
    if tagged is not None:
        return last_number(joined((boxed(tagged) or tagged).strip()))
    after = completion.rpartition(THINK_END)[2]
    completion = after if _DIGIT.search(after) else completion
    marks = [mark.end() for mark in _MARK.finditer(completion)]
    if marks:
        return _stated(completion, marks[-1])
    inside = boxed(completion)
    if inside is not None:
        return last_number(joined(inside.strip()))
    ends = [stated.end() for stated in _STATEMENT.finditer(completion)]
    if ends:
        return _stated(completion, ends[-1])
    return last_number(completion)


def _stated(completion: str, at: int) -> Fraction | None:
    """The number that the line from `at` on states: its first, or what its sum comes to."""
    line = completion[at : at + _LINE].split("\n", 1)[0]
    summed = _SUM.match(line)
    return first_number(joined((line[summed.end() :] if summed else line).strip()))


@register("gsm8k")
class GSM8K(Reward):
    """1 where the completion's final number equals the reference's: a number, or a worked answer with `#### N`."""

    def extract(self, completion: str) -> str | None:
        number = final_number(completion)
        return None if number is None else str(number)

    def judge(self, completion: str, reference: Reference) -> float:
        text = str(reference)
        right = first_number(joined(text.rpartition("####")[2].strip())) if "####" in text else last_number(text)
        if right is None:
            raise ValueError(f"the reference has no number: {text[-80:]!r}")
        return float(final_number(completion) == right)
