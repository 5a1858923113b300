"""Instructions that can be checked by a program: the 25 kinds of IFEval (Zhou et al. 2023), strict and loose.

Strict looks at the answer as it is; loose also at it without its first line, its last line, both, and without
asterisks, and is content where one of these follows the instruction. What each kind means is what the authors' program
makes of it, also where that is peculiar (a bullet with `*` must not be bold; a title is `<<so>>`), but for two things:
the authors count sentences and capitals with NLTK's models, which are downloaded; here rules do it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import final_answer

Check = Callable[..., bool]
KINDS: dict[str, Check] = {}

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co|U\.S|[ap]\.m|[A-Z])\.$")
_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]+")
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


def kind(name: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        KINDS[name] = check
        return check

    return add


def related(count: int, relation: str | None, wanted: int) -> bool:
    """The two relations of the data: `at least` and `less than`."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"a relation is 'at least' or 'less than', not {relation!r}")
    return count >= wanted if relation == "at least" else count < wanted


def sentences(text: str) -> int:
    """How many: ends of sentences that are no abbreviation's, and a last one without an end."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[max(start, end.start() - 8) : end.start() + 1]):
            count, start = count + 1, end.end()
    return count + bool(text[start:].strip())


def language_of(text: str) -> str | None:
    """The code of a text's language, by the library that IFEval uses; None where it cannot tell."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise RuntimeError("languages need the package langdetect; pip install 'r1fast[eval]'") from None
    DetectorFactory.seed = 0  # it draws
    try:
        return detect(text)
    except LangDetectException:
        return None


# -- keywords and language ------------------------------------------------------------------------------------------


@kind("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


@kind("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return related(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


@kind("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


@kind("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(text.lower().count(letter.lower()), let_relation, let_frequency)


@kind("language:response_language")
def _language(text: str, language: str) -> bool:
    return language_of(text) in (language, None)


# -- length ---------------------------------------------------------------------------------------------------------


@kind("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return related(sentences(text), relation, num_sentences)


@kind("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return related(len(re.findall(r"\w+", text)), relation, num_words)


@kind("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by ***, none of them empty but at the ends."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    full = [bool(part.strip()) for part in parts]
    return all(full[1:-1]) and sum(full) == num_paragraphs


@kind("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    full = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > full or not parts[nth_paragraph - 1].strip():
        return False
    word = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return full == num_paragraphs and word.lower() == first_word.lower()


# -- content and format ---------------------------------------------------------------------------------------------


@kind("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@kind("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, r"\s*" + postscript_marker.lower() + r".*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


@kind("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(p, text, re.MULTILINE) for p in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


@kind("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@kind("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n\*]*\*", text), *re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


@kind("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter}\s?\d+\s?", text)) >= num_sections


@kind("detectable_format:json_format")
def _json(text: str) -> bool:
    bare = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


@kind("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


# -- combinations, beginnings and ends, case, punctuation -------------------------------------------------------------


@kind("combination:two_responses")
def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


@kind("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@kind("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@kind("startend:quotation")
def _quotation(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


@kind("change_case:capital_word_frequency")
def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return related(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


@kind("change_case:english_capital")
def _upper(text: str) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


@kind("change_case:english_lowercase")
def _lower(text: str) -> bool:
    return text.islower() and language_of(text) in ("en", None)


@kind("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


# -- the rewards ----------------------------------------------------------------------------------------------------


def readings(text: str, loose: bool) -> Iterator[str]:
    """The texts of which one must follow the instruction."""
    yield text
    if loose:
        lines = text.split("\n")
        cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
        yield from cut[1:]
        yield from (part.replace("*", "") for part in cut)


def followed(completion: str, reference: Reference, loose: bool) -> list[bool]:
    """For every instruction of the reference whether the completion's final answer follows it."""
    if not isinstance(reference, Mapping) or not reference.get("instruction_id_list"):
        raise TypeError("the reference of ifeval is a mapping with `instruction_id_list` and `kwargs`")
    text = final_answer(completion)
    given = zip(reference["instruction_id_list"], reference["kwargs"], strict=True)
    return [_follows(text, name, arguments, loose) for name, arguments in given]


def _follows(text: str, name: str, arguments: Mapping[str, Any], loose: bool) -> bool:
    if name not in KINDS:
        raise ValueError(f"there is no instruction {name!r}")
    known = {key: value for key, value in arguments.items() if value is not None}
    return any(bool(part.strip()) and KINDS[name](part, **known) for part in readings(text, loose))


class _IFEval(Reward):
    cheap = False  # keywords are patterns of the data's, and a pattern can take for ever
    loose = False
    single = False

    def judge(self, completion: str, reference: Reference) -> float:
        found = followed(completion, reference, self.loose)
        return sum(found) / len(found) if self.single else float(all(found))


@register("ifeval")
class IFEval(_IFEval):
    """1 where every instruction is followed, strictly: prompt-level accuracy."""


@register("ifeval_loose")
class IFEvalLoose(_IFEval):
    """1 where every instruction is followed, loosely."""

    loose = True


@register("ifeval_instructions")
class IFEvalInstructions(_IFEval):
    """The share of instructions that are followed, strictly."""

    single = True


@register("ifeval_loose_instructions")
class IFEvalLooseInstructions(_IFEval):
    """The share of instructions that are followed, loosely."""

    loose = single = True
