"""Mathematical answers compared as mathematics, by math-verify: LaTeX, fractions, intervals, sets, matrices.

math-verify evaluates what it is given, and a model may give it 9^9^9^9. Its own time limit is a signal, which works
only in a process's main thread and not inside sympy's C code; here it is off, and the pool's worker processes with
their deadline are what bounds it.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import LONGEST_ANSWER, THINK_END, boxed, tagged_answer
from r1fast.rewards.math_text import is_words, readable, same_time, same_unit, vector_as_tuple, words
from r1fast.rewards.numbers import plain_number

_MARKS = ("$", r"\(", r"\[", r"\boxed")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}\s")
_NOISE = re.compile(r"\\(?:left|right|displaystyle|[!,;: ])|\s+|\\?\$|\.$")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\{([^{}]*)\}")
_COMMAND_END = re.compile(r"(\\[A-Za-z]{1,20})\s+(?=[A-Za-z])")
_CURRENCY = re.compile(r"(?<=[0-9])\s*(?:dollars?|USD|euros?|pounds)\s*$")
_BASE = re.compile(r"[0-9]_\{?[0-9]+\}?$")
DEEPEST = 20  # brackets within brackets; math-verify's parser takes exponential time from there (200 deep: for ever)
_BRACKET = re.compile(r"[(){}\[\]]")
_INTEGER = re.compile(r"-?[0-9]+")
# A relation between two or more things, `5x - 7y + 11z + 4 = 0`: not the value 0, which math-verify would read in it.
_EQUATION = re.compile(r"(?=[^=]*[A-Za-z])(?=[^=]*[0-9])[^=]*[+-][^=]*=0")
_INEQUALITY = re.compile(r"(?:([^<>A-Za-z]+)([<≤>≥]))?[A-Za-z]([<≤>≥])([^<>A-Za-z]+)|([^<>A-Za-z]+)([<≤>≥])[A-Za-z]")
_INTERVAL = re.compile(r"[(\[].+,.+[)\]]")
_OR = re.compile(r"or|\\(?:lor|vee|cup)(?:\{\})?")
_EXCEPT = re.compile(r"[A-Za-z](?:\\neq?(?:\{\})?|≠)([^A-Za-z]+)")
_SET = re.compile(r"\\\{[A-Za-z](?::|\||\\mid(?:\{\})?)(.*)\\\}")  # {x | x > 3}
_CHOICE = re.compile(r"\(?([A-Z])[).]?")  # an option's letter, dressed or not


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


@lru_cache(maxsize=4096)  # references come once a sample, and samples of a group repeat each other
def _parsed(text: str) -> list:
    """math-verify's reading of an answer; empty where it finds nothing in it."""
    from math_verify import parse

    text = text.strip()
    marked = any(mark in text.replace(r"\$", "") for mark in _MARKS)
    bare = len(text) < LONGEST_ANSWER and not marked and not _PROSE.search(text + " ")  # at full length it is a tail
    return parse(rf"$\boxed{{{text}}}$" if bare else text, parsing_timeout=None)


def _bare(text: str) -> str:
    """`text` without what does not change its meaning: spacing, sizing, currency, words' fonts; numbers in one form."""
    text = _COMMAND_END.sub(r"\1{}", _CURRENCY.sub("", _WORDS.sub(r"\1", text)))
    bare = _NOISE.sub("", text).replace("dfrac", "frac").replace("tfrac", "frac")
    return plain_number(bare) or bare


def _interval(bare: str) -> str | None:
    """The interval that an inequality of one variable means: `-1<x\\le3` is `(-1,3]`; a union for `x<2` or `x>3`, and
    for `x\\neq2`; None for anything else."""
    bare = bare.replace(r"\infty", "∞")
    if (described := _SET.fullmatch(bare)) is not None:
        bare = described[1]
    if len(parts := _OR.split(bare)) > 1:
        found = [_interval(part) for part in parts]
        return None if None in found else r"\cup".join(found)
    if (hole := _EXCEPT.fullmatch(bare)) is not None:
        return rf"(-\infty,{hole[1]})\cup({hole[1]},\infty)"
    for command, sign in (("leq", "≤"), ("geq", "≥"), ("le", "≤"), ("ge", "≥"), ("lt", "<"), ("gt", ">")):
        bare = re.sub(rf"\\{command}(?![A-Za-z])(?:{{}})?", sign, bare)
    found = _INEQUALITY.fullmatch(bare)
    if found is None:
        return None
    left, one, two, right, only, sign = found.groups()
    if only is not None:  # 3<x
        left, one, two, right = only, sign, None, None
    bounds = [(left, one, True)] * (left is not None) + [(right, two, False)] * (right is not None)
    low, high = ("(", r"-\infty"), (")", r"\infty")
    for bound, relation, before in bounds:
        closed = relation in "≤≥"
        if (relation in "<≤") == before:
            low = ("[" if closed else "(", bound)
        else:
            high = ("]" if closed else ")", bound)
    return f"{low[0]}{low[1]},{high[1]}{high[0]}".replace("∞", r"\infty")


def _alike(found: str, gold: str) -> tuple[str, str]:
    """The two in one form, where one is an interval and the other an inequality, or one a tuple, the other a vector."""
    for ours, theirs, ordered in ((found, gold, 1), (gold, found, -1)):
        if _INTERVAL.fullmatch(theirs):
            same = _interval(_bare(ours)) or vector_as_tuple(ours)
            if same is not None:
                return (same, theirs)[::ordered]
    return found, gold


def _settled(found: str, gold: str) -> bool | None:
    """What can be said without algebra, for most answers are plain; None where it takes some."""
    ours, right = _bare(found), _bare(gold)
    if ours == right or (ours.isalpha() and ours.lower() == right.lower()):
        return True
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(right):
        return False
    one, two = _CHOICE.fullmatch(ours), _CHOICE.fullmatch(right)
    if one and two:
        return one[1] == two[1]
    if is_words(gold) or words(found) == words(gold):
        return words(found) == words(gold)
    for said in (same_time(found, gold), same_unit(found, gold)):
        if said is not None:
            return said
    if _BASE.search(ours) and not _BASE.search(right):  # 40_9 is not 40; 40 may be short for 40_9
        return False
    return False if _EQUATION.fullmatch(ours) and "=" not in right else None


def _depth(text: str) -> int:
    """How deep brackets stand within brackets."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest


def _decimal(value: object) -> bool:
    """Whether a value is made of numbers and their whole powers alone: no roots, no functions, no pi."""
    from sympy import Number, Pow

    return value.atoms() == value.atoms(Number) and all(power.exp.is_Integer for power in value.atoms(Pow))


def _complex(reading: list) -> list:
    """`reading` with `i` as the root of -1, where it is the only letter: for math-verify it is one like any other."""
    from sympy import I

    def meant(value: object) -> object:
        letters = getattr(value, "free_symbols", set())
        return value.subs(dict.fromkeys(letters, I)) if {letter.name for letter in letters} == {"i"} else value

    return [meant(value) for value in reading]


def _far_apart(ours: list, gold: list) -> bool:
    """Whether both are plain numbers whose values differ by a thousandth and more: then no algebra makes them equal.
    Half of all wrong answers, at a twentieth of math-verify's time for them; and it, which rounds to six places, takes
    all small numbers for one (1.6e-19, 1.6e-18)."""
    values = []
    for reading in (ours, gold):
        if len(reading) != 2 or not getattr(reading[0], "is_number", False):  # math-verify gives [value, text]
            return False
        try:
            values.append(complex(reading[0].evalf(15)))
        except (TypeError, ValueError, OverflowError):
            return False
    one, two = values
    least = 0.0 if _decimal(ours[0]) and _decimal(gold[0]) else 1.0  # what is 0 only by algebra has a value of 1e-17
    return abs(one - two) > 1e-3 * max(least, abs(one), abs(two))


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
        return _bare(readable(found)) or None

    def judge(self, completion: str, reference: Reference) -> float:
        from math_verify import verify

        if not isinstance(reference, str | int | float):
            raise TypeError(f"the reference of a math answer is LaTeX or a number, not {type(reference).__name__}")
        found, right = candidate(completion), str(reference).strip()
        if not right:
            raise ValueError("the reference is empty")
        if found is None:
            return 0.0
        found, right = readable(found), readable(right)
        if (settled := _settled(found, right)) is not None:
            return float(settled)
        if _depth(found) > max(DEEPEST, _depth(right)):
            return 0.0
        right = right.replace(r"\$", "").rstrip(".")
        found, right = _alike(found, right)
        gold = _parsed(right)
        if not gold:
            raise ValueError(f"math-verify cannot read the reference {right[:80]!r}")
        gold, ours = _complex(gold), _complex(_parsed(found))
        if "%" not in right + found and _far_apart(ours, gold):
            return 0.0
        try:
            return float(verify(gold, ours, timeout_seconds=None, raise_on_error=True))
        except Exception:
            # A comparison that fails is a wrong answer, unless it is the verifier that is broken: an answer that
            # does not equal itself says so.
            if verify(gold, gold, timeout_seconds=None, raise_on_error=True):
                return 0.0
            raise
