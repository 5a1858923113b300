"""What sampling a prompt is expected to cost, so that ranks get even shares of it (parallel.World.share).

A completion's length is most of its cost and is known only afterwards, but a prompt that comes again is about as long,
beside the others, as it was before: what is kept for each prompt is its length relative to the mean of its draw, so
that it holds while the policy's answers grow. Every rank sees all groups, so all expect the same; which rank draws a
prompt changes none of its tokens (seeds are each request's own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from r1fast.types import Prompt, RolloutGroup

NEWS = 0.5  # weight of a prompt's newest relative length; its older ones share the rest


class Lengths:
    """Expected completion lengths, learned from the run; part of a stage's state."""

    def __init__(self) -> None:
        self._mean = 0.0  # tokens of a completion, in the newest draw
        self._relative: dict[str, float] = {}  # by prompt

    def costs(self, prompts: Sequence[Prompt], samples: int) -> list[float]:
        """Tokens that `samples` of each prompt will take: the prompt's own, and those expected of its completions.

        A prompt that was never drawn is expected to be of the mean length."""
        each = samples * self._mean
        return [len(prompt.tokens) + each * self._relative.get(_name(prompt), 1.0) for prompt in prompts]

    def seen(self, prompts: Sequence[Prompt], lengths: Sequence[float]) -> None:
        """A draw of these prompts gave completions of these mean lengths (tokens)."""
        mean = sum(lengths) / max(len(lengths), 1)
        if not mean:
            return
        self._mean = mean
        for prompt, length in zip(prompts, lengths, strict=True):
            name, news = _name(prompt), length / mean
            before = self._relative.get(name, news)
            self._relative[name] = before + NEWS * (news - before)

    def state_dict(self) -> dict[str, Any]:
        relative = torch.tensor(list(self._relative.values()), dtype=torch.float64)
        return {"mean": self._mean, "prompts": list(self._relative), "relative": relative}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean = state["mean"]
        self._relative = dict(zip(state["prompts"], state["relative"].tolist(), strict=True))


def _name(prompt: Prompt) -> str:
    return f"{prompt.task}/{prompt.id}"


def mean_lengths(groups: Sequence[RolloutGroup]) -> list[float]:
    """Mean completion length of each group, in tokens."""
    return [sum(len(r.tokens) for r in group.rollouts) / len(group.rollouts) for group in groups]
