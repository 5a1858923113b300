"""Which training texts hold what is to be tested: 10-grams in common, as in the paper (DeepSeek-R1, appendix D.1: any
training text with a 10-gram of an evaluation's question or reference solution is filtered out).

Words are runs of letters and digits in lower case; a character of a script without spaces is a word by itself. So
neither punctuation nor layout hides a copy. A question shorter than n words has no n-gram: it is looked for whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

N = 10
# Han, kana, Thai, Lao, Khmer and Burmese are written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass(frozen=True, slots=True)
class Hit:
    """An n-gram that a text has in common with a problem."""

    benchmark: str
    problem: str
    words: str


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def grams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    yield from (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


class Index:
    """The n-grams of benchmarks. Every n-gram names the first problem that has it."""

    def __init__(self, n: int = N) -> None:
        self.n = n
        self._long: dict[tuple[str, ...], tuple[str, str]] = {}
        self._short: dict[int, dict[tuple[str, ...], tuple[str, str]]] = {}  # by length: whole questions below n words

    def add(self, benchmark: str, problem: str, texts: Iterable[str]) -> None:
        """A problem's question, then its solutions; only a question is worth looking for where it is short."""
        for position, text in enumerate(texts):
            tokens = words(text)
            if len(tokens) >= self.n:
                for gram in grams(tokens, self.n):
                    self._long.setdefault(gram, (benchmark, problem))
            elif tokens and position == 0:
                self._short.setdefault(len(tokens), {}).setdefault(tuple(tokens), (benchmark, problem))

    def __len__(self) -> int:
        return len(self._long) + sum(map(len, self._short.values()))

    def find(self, texts: Iterable[str]) -> Hit | None:
        """The first n-gram of any of a row's texts that a problem has; a short question counts only where it is the
        whole of a text, for a few common words prove nothing inside a longer one."""
        for text in texts:
            tokens = words(text)
            for gram in grams(tokens, self.n):
                if (place := self._long.get(gram)) is not None:
                    return Hit(*place, " ".join(gram))
            if (place := self._short.get(len(tokens), {}).get(tuple(tokens))) is not None:
                return Hit(*place, " ".join(tokens))
        return None
