"""Numbers as people and models write them, read exactly: what the gsm8k verifier and majority votes compare.

Reads `1,080`, `1{,}080`, `$18.00`, `-5`, `3/4`, `3 1/2`, `\\frac{1}{2}`, `50%`; equal values have one form.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

LONGEST = 60  # characters of a number; beyond, it is an attack on `int`, not an answer

# A minus counts as a sign only where it cannot be a subtraction: in `16-3` the second number is 3.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+]\s?)?"
    r"(?:[0-9]{1,9}\s{1,3}(?=[0-9]{1,9}\s?/\s?[0-9]))?"  # 3 1/2
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:\s?/\s?[0-9]+(?:\.[0-9]+)?)?"
    r"|(?<![0-9])\.[0-9]+"
)
_FRACTION = re.compile(r"([0-9])?\s{0,3}\\[dt]?frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}")
_APART = re.compile(r"(?<=[0-9])(?:[\u00a0\u2009\u202f~]|\\ )(?=[0-9]{3}(?![0-9]))")  # no-break spaces
_GROUPS = re.compile(r"[^\w\n.,-]{0,4}-?[0-9]{1,3}(?: [0-9]{3})+(?![0-9/-]| [0-9/])")
_POWER = re.compile(r"(?<=[A-Za-z}])\^(?:[0-9]|\{[0-9]{1,3}\})")  # of a unit, cm^2; it is no number of its own
_CURRENCY = re.compile(r"\\?[$€£¥₹]|\\[!,;:]")  # and LaTeX's thin spaces


def _plain(text: str) -> str:
    text = _CURRENCY.sub("", text.replace("{,}", ",").replace("\u2212", "-"))
    text = _APART.sub("", text)
    if "\\" in text:
        text = _FRACTION.sub(lambda found: f"{found[1] + ' ' if found[1] else ''}{found[2]}/{found[3]}", text)
    return _POWER.sub("", text) if "^" in text else text


def _value(text: str) -> Fraction | None:
    if len(text) > LONGEST:
        return None
    above, _, below = text.replace(",", "").partition("/")
    parts = above.replace("- ", "-").replace("+ ", "+").split()  # a whole number may stand before a fraction
    divisor = Fraction("".join(below.split())) if below else Fraction(1)
    if not divisor:
        return None
    share = Fraction(parts[-1]) / divisor
    if len(parts) == 1:
        return share
    return Fraction(parts[0]) + (-share if parts[0].startswith("-") else share)


def joined(text: str) -> str:
    """`text` where a number stands first with its thousands apart, `1 080 eggs`, and so as one. Only for what is an
    answer and nothing else: elsewhere `5 100` may be two numbers."""
    found = _GROUPS.match(text)
    return found.group().replace(" ", "") + text[found.end() :] if found else text


def last_number(text: str) -> Fraction | None:
    """The last number in `text`; None where there is none, or where the last one is no number after all (1/0)."""
    found = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    return _value(found[0].group()) if found else None


def first_number(text: str) -> Fraction | None:
    """The first number in `text`, or None."""
    found = _NUMBER.search(_plain(text))
    return _value(found.group()) if found else None


def plain_number(text: str) -> str | None:
    """`text` in its one form where it is a number and nothing else (`1,080` and `1080.0` give "1080"), or None."""
    text = _plain(text).strip()
    return str(value) if _NUMBER.fullmatch(text) and (value := _value(text)) is not None else None
