"""What people write for mathematics, in forms that math-verify reads, and what is settled without mathematics at all:
words, times of day, units of two kinds. Graders take these for right or wrong at a glance; a parser of LaTeX does not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from r1fast.rewards.numbers import plain_number

_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)"
_ABOUT = re.compile(r"^(?:\\approx|≈|~|about|approximately|roughly)\s*(?=[-\d$\\.])")
_TEXT_WITH_NUMBER = re.compile(_TEXT + r"\{\s*([-+]?[\d.,/]+[^{}\\]*)\}")
_MIXED = re.compile(r"(?<![\w.,/^{}])(\d{1,9})\s+(\d{1,9})\s*/\s*(\d{1,9})(?![\w.])")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")
_RECURRING = re.compile(r"(?<![\w.])(\d{0,30})\.(\d{0,30})\\(?:overline|bar)\s*\{\s*(\d{1,30})\s*\}")
_TRIG = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?\s*)((?:\\left)?[({])?\s*(\d+(?:\.\d+)?)\s*\^\{?\s*\\circ\s*\}?"
)


def _recurring(found: re.Match) -> str:
    """`0.1\\overline{3}` is 2/15, exactly."""
    whole, fixed, again = found.groups()
    shift = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), shift) + Fraction(int(again), shift * (10 ** len(again) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def readable(text: str) -> str:
    """`text` with mixed numbers, recurring decimals, powers of ten, degrees and angle brackets as LaTeX has them."""
    text = text.strip().rstrip(",;").rstrip()
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*").strip()
    text = _TEXT_WITH_NUMBER.sub(r"\1", _ABOUT.sub("", text)).replace("°", r"^\circ")
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    text = _RECURRING.sub(_recurring, _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    text = _TRIG.sub(lambda m: rf"{m[1]}{m[2] or ''}{{\frac{{{m[3]}\pi}}{{180}}}}", text)
    if (power := _SCIENTIFIC.fullmatch(text)) is not None:
        text = rf"{power[1]}\times 10^{{{int(power[2])}}}"
    return text


# -- words ----------------------------------------------------------------------------------------------------------

_UNWRAP = re.compile(_TEXT + r"\s*\{([^{}]*)\}")
_ALL_TEXT = re.compile(_TEXT + r"\s*\{[A-Za-z][A-Za-z ,.'-]+\}\.?")
_PLAIN_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ -](?:a|[A-Za-z]{2,}))+\.?")
_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_SAME = {
    "no solution": r"no solutions|no real solution|no real solutions|there is no solution|there are no solutions"
    r"|empty set|\emptyset|\varnothing|∅|\{\}|\{ \}",
    "all real numbers": r"all reals|all real|every real number|real numbers|all real x|any real number"
    r"|\mathbb{r}|x\in\mathbb{r}|x \in \mathbb{r}"
    r"|(-\infty,\infty)|(-\infty, \infty)|(-\infty,+\infty)|(-\infty, +\infty)",
    "does not exist": "dne|no limit",
}
_CANONICAL = {said: meant for meant, several in _SAME.items() for said in (meant, *several.split("|"))}


def words(text: str) -> str:
    """An answer in words, without what does not count: fonts, case, articles, a full stop; sets in words are told."""
    plain = _UNWRAP.sub(r"\1", text).replace(r"\left", "").replace(r"\right", "").replace("$", "")
    plain = _ARTICLE.sub("", " ".join(plain.lower().split()).rstrip("."))
    return _CANONICAL.get(plain, plain)


def is_words(text: str) -> bool:
    """Whether an answer is words and no mathematics: `\\text{even}`, `no solution`; not `abc`, a product perhaps."""
    return _ALL_TEXT.fullmatch(text.strip()) is not None or _PLAIN_WORDS.fullmatch(text.strip()) is not None


# -- times and units ------------------------------------------------------------------------------------------------

_TIME = re.compile(r"(\d{1,2}):(\d\d)(am|pm)?")


def same_time(found: str, gold: str) -> bool | None:
    """Whether two times of day are one; None where the right answer is none (`3:30` alone may be a ratio)."""
    one, two = (
        _TIME.fullmatch(re.sub(r"[\s.{}~]|\\[,;: ]", "", _UNWRAP.sub(r"\1", text).lower())) for text in (found, gold)
    )
    if two is None or not (two[3] or two[2].startswith("0") or (one is not None and one[3])):
        return None
    if one is None:
        return False
    return (int(one[1]), one[2]) == (int(two[1]), two[2]) and (one[3] == two[3] or not (one[3] and two[3]))


_KINDS = {  # kind of quantity -> names of a unit and its size
    "time": {"second seconds sec secs s": 1, "minute minutes min mins": 60, "hour hours hr hrs h": 3600,
             "day days": 86_400, "week weeks": 604_800},
    "length": {"mm millimeter millimeters": 1, "cm centimeter centimeters centimetres": 10,
               "m meter meters metre metres": 1000, "km kilometer kilometers kilometres": 1_000_000,
               "inch inches in": Fraction("25.4"), "foot feet ft": Fraction("304.8"), "yard yards": Fraction("914.4"),
               "mile miles": Fraction(1_609_344)},
    "mass": {"g gram grams": 1, "kg kilogram kilograms": 1000, "mg milligram milligrams": Fraction(1, 1000),
             "ounce ounces oz": Fraction("28.349523125"), "pound pounds lb lbs": Fraction("453.59237")},
    "money": {"cent cents": 1, "dollar dollars": 100},
    "angle": {"degree degrees": 1},
}  # fmt: skip
_UNITS = {
    name: (kind, Fraction(size)) for kind, units in _KINDS.items() for names, size in units.items()
    for name in names.split()
}  # fmt: skip
_WITH_UNIT = re.compile(
    r"(.*[\d})])(?:\\[,;: ]|[\s~])*(?:" + _TEXT + r"\s*\{([a-z .~]*)(\^\{?\d\}?)?\s*\}|(?<=[\s~])([a-z][a-z .]*))"
    r"(\^\{?\d\}?)?"
)
_LETTER = re.compile(r"(?:^|[^\\A-Za-z{])[A-Za-z](?:$|[^A-Za-z}])")  # alone: `5 m` may be a product
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def _quantity(text: str) -> tuple[str, str, Fraction] | None:
    """The number, its kind and the size of its unit, of a text that ends with a known unit or a power of one."""
    text = text.strip().strip("$").strip()
    if text.startswith("\\$"):
        return text[2:], "money", Fraction(100)
    found = _WITH_UNIT.fullmatch(text)
    if found is None:
        return None
    said = re.sub(r"[.~]", " ", found[2] or found[4] or "").split()
    powers = [_POWERS[word] for word in said if word in _POWERS]
    powers += [int(power.strip("^{}")) for power in (found[3], found[5]) if power]
    names = [word for word in said if word not in _POWERS]
    if len(names) != 1 or len(powers) > 1 or names[0] not in _UNITS:
        return None
    kind, size = _UNITS[names[0]]
    power = powers[0] if powers else 1
    return found[1], kind if power == 1 else f"{kind}^{power}", size**power


def same_unit(found: str, gold: str) -> bool | None:
    """Whether two quantities are equal, where units decide it; None where they do not.

    False where both name a unit and the two are not of one kind (12 minutes, 12 meters; 5 cm, 5 cm^2); where they are,
    by their numbers (1 hour, 60 minutes). Where one alone names a unit, the same number is the same answer.
    """
    one, two = _quantity(found), _quantity(gold)
    if one is None and two is None:
        return None
    numbers = [plain_number(text if known is None else known[0]) for text, known in ((found, one), (gold, two))]
    equal = None not in numbers and numbers[0] == numbers[1]
    if one is None or two is None:
        return True if equal and (one or two)[1] != "money" and not _LETTER.search(found + gold) else None
    if one[1:] == two[1:]:
        return equal or None
    if one[1] != two[1] or None in numbers:
        return False
    return Fraction(numbers[0]) * one[2] == Fraction(numbers[1]) * two[2]


# -- vectors --------------------------------------------------------------------------------------------------------

_VECTOR = re.compile(r"\\begin\{([pb]?matrix)\}((?:(?!\\begin|\\end).)*)\\end\{\1\}", re.DOTALL)


def vector_as_tuple(text: str) -> str | None:
    """`(1,2)` for a matrix of one column or one row; None for anything else."""
    found = _VECTOR.fullmatch(text.strip())
    if found is None or ("&" in found[2] and r"\\" in found[2].strip().removesuffix(r"\\")):
        return None
    entries = [entry.strip() for entry in re.split(r"&|\\\\", found[2]) if entry.strip()]
    return f"({','.join(entries)})" if len(entries) > 1 else None
