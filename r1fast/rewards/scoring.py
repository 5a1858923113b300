"""From sampled groups to rewards: each kind is judged, weighted and summed, and failures are kept apart from zeros.

"accuracy" means the task's own verifier; every other kind is a reward's name, or is handed in ready-made (a
preference model lives with the stage that has a model to ask).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from r1fast.config import UserError
from r1fast.rewards import base
from r1fast.rewards.base import Score
from r1fast.rewards.layout import thinking
from r1fast.types import Rollout, RolloutGroup

if TYPE_CHECKING:
    from r1fast.rewards.pool import RewardPool

Given = Mapping[str, Sequence[Sequence[float]]]  # kind -> [group][rollout] -> value


def score(
    groups: Sequence[RolloutGroup],
    weights: Mapping[str, float],
    verifier: str | None,
    pool: RewardPool | None = None,
    given: Given | None = None,
) -> list[RolloutGroup]:
    """`groups` with `rewards` (by kind), `reward` (their weighted sum) and `errors` filled in every rollout.

    weights: kind -> weight. verifier: the reward that "accuracy" means for these groups. pool: who runs the rewards
    that may hang; without one, the process's shared pool. given: kinds whose values are known already.

    Where a verifier fails, the kind goes to `errors` and not to `rewards`, and the rollout's reward is the mean of
    those of its group that were scored: its advantage is then zero, so that a failure trains nothing (and the
    group's mean is unmoved). A group in which every rollout failed has equal rewards and is dead as a whole. A kind of
    weight 0 is measured only: its failure changes no reward.
    """
    given = given or {}
    scores: dict[str, list[list[Score]]] = {}
    for kind in sorted(weights, key=lambda kind: kind == "length"):  # `length` asks what is right
        if kind in given:
            scores[kind] = [[Score(value) for value in values] for values in given[kind]]
        else:
            right = scores.get("accuracy")
            scores[kind] = _judge(groups, kind, verifier, pool, right)
    return [_filled(group, weights, {kind: scores[kind][i] for kind in weights}) for i, group in enumerate(groups)]


class Scorer:
    """`score` for mixed batches: what each task's prompts are judged by, chosen once.

    weights: task -> kind -> weight. verifiers: task -> reward name, or None where nothing is right or wrong.
    """

    def __init__(
        self,
        weights: Mapping[str, Mapping[str, float]],
        verifiers: Mapping[str, str | None],
        pool: RewardPool | None = None,
    ) -> None:
        self.weights = weights
        self.verifiers = verifiers
        self.pool = pool
        for task, kinds in weights.items():
            if "accuracy" in kinds:
                _verifier(task, verifiers.get(task))

    def score(self, groups: Sequence[RolloutGroup], given: Given | None = None) -> list[RolloutGroup]:
        """All groups scored, in their order. `given` has a row for every group; a task that lacks the kind skips it."""
        scored: list[RolloutGroup | None] = [None] * len(groups)
        for task in dict.fromkeys(group.prompt.task for group in groups):
            chosen = [i for i, group in enumerate(groups) if group.prompt.task == task]
            known = {kind: [values[i] for i in chosen] for kind, values in (given or {}).items()}
            part = score([groups[i] for i in chosen], self.weights[task], self.verifiers.get(task), self.pool, known)
            for i, group in zip(chosen, part, strict=True):
                scored[i] = group
        return scored  # type: ignore[return-value]


def stop_above(groups: Iterable[RolloutGroup], share: float) -> None:
    """UserError where more than `share` of all scores have failed: the verifiers are broken, and a run that goes on
    learns from the few that were not."""
    scored, failed = 0, Counter()
    for group in groups:
        for rollout in group.rollouts:
            scored += len(rollout.rewards) + len(rollout.errors)
            failed.update((kind, error) for kind, error in rollout.errors.items())
    if failed.total() <= share * scored:
        return
    told = "; ".join(f"{kind}: {error} ({times}x)" for (kind, error), times in failed.most_common(2))
    raise UserError(
        f"{failed.total()} of {scored} scores of a step failed, more than rewards.max_failures={share:g} allows: {told}"
    )


def count_errors(groups: Iterable[RolloutGroup]) -> dict[str, int]:
    """kind -> rollouts whose verifier failed."""
    return dict(Counter(kind for group in groups for rollout in group.rollouts for kind in rollout.errors))


def readable(completion: str, language: str | None, least_share: float = 1.0, max_paragraph: int = 2000) -> str | None:
    """Why a chain of thought is not fit to be learned from, or None where it is (DeepSeek-R1, section 2.3.3).

    Dropped: mixed language (less than `least_share` of its words in `language`), a paragraph of more than
    `max_paragraph` characters, a code block. Where `language` is None, languages are not looked at.
    """
    thought = thinking(completion)
    if "```" in thought:
        return "code block in the reasoning"
    longest = max((len(paragraph) for paragraph in thought.split("\n\n")), default=0)
    if longest > max_paragraph:
        return f"paragraph of {longest} characters"
    if language is None:
        return None
    share = base.get("language").judge(completion, language)
    return f"mixed language: {share:.0%} {language}" if share < least_share else None


# -- inside ---------------------------------------------------------------------------------------------------


def _verifier(task: str, name: str | None) -> str:
    if name is None:
        raise UserError(f"task {task!r} has no right answers: leave 'accuracy' out of its rewards")
    return base.get(name).name


def _reference(kind: str, group: RolloutGroup, index: int, right: Sequence[Score] | None) -> Any:
    """What a reward is given of a rollout beside its text."""
    prompt = group.prompt
    if kind in ("length", "overlong"):
        lengths = [len(rollout.tokens) for rollout in group.rollouts]
        told = {"tokens": lengths[index], "shortest": min(lengths), "longest": max(lengths)}
        if right is not None and right[index].error is None:  # a verifier that failed says nothing of what is right
            told["right"] = right[index].value >= 1.0
        return told
    if kind == "judge" and not (isinstance(prompt.answer, Mapping) and "question" in prompt.answer):
        known = {} if prompt.answer is None else {"answer": str(prompt.answer)}
        asked = {key: prompt.meta[key] for key in ("other", "rubric") if key in prompt.meta}
        return {"question": prompt.text, **known, **asked}
    if kind != "language":
        return prompt.answer
    if "language" not in prompt.meta:
        raise UserError(f"task {prompt.task!r} does not say its language: leave 'language' out of its rewards")
    return {"language": prompt.meta["language"]}


def _judge(
    groups: Sequence[RolloutGroup],
    kind: str,
    verifier: str | None,
    pool: RewardPool | None,
    right: Sequence[Sequence[Score]] | None = None,
) -> list[list[Score]]:
    """One kind for every rollout of every group; `right`: their accuracy, where it is known."""
    if not groups:
        return []
    reward = base.get(_verifier(groups[0].prompt.task, verifier) if kind == "accuracy" else kind)
    items = [
        (reward.name, rollout.text, _reference(reward.name, group, i, right[g] if right else None))
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]
    if reward.cheap:
        scores = iter([reward.attempt(text, reference) for _, text, reference in items])
    else:
        if pool is None:
            from r1fast.rewards.pool import shared

            pool = shared()
        scores = iter(pool.run(items))
    return [[next(scores) for _ in group.rollouts] for group in groups]


def _filled(group: RolloutGroup, weights: Mapping[str, float], scores: Mapping[str, Sequence[Score]]) -> RolloutGroup:
    rollouts: list[Rollout] = []
    failed: list[bool] = []
    for i, rollout in enumerate(group.rollouts):
        errors = {kind: s[i].error for kind, s in scores.items() if s[i].error is not None}
        rewards = {kind: s[i].value for kind, s in scores.items() if kind not in errors}
        total = sum(weights[kind] * value for kind, value in rewards.items())
        rollouts.append(replace(rollout, rewards=rewards, reward=total, errors=errors))
        failed.append(any(weights[kind] for kind in errors))
    if any(failed):
        clean = [rollout.reward for rollout, bad in zip(rollouts, failed, strict=True) if not bad]
        mean = sum(clean) / len(clean) if clean else 0.0
        rollouts = [replace(r, reward=mean) if bad else r for r, bad in zip(rollouts, failed, strict=True)]
    return replace(group, rollouts=rollouts)
