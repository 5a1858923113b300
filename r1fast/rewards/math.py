"""Mathematical answers compared as mathematics, by math-verify: LaTeX, fractions, intervals, sets, matrices.

math-verify evaluates what it is given, and a model may give it 9^9^9^9. Its own time limit is a signal, which works
only in a process's main thread and not inside sympy's C code; here it is off, and the pool's worker processes with
their deadline are what bounds it.
"""

from __future__ import annotations

import logging
import re

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import LONGEST_ANSWER, THINK_END, boxed, tagged_answer
from r1fast.rewards.numbers import plain_number

_MARKS = ("$", r"\(", r"\[", r"\boxed")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}\s")
_NOISE = re.compile(r"\\(?:left|right|displaystyle|[!,;: ])|\s+|\\?\$|\.$")


def candidate(completion: str) -> str | None:
    """The piece of a completion that holds its answer: the tagged answer, or the last box after the reasoning (or
    anywhere), or else the tail as it is. None where an answer is stated but is empty or absurdly long."""
    tagged = tagged_answer(completion)
    if tagged is not None:
        inside = boxed(tagged)
        found = tagged if inside is None else inside
        return found if 0 < len(found) <= LONGEST_ANSWER else None
    after = completion.rpartition(THINK_END)[2]
    region = after if after.strip() else completion
    inside = boxed(region)
    if inside is None and region is after:
        inside = boxed(completion)
    if inside is not None:
        return inside
    # A box left open is no mark for math-verify, which would look for its end at every other one.
    return region[-LONGEST_ANSWER:].replace(r"\boxed{", " ").strip() or None


def _parsed(text: str) -> list:
    """math-verify's reading of an answer; empty where it finds nothing in it."""
    from math_verify import parse

    text = text.strip()
    marked = any(mark in text.replace(r"\$", "") for mark in _MARKS)
    bare = len(text) < LONGEST_ANSWER and not marked and not _PROSE.search(text + " ")  # at full length it is a tail
    return parse(rf"$\boxed{{{text}}}$" if bare else text, parsing_timeout=None)


@register("math")
class Math(Reward):
    """1 where the completion's answer equals the reference (LaTeX or a number) as mathematics."""

    cheap = False

    def prepare(self) -> None:
        import math_verify  # noqa: F401 - takes seconds, most of them sympy's

        for name in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # else a warning that its time limit is off

    def extract(self, completion: str) -> str | None:
        """The answer's text without spacing and sizing, numbers in one form; votes do not need more (1/2 and 0.5
        agree, x+1 and 1+x do not)."""
        found = candidate(completion)
        if found is None:
            return None
        bare = _NOISE.sub("", found).replace("dfrac", "frac").replace("tfrac", "frac")
        return plain_number(bare) or bare or None

    def judge(self, completion: str, reference: Reference) -> float:
        from math_verify import verify

        if not isinstance(reference, str | int | float):
            raise TypeError(f"the reference of a math answer is LaTeX or a number, not {type(reference).__name__}")
        gold = _parsed(str(reference))
        if not gold:
            raise ValueError(f"math-verify cannot read the reference {str(reference)[:80]!r}")
        found = candidate(completion)
        if found is None:
            return 0.0
        try:
            return float(verify(gold, _parsed(found), timeout_seconds=None, raise_on_error=True))
        except Exception:
            # A comparison that fails is a wrong answer, unless it is the verifier that is broken: an answer that
            # does not equal itself says so.
            if verify(gold, gold, timeout_seconds=None, raise_on_error=True):
                return 0.0
            raise
