"""A Codeforces rating from verdicts, by maximum likelihood, and its place among people.

Under Elo's model a participant of rating r solves a problem of rating d with chance 1 / (1 + 10^((d - r) / 400)); a
problem's own rating is defined so on Codeforces (half of those who have its rating solve it). The likelihood of all
verdicts of all contests is concave in r, so its one maximum is where as many are solved as were to be expected. The
interval is bootstrapped over contests, whose problems are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1fast.config import UserError

LOWEST, HIGHEST = 0.0, 4000.0  # where all fail or all are solved there is no maximum: the rating is the bound
RESAMPLES = 1000


def chance(rating: float | np.ndarray, problem: np.ndarray) -> np.ndarray:
    """That a participant of `rating` solves a problem of rating `problem`."""
    return 1.0 / (1.0 + 10.0 ** ((problem - rating) / 400.0))


def elo(problems: Sequence[float], solved: Sequence[float]) -> float:
    """The rating of highest likelihood. problems: their ratings; solved: verdicts from 0 to 1 (shares of tries).

    Between LOWEST and HIGHEST; nan of no problems."""
    if not len(problems):
        return float("nan")
    return float(_best(np.asarray(problems, float), np.asarray(solved, float), np.ones((1, len(problems))))[0])


def _best(problems: np.ndarray, solved: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rating for each row of `weights` [R, P], by bisection: the derivative of the log-likelihood falls in it."""
    low, high = (np.full(len(weights), bound) for bound in (LOWEST, HIGHEST))
    total = weights @ solved
    for _ in range(42):  # to a billionth of a point
        middle = (low + high) / 2
        more = total > (weights * chance(middle[:, None], problems)).sum(1)
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return (low + high) / 2


def contest_interval(
    contests: Sequence[str], problems: Sequence[float], solved: Sequence[float], level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of `elo` over contests drawn with replacement; a fixed seed."""
    if not len(problems):
        return float("nan"), float("nan")
    names, of = np.unique(np.asarray(contests), return_inverse=True)
    picks = np.random.default_rng(0).integers(0, len(names), size=(RESAMPLES, len(names)))
    times = np.stack([np.bincount(pick, minlength=len(names)) for pick in picks])  # how often each contest is drawn
    drawn = _best(np.asarray(problems, float), np.asarray(solved, float), times[:, of].astype(float))
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def percentile(rating: float, people: Sequence[float]) -> float:
    """Per cent of `people` (ratings of participants) whose rating is lower; equals count half."""
    people = np.asarray(people, float)
    return float(((people < rating).mean() + (people == rating).mean() / 2) * 100)


def read_ratings(path: str) -> list[float]:
    """Ratings of participants: a number a line, or the JSON that Codeforces' API answers to user.ratedList (`rating`)
    or contest.ratingChanges (`newRating`)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"options.ratings: {path} cannot be read: {error.strerror}") from None
    try:
        if text.lstrip()[:1] == "{":
            return [float(row["rating"] if "rating" in row else row["newRating"]) for row in json.loads(text)["result"]]
        return [float(line) for line in text.split()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"options.ratings: {path} is neither a number a line nor an answer of user.ratedList or "
            f"contest.ratingChanges ({type(error).__name__}: {error})"
        ) from None


def codeforces_summary(answered: Sequence[tuple[Mapping[str, Any], Sequence[Any]]], options: Any) -> dict[str, Any]:
    """The rating of all tries, its interval, and the percentile where ratings of people are given."""
    contests, problems, solved = [], [], []
    for meta, samples in answered:
        verdicts = [s.correct for s in samples if s.correct is not None]
        if verdicts:
            contests.append(meta["contest"])
            problems.append(meta["rating"])
            solved.append(sum(verdicts) / len(verdicts))
    rating, (low, high) = elo(problems, solved), contest_interval(contests, problems, solved)
    told: dict[str, Any] = {"rating": rating, "rating low": low, "rating high": high, "contests": len(set(contests))}
    if options.ratings is not None:
        told["percentile"] = percentile(rating, read_ratings(options.ratings))
    return told
