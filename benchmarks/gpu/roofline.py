"""What one card could do at most: the model of sampling and learning that fractions are given of.

Sampling. A step of decoding reads every weight and does two FLOPs with each for every sequence, whichever takes longer;
reads every key and value that the step attends to; and passes once over the float32 logits. These follow one another.

Learning. Six FLOPs a weight and token, and causal attention forward and backward (3.5 times the forward's products).

`Efficiency()` is that floor; `REALISTIC` is what good engines reach (85% of the bandwidth, 70% of the products in
decoding and 60% in learning, 0.45 ms a step for launches and the host). The old policy's log-probabilities cost no
pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1fast.model.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class Card:
    copy: float  # bytes/s, read and written
    product: float  # FLOP/s


@dataclass(frozen=True, slots=True)
class Efficiency:
    copy: float = 1.0
    decode: float = 1.0
    learn: float = 1.0
    step: float = 0.0  # seconds of a decoding step besides


REALISTIC = Efficiency(copy=0.85, decode=0.70, learn=0.60, step=0.45e-3)
H200 = Card(copy=4.3e12, product=790e12)  # as measured on one, on random data


def matrix_weights(c: DecoderConfig) -> int:
    """Numbers that one token's products read: the layers and the head."""
    layer = c.hidden_size * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.intermediate_size)
    return c.layers * layer + c.vocab_size * c.hidden_size


def kv_bytes(c: DecoderConfig, itemsize: int = 2) -> int:
    """Of one token, all layers."""
    return 2 * c.layers * c.kv_heads * c.head_dim * itemsize


def decode_step(
    c: DecoderConfig, card: Card, sequences: int, own: float, shared: float = 0.0, group: int = 1,
    at: Efficiency = Efficiency(), itemsize: int = 2,
) -> float:  # fmt: skip
    """Seconds of one token for each of `sequences`, whose contexts are `own` tokens and `shared` ones read once for
    each `group` of them."""
    read = sequences * (own + shared / group) * kv_bytes(c, itemsize) / (card.copy * at.copy)
    weights = matrix_weights(c)
    products = max(2 * weights * sequences / (card.product * at.decode), itemsize * weights / (card.copy * at.copy))
    logits = 4 * sequences * c.vocab_size / (card.copy * at.copy)
    return read + products + logits + at.step


def learn_token(c: DecoderConfig, card: Card, length: float, at: Efficiency = Efficiency()) -> float:
    """Seconds of forward and backward for one token of sequences of `length`."""
    attention = 2 * length * c.heads * c.head_dim * c.layers
    return (6 * matrix_weights(c) + 3.5 * attention) / (card.product * at.learn)


@dataclass(frozen=True, slots=True)
class Step:
    sample: float  # seconds
    learn: float
    optimize: float

    @property
    def seconds(self) -> float:
        return self.sample + self.learn + self.optimize


def grpo_step(
    c: DecoderConfig, card: Card, prompts: int, group: int, prompt: float, completion: float,
    shared: bool = False, at: Efficiency = Efficiency(),
) -> Step:  # fmt: skip
    """A step whose completions are all of one length, sampled together, one update. `shared`: a prompt's keys are read,
    and in learning a prompt is forwarded, once for its group."""
    samples = prompts * group
    mean = completion / 2
    own, common = (mean, prompt) if shared else (prompt + mean, 0.0)
    sample = completion * decode_step(c, card, samples, own, common, group, at)
    prefill = prompts * prompt * learn_token(c, card, prompt, at) / 3
    tokens = samples * completion + (prompts if shared else samples) * prompt
    learn = tokens * learn_token(c, card, prompt + completion, at)
    # AdamW: the half gradient read and weight written; float32 master and two states read and written
    return Step(sample + prefill, learn, matrix_weights(c) * 28 / (card.copy * at.copy))
