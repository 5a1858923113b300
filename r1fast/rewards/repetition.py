"""A penalty for going round in circles: the share of a completion's word sequences that it has written before."""

from __future__ import annotations

import re

from r1fast.rewards.base import Reference, Reward, register, settings

# A word, or one character of the scripts that put no spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|\w+")


def repeated_share(text: str, n: int) -> float:
    """1 - distinct / all n-grams of words, in [0, 1); 0 where there are fewer than two n-grams."""
    words = _WORD.findall(text.lower())
    grams = [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


@register("repetition")
class Repetition(Reward):
    """Minus the share of repeated n-grams of words, in (-1, 0] (Yeo et al. 2025, arXiv 2502.03373, section 4.3 penalise
    repeated n-grams where RL is left to make chains long). The reference is unused; `rewards.repetition_ngram` is n."""

    def judge(self, completion: str, reference: Reference = None) -> float:
        return -repeated_share(completion, settings().repetition_ngram)
