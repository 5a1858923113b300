"""The paper's measures as plain functions of a table of right and wrong: pass@1, pass@k, cons@k, their intervals.

pass@1 is the mean over k samples of one problem, then over problems (DeepSeek-R1, section 3 and appendix D);
cons@k is the share of problems whose majority answer is right; pass@k is the chance that one of k samples is right
(Chen et al. 2021, equation 1). Intervals are bootstrapped over problems, because the samples of one problem are not
independent.

A verdict is a number from 0 to 1, or None where the verifier itself failed: such a sample is left out, and a problem
of which nothing is left is left out too. Who reports a measure reports the number of failures beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import comb, nan

import numpy as np

Verdicts = Sequence[Sequence[float | None]]  # [problem][sample]


def means(correct: Verdicts) -> list[float]:
    """The mean verdict of each problem that has one."""
    known = ([value for value in row if value is not None] for row in correct)
    return [sum(row) / len(row) for row in known if row]


def pass_at_1(correct: Verdicts) -> float:
    """Mean over problems of the mean over samples; nan where nothing was judged."""
    values = means(correct)
    return float(np.mean(values)) if values else nan


def pass_at_k(correct: Verdicts, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k), for c right ones among n samples: the unbiased estimate of the
    chance that at least one of k samples is right. A verdict below 1 is not right. A problem of fewer than k judged
    samples is left out; nan where all are."""
    known = ([value for value in row if value is not None] for row in correct)
    counts = [(len(row), sum(value >= 1.0 for value in row)) for row in known if len(row) >= k]
    # comb(n - c, k) is 0 where fewer than k are wrong; whole numbers, so that nothing cancels
    return float(np.mean([1.0 - comb(n - c, k) / comb(n, k) for n, c in counts])) if counts else nan


def steps_of_k(n: int) -> list[int]:
    """The k for which pass@k is told of n samples: powers of two, and n."""
    return sorted({*(1 << power for power in range(1, n.bit_length()) if 1 << power <= n), *([n] if n > 1 else [])})


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample that gave the most common answer; None where no sample gave one.

    Ties go to the answer that was given first, so the outcome does not depend on hashing or on knowing what is right.
    """
    given = [a for a in answers if a is not None]
    if not given:
        return None
    best = max(Counter(given).items(), key=lambda item: (item[1], -given.index(item[0])))[0]
    return answers.index(best)


def consensus(answers: Sequence[Sequence[str | None]], correct: Verdicts) -> float:
    """Share of problems whose majority answer is right; a problem without any answer counts as wrong.

    The majority's verdict is that of the first judged sample that gave its answer; without one the problem is left out.
    """
    hits = []
    for given, right in zip(answers, correct, strict=True):
        index = majority(given)
        if index is None:
            hits.append(0.0)
            continue
        judged = [v for a, v in zip(given, right, strict=True) if a == given[index] and v is not None]
        if judged:
            hits.append(float(judged[0] >= 1.0))
    return float(np.mean(hits)) if hits else nan


def bootstrap_interval(
    values: Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    statistic: Callable[[np.ndarray], float] | None = None,
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (one a problem), or of a `statistic` of the indices drawn; a fixed
    seed, so that it is part of the result. (nan, nan) of nothing."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return nan, nan
    picks = np.random.default_rng(0).integers(0, len(array), size=(resamples, len(array)))
    drawn = array[picks].mean(axis=1) if statistic is None else np.array([statistic(pick) for pick in picks])
    tail = (1.0 - level) / 2.0 * 100.0
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return float(low), float(high)


def by_category(categories: Sequence[str], correct: Verdicts) -> dict[str, Mapping[str, float]]:
    """Category -> problems, pass@1 and its interval, in the order of their names."""
    rows: dict[str, list] = defaultdict(list)
    for category, row in zip(categories, correct, strict=True):
        rows[category].append(row)
    table = {}
    for category, part in sorted(rows.items()):
        low, high = bootstrap_interval(means(part))
        table[category] = {"problems": len(part), "pass@1": pass_at_1(part), "low": low, "high": high}
    return table
