"""Win rates against a baseline from a judge's preferences: plain, and controlled for length.

Judges prefer the longer answer, so AlpacaEval 2.0 fits a logistic model of the preference (Dubois et al. 2024, eq. 1),

    logit P(model preferred on instruction x) = theta + phi * tanh(d / sd(d)) + psi * difficulty(x),

d the difference of the two answers' lengths in characters, and tells the mean of what it predicts at d = 0. The fit is
maximum likelihood of preferences from 0 to 1 with a weak ridge. The authors' program differs in regularising by an L1
penalty chosen by cross-validation and by adding two sets of their own annotations; without their file of instruction
difficulties (option `difficulty`) that term is left out here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1fast.config import UserError
from r1fast.rewards.layout import final_answer

RIDGE = 1e-3  # on every coefficient, in units of one preference: only so that a model that wins all has a finite fit
Answered = Sequence[tuple[Mapping[str, Any], Sequence[Any]]]


def fit_logistic(features: np.ndarray, preferences: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Coefficients [F] of highest penalised likelihood, by Newton's method; features [N, F], preferences [N], 0..1."""
    weights = np.zeros(features.shape[1])
    for _ in range(100):
        p = _sigmoid(features @ weights)
        gradient = features.T @ (preferences - p) - ridge * weights
        hessian = features.T @ (features * (p * (1 - p))[:, None]) + ridge * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))  # a wild step only near separation
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def length_controlled(
    preferences: Sequence[float],
    lengths: Sequence[float],
    baseline: Sequence[float],
    difficulty: Sequence[float] | None = None,
) -> float:
    """Length-controlled win rate in [0, 1]. preferences: of the model over the baseline, in 0..1, one an instruction;
    lengths and baseline: of the two answers, in characters."""
    preferences = np.asarray(preferences, float)
    if not len(preferences):
        return float("nan")
    difference = np.asarray(lengths, float) - np.asarray(baseline, float)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    columns = [np.ones(len(preferences)), np.tanh(difference / spread) if spread > 0 else np.zeros(len(preferences))]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, float))
    features = np.stack(columns, axis=1)
    weights = fit_logistic(features, preferences)
    features[:, 1] = 0.0
    return float(_sigmoid(features @ weights).mean())


def read_difficulty(path: str) -> list[float]:
    """The authors' instruction_difficulty.csv: a line of names, then the index of an instruction and its difficulty."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            _, *lines = csv.reader(file)
        return [value for _, value in sorted((int(index), float(value)) for index, value in lines)]
    except (OSError, ValueError) as error:
        raise UserError(f"options.difficulty: {path} cannot be read as index,difficulty lines: {error}") from None


def _first(answered: Answered) -> list[tuple[int, float, int, int]]:
    """(index, mean preference, mean length, baseline's length) of every judged instruction."""
    found = []
    for index, (meta, samples) in enumerate(answered):
        judged = [s for s in samples if s.correct is not None]
        if judged:
            preference = sum(s.correct for s in judged) / len(judged)
            length = sum(len(final_answer(s.text)) for s in judged) / len(judged)
            found.append((index, preference, length, meta["baseline"]))
    return found


def alpaca_summary(answered: Answered, options: Any) -> dict[str, float]:
    judged = _first(answered)
    index, preferences, lengths, baseline = zip(*judged, strict=True) if judged else ((), (), (), ())
    difficulty = None
    if options.difficulty is not None:
        known = read_difficulty(options.difficulty)
        if index and index[-1] >= len(known):
            raise UserError(f"options.difficulty: {options.difficulty} has {len(known)} lines, fewer than instructions")
        difficulty = [known[i] for i in index]
    return {
        "length-controlled win rate": length_controlled(preferences, lengths, baseline, difficulty),
        "win rate": float(np.mean(preferences)) if judged else float("nan"),
        "characters": float(np.mean(lengths)) if judged else float("nan"),
    }


def arena_summary(answered: Answered, options: Any) -> dict[str, float]:
    """Of one model against one baseline the Bradley-Terry win rate is the mean preference, ties counting half."""
    values = [s.correct for _, samples in answered for s in samples if s.correct is not None]
    return {"win rate": float(np.mean(values)) if values else float("nan")}
