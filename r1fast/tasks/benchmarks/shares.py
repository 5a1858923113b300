"""Numbers of a benchmark that are shares of something else than samples: instructions followed, questions tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Answered = Sequence[tuple[Mapping[str, Any], Sequence[Any]]]  # (problem's meta, its samples), for every problem


def _values(answered: Answered, kind: str) -> list[float]:
    """The mean over a problem's samples of one kind of reward, for every problem that has one."""
    found = ([s.rewards[kind] for s in samples if kind in s.rewards] for _, samples in answered)
    return [sum(row) / len(row) for row in found if row]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def mean_beside(names: Mapping[str, str]) -> Callable[[Answered, Any], dict[str, float]]:
    """A summary of means: name -> kind of reward."""
    return lambda answered, options: {name: _mean(_values(answered, kind)) for name, kind in names.items()}


def ifeval_summary(answered: Answered, options: Any) -> dict[str, float]:
    """The four accuracies of Zhou et al. 2023: a prompt counts where all of its instructions are followed; of single
    instructions, a prompt with three counts three times."""
    prompts = {"prompt strict": "accuracy", "prompt loose": "ifeval_loose"}
    result = {name: _mean(_values(answered, kind)) for name, kind in prompts.items()}
    single = {"instruction strict": "ifeval_instructions", "instruction loose": "ifeval_loose_instructions"}
    for name, kind in single.items():
        followed = total = 0.0
        for meta, samples in answered:
            shares = [s.rewards[kind] for s in samples if kind in s.rewards]
            if shares:
                followed += _mean(shares) * meta["instructions"]
                total += meta["instructions"]
        result[name] = followed / total if total else float("nan")
    return result


def facts_summary(answered: Answered, options: Any) -> dict[str, float]:
    """SimpleQA's numbers (Wei et al. 2024): right, wrong and not tried; right of those tried; and F1, the harmonic mean
    of right over all and right over tried."""
    right, tried = _mean(_values(answered, "accuracy")), _mean(_values(answered, "judge_attempted"))
    of_tried = right / tried if tried else 0.0
    f1 = 2 * right * of_tried / (right + of_tried) if right + of_tried else 0.0
    return {
        "correct": right,
        "incorrect": tried - right,
        "not attempted": 1 - tried,
        "correct of attempted": of_tried,
        "F1": f1,
    }
