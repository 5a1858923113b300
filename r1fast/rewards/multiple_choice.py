"""Multiple choice: which letter a completion commits to, against the letter that is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import LONGEST_ANSWER, THINK_END, boxed, labelled_answer, tagged_answer

LETTERS = "ABCDEFGHIJ"  # MMLU-Pro has ten
_DRESS = re.compile(r"\\(?:textbf|text|mathbf|mathrm|boxed)\s?|[*_$`{}\\\"“”<>]|^[\s']+|[\s']+$")
# `B`, `(B)`, `B.`, `B) Paris`, `option B`, `选项 B`; what follows the letter must not make it a word.
_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice|选项|答案|选)?\s{0,4}(?:is|是|为)?\s{0,4}[:：]?\s{0,4}"
    r"[(\[（]?([A-J])(?:[)\]）.:：,，、。]|\s*$|\s*\n)",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"(?:\b(?:answer|choice|option)|答案|选项?)[ \t*]{0,8}(?:[:：]|\bis\b|是|为)?[ \t*:：$\"“'<\[]{0,8}"
    r"(?:\\boxed\{|\\text\{)?[(（]?((?-i:[A-J])(?![A-Za-z'’])|[a-j](?=[)\].,;:]|\s{0,4}$|\s{0,4}\n))",
    re.IGNORECASE,
)
# The last line of an answer that states nothing otherwise: `Therefore, B.`, `B is correct`, `I choose (B)`.
_CONCLUDED = re.compile(
    r"(?:(?:therefore|thus|hence|so|i(?:'d| would)? (?:choose|pick|select|go with)|my (?:final )?choice(?: is)?)"
    r"[\s,:]{0,3}(?:it is |it's )?[(\[]?((?-i:[A-J]))[)\]]?"
    r"|[(\[]?((?-i:[A-J]))[)\]]? is (?:the )?(?:correct|right)[a-z ]{0,20})[.!]?",
    re.IGNORECASE,
)
_SECOND = re.compile(
    r"^\W{0,3}(?:or|and|/|,|或|和|以及)\s*(?:maybe\s|perhaps\s|possibly\s|also\s)?\s*[(（]?([A-J])\b(?![a-z])",
    re.IGNORECASE,
)
_SPACE = re.compile(r"\s+")


def _letter(answer: str, options: Sequence[str] | None) -> str | None:
    """The letter of a stated answer: a letter alone or before its option, or an option's own words."""
    text = _DRESS.sub("", answer[:LONGEST_ANSWER])
    if options:
        plain = [_SPACE.sub(" ", _DRESS.sub("", str(option))).strip().lower() for option in options]
        said = _SPACE.sub(" ", text).strip().rstrip(".").lower()
        same = [i for i, option in enumerate(plain) if said in (option, option.rstrip("."))]
        if len(same) == 1:
            return LETTERS[same[0]]
    found = _LETTER.match(text)
    if found is None or _hedged(text, found.end(1), found.group(1).upper()):
        return None
    return found.group(1).upper()


def _hedged(text: str, end: int, letter: str) -> bool:
    """Whether another letter follows on equal terms: `A or B` chooses nothing."""
    second = _SECOND.match(text[end : end + 24])
    return second is not None and second.group(1).upper() != letter


def chosen(completion: str, options: Sequence[str] | None = None) -> str | None:
    """The letter that a completion commits to: of its `<answer>`, its last box, its last `Answer: B`, or its last line
    where that is all there is. Of several statements of one kind the last counts; a hedge counts as none."""
    tagged = tagged_answer(completion)
    if tagged is not None:
        inside = boxed(tagged)
        return _letter(tagged if inside is None else inside, options) or _stated(tagged)
    after = completion.rpartition(THINK_END)[2]
    region = after if after.strip() else completion
    inside = boxed(region)
    if inside is not None:
        return _letter(inside, options)
    lines = region.strip()[-LONGEST_ANSWER:].splitlines()
    if (stated := _stated(region)) is not None or not lines:
        return stated
    concluded = _CONCLUDED.fullmatch(_DRESS.sub("", lines[-1]))
    if concluded:
        return concluded[1] or concluded[2]
    return _letter(lines[-1], options) or _in_words(region, options)


def _in_words(region: str, options: Sequence[str] | None) -> str | None:
    """The letter of the option whose words follow the last `answer:`."""
    said = labelled_answer(region) if options else None
    return _letter(said, options) if said else None


def _stated(text: str) -> str | None:
    found = None
    for found in _STATED.finditer(text):  # noqa: B007 - the last one is what counts
        pass
    if found is None or _hedged(text, found.end(1), found.group(1).upper()):
        return None
    return found.group(1).upper()


@register("multiple_choice")
class MultipleChoice(Reward):
    """1 where the completion chooses the right letter.

    Reference: the letter, or {"answer": letter or index from 0, "options": [...]}, with which an answer in the right
    option's words counts too.
    """

    def extract(self, completion: str) -> str | None:
        return chosen(completion)

    def judge(self, completion: str, reference: Reference) -> float:
        options = None
        if isinstance(reference, Mapping):
            options, reference = reference.get("options"), reference.get("answer")
        if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(LETTERS):
            reference = LETTERS[reference]
        right = str(reference).strip().strip("()").upper() if isinstance(reference, str) else ""
        if len(right) != 1 or right not in LETTERS[: len(options) if options else len(LETTERS)]:
            raise ValueError(f"the reference of a choice is one of its letters, not {reference!r}")
        return float(chosen(completion, options) == right)
