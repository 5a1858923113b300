"""The format reward of R1-Zero: reasoning and answer each in their tags (DeepSeek-R1, section 2.2.2)."""

from __future__ import annotations

from r1fast.rewards.base import Reference, Reward, register
from r1fast.rewards.layout import well_formed


@register("format")
class Format(Reward):
    """1 where the whole completion is `<think>...</think> <answer>...</answer>`, each once; the reference is unused."""

    def judge(self, completion: str, reference: Reference = None) -> float:
        return float(well_formed(completion))
