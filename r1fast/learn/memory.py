"""What training needs of memory, by formula, and the settings that make it fit, chosen before the first step.

The estimate counts what lasts through a backward pass: weights, gradients, the optimizer's states, the sampler's cache
and the activations kept for one micro-batch. tests/test_memory.py holds the activations to what torch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from r1fast.model.decoder import Layer

if TYPE_CHECKING:
    from r1fast.model.decoder_config import DecoderConfig

States = Literal["float32", "bfloat16"]
# A micro-batch where nothing is asked. On a CPU small ones stay in the cache and large ones cost memory: 3M, learning
# alone: 1.84 s a step at 4096, 1.92 at 1280 (3% of the step) for a third of the activations; 30M: 6.0 s at 1024, 6.4 at
# 2048 and 4096. 1280 holds 8 completions of 128 and their prompt, so that it is laid down once.
DEFAULT_TOKENS = {"cpu": 1280, "cuda": 16384}
LEAST_TOKENS = 640  # below it the products are too small for any device
USED = 0.9  # share of the free memory that a plan may fill: estimates are not exact, allocators not tight


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, estimated, of one rank. Weights count every model held at once: policy, frozen reference, reward model, or
    this rank's shares of them."""

    weights: float = 0.0
    training: float = 0.0  # gradients, moments, float32 masters of half weights
    cache: float = 0.0  # keys and values of all sequences that decode together, at their longest
    activations: float = 0.0  # of one micro-batch, kept for the backward pass
    gathered: float = 0.0  # of a sharded policy: the whole weights, gathered once a step to sample with
    working: float = 0.0  # of a sharded policy: what a pass through the layers gathers, and its gradient

    @property
    def total(self) -> float:
        return self.weights + self.training + self.cache + max(self.gathered, self.working + self.activations)


def activation_values(config: DecoderConfig, recompute: bool = False, recall: bool = False) -> int:
    """Values kept for the backward pass, per token: in each layer the residual stream and its norm before attention and
    before the MLP (4 H); q, k and v as projected, q and k as rotated, the attention's output; the MLP's two halves and
    their product (3 I). With `recall` (model/recall.py) neither the norms nor the product. With `recompute` only what
    enters each layer (2 H), and all of one layer at a time. Logits are never kept. What a backend fuses is not kept,
    what it needs besides is not counted."""
    attention = 3 * (config.heads + config.kv_heads) * config.head_dim
    least = 2 * config.hidden_size + attention + 2 * config.intermediate_size
    layer = least + 2 * config.hidden_size + config.intermediate_size
    if recompute:
        return 2 * config.layers * config.hidden_size + layer
    return config.layers * (least if recall else layer)


def training_bytes(parameters: int, width: int, states: States = "float32", shards: int = 1) -> float:
    """Of `parameters` trained ones in `width` bytes each: float32 gradients, both moments, and the float32 masters
    behind half weights; of shares of them the weights are the masters."""
    masters = 4 if width < 4 and shards == 1 else 0
    return parameters / shards * (4 + (4 if states == "bfloat16" else 8) + masters)


def working_bytes(config: DecoderConfig, width: int, trained: bool = True) -> int:
    """Most that a pass through the layers of a sharded model holds of it: embedding and head, the layer at work and the
    next one, gathered in `width` bytes. Where the weights are `trained` also the gradients of the former and of a layer
    and their float32 copies on the way to the shares."""
    layer = sum(p.numel() for p in Layer(config, "meta", torch.float32).parameters())
    rest = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return (rest + 2 * layer) * width + (rest + layer) * (width + 4) * trained


def cache_bytes(config: DecoderConfig, sequences: int, length: int, width: int) -> int:
    """Keys and values of `sequences` of `length` tokens."""
    return 2 * config.layers * config.kv_heads * config.head_dim * width * sequences * length


@dataclass(frozen=True, slots=True)
class Asked:
    """What the recipe says; None leaves the choice to the plan."""

    micro_batch_tokens: int | None = None
    recompute: bool | None = None
    states: States | None = None


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a stage will train, and why."""

    micro_batch_tokens: int
    recompute: bool
    states: States
    memory: Memory
    free: float  # bytes, before anything of training was allocated
    fits: bool

    @property
    def gather_fits(self) -> bool:
        """Whether there is room for the whole weights that a sharded policy is sampled with, beside what stays: smaller
        micro-batches do not help where there is not."""
        m = self.memory
        return not m.gathered or m.gathered + m.training <= self.free

    @property
    def ungathered(self) -> str:
        """What to do where there is none."""
        m = self.memory
        return (
            f"sampling gathers the whole weights on every rank, {readable_bytes(m.gathered)} beside "
            f"{readable_bytes(m.training)} of gradients and moments, and {readable_bytes(self.free)} are free: split "
            f"what is computed as well (parallel.tensor=N in place of parallel.shard), take devices with more memory, "
            f"or a smaller model"
        )

    @property
    def needed(self) -> float:
        """Bytes that are not taken yet."""
        return self.memory.total - self.memory.weights

    def told(self) -> str:
        """One line for the person who waits."""
        m = self.memory
        parts = f"training {readable_bytes(m.training)}, cache {readable_bytes(m.cache)}, "
        parts += f"activations {readable_bytes(m.activations)}"
        parts += f", layers at work {readable_bytes(m.working)}" if m.working else ""
        parts += f"; whole weights, gathered once a step to sample, {readable_bytes(m.gathered)}" if m.gathered else ""
        how = f"micro-batches of {self.micro_batch_tokens:,} tokens"
        how += ", activations recomputed" if self.recompute else ""
        how += ", moments in bfloat16" if self.states == "bfloat16" else ""
        found = f"memory: {how}; {readable_bytes(self.needed)} ({parts}) of {readable_bytes(self.free)} free"
        if self.fits:
            return found
        if not self.gather_fits:
            return f"{found}. This does not fit: {self.ungathered}"
        return f"{found}. This may not fit: lower model.max_length, or train adapters"


def plan_training(
    config: DecoderConfig,
    asked: Asked,
    *,
    trained: int,
    width: int,
    free: float,
    device: str,
    longest: int,
    cache: float = 0.0,
    weights: float = 0.0,
    shards: int = 1,
    gathered: float = 0.0,
    working: float = 0.0,
    recall: bool = False,
) -> TrainingPlan:
    """The fastest settings that are estimated to fit; the smallest ones, with `fits` False, where none do.

    Tried in the order of what they cost: smaller micro-batches (little, down to LEAST_TOKENS), recomputed activations
    (a third more work), moments in bfloat16. What the recipe asks for is not touched.

    trained: parameters with a gradient, held in `width` bytes. free: bytes, with all `weights` loaded. longest: tokens
    of the longest row, which no micro-batch can be smaller than. cache: bytes the sampler will take. shards: ranks that
    hold the trained parameters together; gathered, working: as of Memory. recall: as of activation_values.
    """
    most = asked.micro_batch_tokens or DEFAULT_TOKENS[device]
    sizes = [most]
    while asked.micro_batch_tokens is None and sizes[-1] // 2 >= max(LEAST_TOKENS, longest):
        sizes.append(sizes[-1] // 2)
    ways = [(states, recompute) for states in _choices(asked.states, "float32", "bfloat16")
            for recompute in _choices(asked.recompute, False, True)]  # fmt: skip
    for states, recompute in ways:
        for tokens in sizes:
            kept = max(tokens, longest) * activation_values(config, recompute, recall) * width
            lasting = training_bytes(trained, width, states, shards)
            memory = Memory(weights, lasting, cache, kept, gathered, working)
            if memory.total - weights <= USED * free:
                return TrainingPlan(tokens, recompute, states, memory, free, True)
    return TrainingPlan(tokens, recompute, states, memory, free, False)


def _choices(asked, *possible):
    return possible if asked is None else (asked,)


def readable_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
