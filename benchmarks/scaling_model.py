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
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.learn.memory import activation_values, cache_bytes
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import DecoderConfig

Shapes = Sequence[tuple[int, ...]]


def shapes(config: DecoderConfig) -> list[tuple[int, ...]]:
    """Of all weights of a decoder; none is allocated."""
    return [tuple(p.shape) for p in Decoder(config, device="meta").parameters()]


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
    """That a rank receives to hold all weights: (S - 1) / S of them, in `width` bytes."""
    return padded(weights, layout.shards) * width * (layout.shards - 1) / layout.shards


def reduce_bytes(weights: Shapes, layout: Layout, width: int) -> tuple[float, float]:
    """(within a replica, between replicas) that a rank sends in one optimizer step, gradients in `width` bytes: a
    reduce-scatter over the shards, then a ring all-reduce of its share over the replicas."""
    share = padded(weights, layout.shards) * width / layout.shards
    return share * (layout.shards - 1), 2 * share * (layout.replicas - 1) / layout.replicas


def gathers(updates: int, kl: bool, recomputed: bool) -> int:
    """Times a step's weights are gathered where they are sharded: once to sample, once for each optimizer step, those
    of the reference as often, once where old log-probs are recomputed."""
    return 1 + updates * (1 + kl) + recomputed


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
    fits: bool

    @property
    def seconds(self) -> float:
        return self.sample + self.learn + self.gather + self.add + self.told

    @property
    def efficiency(self) -> float:
        """Share of a step that one GPU alone would take as well."""
        return (self.sample + self.learn) / self.seconds


TOLD = 30  # bytes a token: its number and two log-probs, pickled (62 KB counted for 2,048 tokens: docs/scaling.md)


def predict(config: DecoderConfig, ranks: int, sharded: bool, work: Work, machine: Machine) -> Prediction:
    """A step as r1fast runs it today. sharded: HSDP over each node (parallel.shard=node), float32; else data-parallel
    bf16 with float32 masters."""
    weights = shapes(config)
    count, within = sum(map(prod, weights)), min(machine.node, ranks)
    layout = Layout(ranks // within, within) if sharded else Layout(ranks)
    width = 4 if sharded else 2
    near, far = reduce_bytes(weights, layout, 4)
    if not sharded and ranks <= machine.node:
        near, far = far, 0.0
    gather = gather_bytes(weights, layout, width) * gathers(work.updates, work.kl, False) if sharded else 0.0
    told = TOLD * work.samples * work.completion * ranks
    return Prediction(
        layout,
        sample=_sampling(config, count, width, work, machine),
        learn=(6 + 2 * work.kl) * count * work.tokens / (machine.flops / (2 if sharded else 1)),
        gather=gather / machine.near,
        add=work.updates * (near / machine.near + far / machine.far),
        told=told / (machine.far if ranks > machine.node else machine.near),
        held=(held := _held(config, count, layout, width, sharded, work)),
        fits=held < 0.9 * machine.hold,
    )


def _sampling(config: DecoderConfig, count: int, width: int, work: Work, machine: Machine) -> float:
    """Decoding reads the weights once for every token of the longest completion, and the cache of each sequence, half
    of its length on average, for each of its own."""
    weights = work.longest * work.completion * count * width
    cache = cache_bytes(config, 1, work.prompt + work.completion // 2, width) * work.samples * work.completion
    return work.imbalance * max((weights + cache) / machine.memory, 2 * count * work.tokens * width / 2 / machine.flops)


def _held(config: DecoderConfig, count: int, layout: Layout, width: int, sharded: bool, work: Work) -> float:
    """The larger of sampling (weights, cache of all sequences at their mean) and learning (weights, gradient, a
    micro-batch), beside what stays: optimizer state and reference, or the shares of them."""
    if sharded:  # shares of weights, two moments and reference; whole float32 weights and gradient while in use
        stays, learning = count * 4 * 4 / layout.shards, count * (4 + 4)
    else:  # bf16 weights and reference, float32 masters, moments and gradient
        stays, learning = count * (2 + 2 + 4 + 8), count * 4
    cache = cache_bytes(config, work.samples, work.prompt + work.completion, width)
    batch = 16384 * activation_values(config, recompute=True) * width
    sampling = (count * width if sharded else 0) + cache
    return stays + max(sampling, learning + batch)
