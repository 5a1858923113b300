"""Language consistency: the share of target-language words in the chain of thought (DeepSeek-R1, section 2.3.2).

A word's language is judged by its script, so English and French are one and English and Chinese are not; this is
what a mixed chain of R1-Zero looks like, and it needs no model. Numbers, symbols, LaTeX, tags and single Latin or
Greek letters (variables) are no words; a word of a script that is not listed is one of another language.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import TAGS, thinking

# Script -> (ranges of a character class, characters that make a word where no spaces divide them; 0: a run is a word).
# Chinese words have between one and two characters on average; without this a whole sentence would weigh one word.
SCRIPTS: dict[str, tuple[str, int]] = {
    "latin": ("A-Za-z0-9_\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a", 0),
    "han": ("\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af", 2),
    "kana": ("\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f", 3),
    "hangul": ("\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3", 0),
    "cyrillic": ("\u0400-\u052f", 0),
    "arabic": ("\u0620-\u065f\u066e-\u06d3\u06d5-\u06ef\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff", 0),
    "greek": ("\u0370-\u03ff\u1f00-\u1fff", 0),
    "hebrew": ("\u05d0-\u05ea", 0),
    "devanagari": ("\u0900-\u0963\u0970-\u097f", 0),
    "thai": ("\u0e01-\u0e3a\u0e40-\u0e4e", 4),
    "bengali": ("\u0980-\u09e3\u09f0-\u09ff", 0),
    "gurmukhi": ("\u0a00-\u0a65\u0a70-\u0a7f", 0),
    "gujarati": ("\u0a80-\u0ae5\u0af0-\u0aff", 0),
    "tamil": ("\u0b80-\u0be5", 0),
    "telugu": ("\u0c00-\u0c65", 0),
    "kannada": ("\u0c80-\u0ce5", 0),
    "malayalam": ("\u0d00-\u0d65\u0d7a-\u0d7f", 0),
    "sinhala": ("\u0d80-\u0de5", 0),
    "lao": ("\u0e81-\u0ecf", 4),
    "myanmar": ("\u1000-\u103f\u104a-\u109f", 4),
    "khmer": ("\u1780-\u17d3", 4),
    "armenian": ("\u0531-\u0587", 0),
    "georgian": ("\u10a0-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f", 0),
    "ethiopic": ("\u1200-\u135f", 0),
}
_SPOKEN: dict[tuple[str, ...], str] = {
    ("latin",): "en fr de es it pt nl sv da no fi pl cs sk sl hr ro hu tr vi id ms sw ca",
    ("han",): "zh",
    ("kana", "han"): "ja",
    ("hangul",): "ko",
    ("cyrillic",): "ru uk bg be mk kk",
    ("arabic",): "ar fa ur",
    ("greek",): "el",
    ("hebrew",): "he",
    ("devanagari",): "hi mr ne",
    ("thai",): "th",
    ("bengali",): "bn as",
    ("gurmukhi",): "pa",
    ("gujarati",): "gu",
    ("tamil",): "ta",
    ("telugu",): "te",
    ("kannada",): "kn",
    ("malayalam",): "ml",
    ("sinhala",): "si",
    ("lao",): "lo",
    ("myanmar",): "my",
    ("khmer",): "km",
    ("armenian",): "hy",
    ("georgian",): "ka",
    ("ethiopic",): "am ti",
}
LANGUAGES = {code: scripts for scripts, codes in _SPOKEN.items() for code in codes.split()}

# Letters of any other script are words of no language here; signs that Unicode calls letters (\u211d, \u00b5) are not.
_SIGNS = "\u00aa\u00b2-\u00be\u02b0-\u02ff\u2000-\u2bff\u3000-\u303f\u3200-\u33ff\U0001d400-\U0001d7ff"
_OTHER = f"(?P<other>(?:(?![{_SIGNS}])[^\\W\\d_])+)"
_SCRIPTS = "|".join([*(f"(?P<{script}>[{ranges}]+)" for script, (ranges, _) in SCRIPTS.items()), _OTHER])
_WORD = re.compile(rf"(?=\w)(?:{_SCRIPTS})")  # the first test passes over signs at once
_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS))
_COMMAND = re.compile(r"\\[A-Za-z]+")
_INLINE = re.compile(r"\$[^$\n]{1,300}\$")
_NOT_A_WORD = re.compile(r"[0-9_]")
_DISPLAYED = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))


def without_math(text: str) -> str:
    """`text` without LaTeX: displayed and inline formulas, then stray commands. Linear in the length."""
    for opening, closing in _DISPLAYED:
        kept, at = [], 0
        while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
            kept.append(text[at:start])
            at = end + len(closing)
        text = " ".join([*kept, text[at:]])
    return _COMMAND.sub(" ", _INLINE.sub(" ", text))


def word_counts(text: str) -> dict[str, int]:
    """Script (or "other") -> number of words of it in `text`."""
    counts = dict.fromkeys([*SCRIPTS, "other"], 0)
    for match in _WORD.finditer(without_math(_TAG.sub(" ", text))):
        script, word = match.lastgroup, match.group()
        if script == "latin" and (len(word) == 1 or _NOT_A_WORD.search(word)):
            continue  # x, x1, 3cm
        if script == "greek" and len(word) == 1:
            continue  # an angle, a mean
        per_word = SCRIPTS[script][1] if script in SCRIPTS else 0
        counts[script] += -(-len(word) // per_word) if per_word else 1
    return counts


@register("language")
class Language(Reward):
    """Target-language words over all words of the chain of thought, in [0, 1].

    Reference: {"language": "en"}, or the code alone. A chain without any word scores 0: it is not in the language,
    and saying nothing must not be the way to a full reward.
    """

    def judge(self, completion: str, reference: Reference) -> float:
        code = reference.get("language") if isinstance(reference, Mapping) else reference
        if code not in LANGUAGES:
            raise ValueError(f"no language {code!r}; known: {', '.join(LANGUAGES)}")
        counts = word_counts(thinking(completion))
        total = sum(counts.values())
        return sum(counts[script] for script in LANGUAGES[code]) / total if total else 0.0
