"""DROP's two scores of an answer that may be several spans (Dua et al. 2019, section 5): exact match, and an F1 over
bags of words in which spans are aligned one to one and a span whose numbers differ counts nothing."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import THINK_END, boxed, labelled_answer, tagged_answer

BETWEEN = "|"  # what separates the spans of a completion's answer
MOST_SPANS = 32  # of a completion; an answer of DROP has at most a dozen

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def said(completion: str) -> str | None:
    """The answer that a completion states: tagged, labelled, boxed, or else its last line."""
    found = tagged_answer(completion)
    if found is None:
        found = labelled_answer(completion)
    if found is None:
        found = boxed(completion)
    if found is None:
        lines = completion.rpartition(THINK_END)[2].strip().splitlines()
        found = lines[-1] if lines else ""
    return found.strip().strip("*").strip() or None


def spans(answer: str | None) -> list[str]:
    return [part.strip() for part in (answer or "").split(BETWEEN) if part.strip()][:MOST_SPANS]


def normalized(text: str) -> str:
    """Lower case, without articles and punctuation, words parted by spaces and hyphens, numbers in one form."""
    words = re.split("[ -]", text.lower())
    return " ".join(" ".join(_number(w) or _ARTICLES.sub(" ", w.translate(_PUNCTUATION)) for w in words).split())


def _number(word: str) -> str | None:
    try:
        return str(float(word.translate(_PUNCTUATION) if not _is_number(word) else word))
    except ValueError:
        return None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def exact(predicted: Sequence[str], right: Sequence[str]) -> float:
    """1 where both are the same spans, in any order (and equally many, as DROP's own program has it)."""
    left, gold = (set(map(normalized, each)) for each in (predicted, right))
    return float(left == gold and len(predicted) == len(right))


def f1(predicted: Sequence[str], right: Sequence[str]) -> float:
    """Mean over the aligned spans of their bags' F1, a span without a partner counting 0; to two places, as DROP's."""
    left, gold = ([set(normalized(span).split()) for span in each] for each in (predicted, right))
    if not left:
        return 0.0
    scores = np.array([[_bag_f1(ours, theirs) for ours in left] for theirs in gold])
    return round(best_total(scores) / max(len(left), len(gold)), 2)


def best_total(scores: np.ndarray) -> float:
    """The largest sum of scores [n, m] over one-to-one pairings of rows and columns (the Hungarian method: shortest
    augmenting paths under potentials, O(n^2 m))."""
    cost = -(scores if scores.shape[0] <= scores.shape[1] else scores.T)
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns + 1)  # potentials; the last column is where a search begins
    partner = np.full(columns + 1, -1)  # column -> row
    for row in range(rows):
        partner[columns], column = row, columns
        least, before = np.full(columns, np.inf), np.full(columns, columns)
        done = np.zeros(columns + 1, bool)
        while partner[column] >= 0:
            done[column] = True
            reduced = cost[partner[column]] - u[partner[column]] - v[:columns]
            better = ~done[:columns] & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.where(done[:columns], np.inf, least).argmin())
            delta = least[following]
            u[partner[done]] += delta
            v[done] -= delta
            least[~done[:columns]] -= delta
            column = following
        while column != columns:  # turn the path round
            partner[column], column = partner[before[column]], before[column]
        partner[columns] = -1
    return float(-sum(cost[partner[c], c] for c in range(columns) if partner[c] >= 0))


def _bag_f1(predicted: set[str], right: set[str]) -> float:
    numbers = {word for word in right if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & right)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def accepted(reference: Reference) -> Iterable[Sequence[str]]:
    """The answers that count as right, each a list of spans."""
    answers = reference.get("answers") if isinstance(reference, Mapping) else None
    if not answers:
        raise ValueError("the reference is a mapping with `answers`: lists of spans, each list right by itself")
    return answers


class _Drop(Reward):
    def extract(self, completion: str) -> str | None:
        return " | ".join(sorted(map(normalized, spans(said(completion))))) or None


@register("drop_f1")
class DropF1(_Drop):
    """The best F1 over the accepted answers."""

    def judge(self, completion: str, reference: Reference) -> float:
        given = spans(said(completion))
        return max(f1(given, right) for right in accepted(reference))


@register("drop_em")
class DropEM(_Drop):
    """1 where the answer is one of the accepted ones."""

    def judge(self, completion: str, reference: Reference) -> float:
        given = spans(said(completion))
        return max(exact(given, right) for right in accepted(reference))
