"""Exact answers: the right one is known as text, as in the tiny tasks and multiple choice."""

from __future__ import annotations

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import labelled_answer, tagged_answer


@register("exact")
class Exact(Reward):
    """1 where the tagged answer, or else the last `answer : x`, equals the reference up to white space."""

    def extract(self, completion: str) -> str | None:
        found = tagged_answer(completion)
        if found is None:
            found = labelled_answer(completion)
        return " ".join(found.split()) or None if found is not None else None

    def judge(self, completion: str, reference: Reference) -> float:
        if not isinstance(reference, str | int | float):
            raise TypeError(f"the reference of an exact answer is a string or a number, not {type(reference).__name__}")
        return float(self.extract(completion) == " ".join(str(reference).split()))
