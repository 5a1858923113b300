"""The paper's measures as plain functions of a table of right and wrong: pass@1, cons@k and their intervals.

pass@1 is the mean over k samples of one problem, then over problems (DeepSeek-R1, section 3 and appendix D);
cons@k is the share of problems whose majority answer is right. Intervals are bootstrapped over problems, because
the samples of one problem are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def pass_at_1(correct: Sequence[Sequence[float]]) -> float:
    """Mean over problems of the mean over samples. `correct[p][s]` is 1.0 where sample s of problem p is right."""
    return float(np.mean([np.mean(row) for row in correct]))


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample that gave the most common answer; None where no sample gave one.

    Ties go to the answer that was given first, so the outcome does not depend on hashing or on knowing what is right.
    """
    given = [a for a in answers if a is not None]
    if not given:
        return None
    best = max(Counter(given).items(), key=lambda item: (item[1], -given.index(item[0])))[0]
    return answers.index(best)


def consensus(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[float]]) -> float:
    """Share of problems whose majority answer is right; a problem without any answer counts as wrong."""
    hits = []
    for given, right in zip(answers, correct, strict=True):
        index = majority(given)
        hits.append(0.0 if index is None else float(right[index] >= 1.0))
    return float(np.mean(hits))


def bootstrap_interval(values: Sequence[float], level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (one a problem); a fixed seed, so that it is part of the result."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), size=(resamples, len(array)))
    means = array[picks].mean(axis=1)
    tail = (1.0 - level) / 2.0 * 100.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)
