"""What a GRPO step on many GPUs costs, by formula: bytes that a rank gathers, adds up, and holds; seconds from them.

The formulas are those of docs/scaling.md. Bytes of a run's collectives are counted by `Counted`, and
tests/test_parallel.py holds the formulas to them. Seconds are the bytes and operations over the rates of a `Machine`;
no network of this size was at hand, so they are predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.learn.memory import USED, Memory, activation_values, cache_bytes, training_bytes, working_bytes
from r1fast.model.decoder import Decoder, Layer
from r1fast.model.decoder_config import DecoderConfig

Shapes = Sequence[tuple[int, ...]]
Shard = Literal["none", "node", "all"]


def shapes(config: DecoderConfig) -> list[tuple[int, ...]]:
    """Of all weights of a decoder; none is allocated."""
    return [tuple(p.shape) for p in Decoder(config, device="meta").parameters()]


def layer_shapes(config: DecoderConfig) -> list[tuple[int, ...]]:
    """Of the weights of one layer."""
    return [tuple(p.shape) for p in Layer(config, "meta", torch.float32).parameters()]


def padded(weights: Shapes, ranks: int) -> int:
    """Values of all weights, their rows filled up to a multiple of the ranks, as FSDP lays them out."""
    return sum(-(-shape[0] // ranks) * ranks * prod(shape[1:]) for shape in weights)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks hold the weights: `replicas` of `shards`; one shard: whole weights everywhere."""

    replicas: int
    shards: int = 1

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards


def gather_bytes(weights: Shapes, layout: Layout, width: int) -> float:
    """That a rank receives to hold all of these weights: (S - 1) / S of them, in `width` bytes."""
    return padded(weights, layout.shards) * width * (layout.shards - 1) / layout.shards


@dataclass(frozen=True, slots=True)
class Passes:
    """How often a rank goes through the weights in a step."""

    sampled: int = 0  # times that all of them are gathered to sample with
    learned: int = 0  # micro-batches, forward and backward
    scored: int = 0  # forward alone: reference and recomputed old log-probs
    scorings: int = 0  # in so many calls


def gathered_bytes(config: DecoderConfig, layout: Layout, width: int, passes: Passes) -> float:
    """That a rank receives in a step: a layer is gathered before its forward and again before its backward; the rest
    (embedding, last norm, head) once for both, and once for all forwards of a call without backward."""
    every, layer = shapes(config), layer_shapes(config)
    layers = config.layers * gather_bytes(layer, layout, width)
    rest = gather_bytes(every, layout, width) - layers
    times = passes.sampled + 2 * passes.learned + passes.scored
    return times * layers + (passes.sampled + passes.learned + passes.scorings) * rest


def reduce_bytes(weights: Shapes, layout: Layout, width: int) -> tuple[float, float]:
    """(within a replica, between replicas) that a rank sends, gradients in `width` bytes: a reduce-scatter over the
    shards, for each micro-batch, then a ring all-reduce of its share over the replicas, for each optimizer step."""
    share = padded(weights, layout.shards) * width / layout.shards
    return share * (layout.shards - 1), 2 * share * (layout.replicas - 1) / layout.replicas


class Counted(TorchDispatchMode):
    """Bytes of this rank's collectives, by kind, while the block runs: what it receives of gathers, what it sends
    of sums (a ring's 2 (n - 1) / n for an all-reduce), and the objects that ranks tell each other."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d":
            self._count(name, args)
        elif (func.namespace, name) == ("_c10d_functional", "all_reduce"):  # DTensor's
            from torch.distributed.distributed_c10d import _resolve_process_group

            self._sum(args[0].nbytes, _resolve_process_group(args[2]).size())
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "_allgather_base_":
            self.bytes["gathered"] += args[0].nbytes - args[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.bytes["scattered"] += args[1].nbytes - args[0].nbytes
        elif name == "allreduce_":
            from torch.distributed.distributed_c10d import ProcessGroup

            self._sum(sum(t.nbytes for t in args[0]), ProcessGroup.unbox(args[1]).size())
        elif name == "allgather_":
            self.bytes["objects"] += sum(t.nbytes for part in args[0] for t in part) - sum(t.nbytes for t in args[1])

    def _sum(self, size: int, ranks: int) -> None:
        self.bytes["added"] += round(2 * size * (ranks - 1) / ranks)


# -- seconds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of one GPU, and what of them is reached. Published peaks of an H100 SXM in a node of eight with one
    400 Gb/s adapter for each; the shares are assumptions, those of well-tuned training and decoding elsewhere."""

    flops: float = 989e12 * 0.40  # bf16, dense; float32 weights (TF32) half of it
    memory: float = 3.35e12 * 0.70  # bytes/s
    near: float = 450e9 * 0.80  # bytes/s each way, within a node
    far: float = 50e9 * 0.80  # between nodes
    hold: float = 80e9  # bytes
    node: int = 8


@dataclass(frozen=True, slots=True)
class Work:
    """A step's work for each GPU; the step grows with the ranks (weak scaling)."""

    micro_batch: int = 16384  # tokens
    prompts: int = 4
    group: int = 16
    prompt: int = 256  # tokens
    completion: int = 2048  # mean
    longest: float = 4.0  # times the mean: decoding goes on until the last has ended
    updates: int = 1  # optimizer steps
    kl: bool = True
    imbalance: float = 1.1  # of the rank that samples longest, over the mean (tests/test_lengths.py)

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        return self.samples * (self.prompt + self.completion)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one model on so many GPUs: seconds of a step by what takes them, and bytes that a GPU holds at most."""

    layout: Layout
    sample: float
    learn: float
    gather: float
    add: float
    told: float  # rollouts that all ranks are told
    held: float

    def fits(self, hold: float) -> bool:
        """On a card of so many bytes."""
        return self.held < USED * hold

    @property
    def seconds(self) -> float:
        return self.sample + self.learn + self.gather + self.add + self.told

    @property
    def efficiency(self) -> float:
        """Share of a step that one GPU alone would take as well."""
        return (self.sample + self.learn) / self.seconds


TOLD = 30  # bytes a token: its number and two log-probs, pickled (62 KB counted for 2,048 tokens: docs/scaling.md)


def predict(config: DecoderConfig, ranks: int, shard: Shard, work: Work, machine: Machine) -> Prediction:
    """A step as r1fast runs it: bf16 weights with float32 masters. shard: `parallel.shard`. What moves is not counted
    as hidden behind what is computed, of which FSDP hides most."""
    weights = shapes(config)
    count, within = sum(map(prod, weights)), {"none": 1, "node": min(machine.node, ranks), "all": ranks}[shard]
    layout = Layout(ranks // within, within)
    micro_batches = work.updates * -(-work.tokens // work.micro_batch)
    passes = Passes(1, micro_batches, micro_batches * work.kl, work.updates * work.kl)
    gather = gathered_bytes(config, layout, 2, passes)
    scatter, add = reduce_bytes(weights, layout, 4)
    scatter, add = scatter * micro_batches, add * work.updates
    inner = machine.near if within <= machine.node else machine.far  # a ring is as slow as its slowest link
    told = TOLD * work.samples * work.completion * ranks
    return Prediction(
        layout,
        sample=_sampling(config, count, 2, work, machine),
        learn=(6 + 2 * work.kl) * count * work.tokens / machine.flops,
        gather=gather / inner,
        add=scatter / inner + add / (machine.far if ranks > machine.node else machine.near),
        told=told / (machine.far if ranks > machine.node else machine.near),
        held=_held(config, count, layout, work),
    )


def _sampling(config: DecoderConfig, count: int, width: int, work: Work, machine: Machine) -> float:
    """Decoding reads the weights once for every token of the longest completion, and the cache of each sequence, half
    of its length on average, for each of its own."""
    weights = work.longest * work.completion * count * width
    cache = cache_bytes(config, 1, work.prompt + work.completion // 2, width) * work.samples * work.completion
    return work.imbalance * max((weights + cache) / machine.memory, 2 * count * work.tokens * width / 2 / machine.flops)


def _held(config: DecoderConfig, count: int, layout: Layout, work: Work) -> float:
    """As the memory plan counts it (r1fast/learn/memory.py): policy and reference, or shares of them; gradient, moments
    and masters; the cache of all sequences at their mean; and the larger of what sampling and learning gather, the
    latter with its micro-batch."""
    shards = layout.shards
    weights = count * (2 + 2) if shards == 1 else count * (4 + 2) / shards
    memory = Memory(
        weights=weights,
        training=training_bytes(count, 2, shards=shards),
        cache=cache_bytes(config, work.samples, work.prompt + work.completion, 2),
        activations=work.micro_batch * activation_values(config, recompute=True) * 2,
        gathered=count * 2 if shards > 1 else 0,
        working=working_bytes(config, 2) if shards > 1 else 0,
    )
    return memory.total
