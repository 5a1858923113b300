"""What tensor parallelism costs, by formula: the sums over ranks of a micro-batch, and what a rank holds and takes.

    python -m benchmarks.tensor_scaling      # the prediction (docs/scaling.md); nothing is run

tests/test_tensor_parallel.py holds `summed` to the bytes that a run's collectives move. Seconds are predictions over
the rates of scaling_model.py; the latency of a small sum is an assumption.
"""

from __future__ import annotations

from math import prod

from benchmarks.scaling import MODELS
from benchmarks.scaling_model import Machine, Work, shapes
from r1fast.learn.memory import activation_values, cache_bytes, training_bytes
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.lora import adapter_parameters
from r1fast.model.tensor_parallel import check_split, part_of
from r1fast.schema import LoRAConfig

RANKS = (2, 4, 8)
LATENCY = 10e-6  # seconds of an all-reduce of a few kilobytes among the GPUs of a machine, within a CUDA graph
MICRO_BATCH = 16384  # tokens
BF16 = 2  # bytes


def summed(config: DecoderConfig, tokens: int, targets: int, width: int, recompute: bool = False) -> int:
    """Bytes that are all-reduced for a micro-batch's forward and backward pass: the hidden states of each row behind
    attention and MLP, and their gradients before both (recomputed, once more behind attention: what ends a layer is not
    needed again); the embedding's rows, the head's gradients, four numbers for each target (float32, or float64 in
    float64), and the gradients of the norms of q and k."""
    hidden = config.hidden_size * width
    times = 5 if recompute else 4
    layer = times * tokens * hidden + 2 * config.qk_norm * config.head_dim * width
    return config.layers * layer + (tokens + targets) * hidden + 4 * targets * max(width, 4)


def sent(payload: float, ranks: int) -> float:
    """Of it, what a rank of a ring sends."""
    return 2 * payload * (ranks - 1) / ranks


def held(config: DecoderConfig, ranks: int, work: Work, adapters: bool) -> float:
    """Bytes on each rank at most, with bf16 weights: weights (twice with a reference, which adapters do without),
    gradients, moments and masters, the cache of what it decodes, one micro-batch with recomputed activations."""
    part = part_of(config, ranks)
    count = sum(map(prod, shapes(part)))
    trained = adapter_parameters(part, LoRAConfig()) if adapters else count
    cache = cache_bytes(part, ranks * work.samples, work.prompt + work.completion, BF16)
    kept = MICRO_BATCH * activation_values(part, recompute=True) * BF16
    return count * BF16 * (1 if adapters else 2) + training_bytes(trained, BF16) + max(cache, kept)


def seconds(config: DecoderConfig, ranks: int, work: Work, machine: Machine) -> tuple[float, float, float, float]:
    """(sampling, its sums, learning, its sums) of a step in which each rank brings `work`, its peers' with it."""
    count = sum(map(prod, shapes(config)))
    steps, rows = work.longest * work.completion, ranks * work.samples
    cache = cache_bytes(config, 1, work.prompt + work.completion // 2, BF16) * work.samples * work.completion
    sample = (steps * count / ranks * BF16 + cache) / machine.memory
    sums = 2 * config.layers + 1
    token = sums * config.hidden_size * BF16
    moved = sent(token * rows * work.completion, ranks) + 4 * config.vocab_size * rows * work.completion
    told = steps * (sums + 1) * LATENCY + moved / machine.near
    learn = (6 + 2 * work.kl) * count * work.tokens / machine.flops
    payload = summed(config, work.tokens, work.samples * work.completion, BF16, recompute=True) * ranks
    return sample, told, learn, sent(payload, ranks) / machine.near


def tensor_table() -> str:
    columns = ("model", "ranks a model", "held, all weights trained (GB)", "held, adapters (GB)")
    columns += ("all-reduced a token (MB)", "sample (s)", "its sums (s)", "learn (s)", "its sums (s)")
    rows = [f"| {' | '.join(columns)} |\n| --- |{' ---: |' * 8}"]
    work, machine = Work(), Machine()
    for name, config in MODELS.items():
        for ranks in RANKS:
            if config.kv_heads % ranks:
                continue
            check_split(config, ranks, name)
            both = (held(config, ranks, work, adapters) for adapters in (False, True))
            told = [f"{h / 1e9:.0f}{'' if h < 0.9 * machine.hold else ' (no)'}" for h in both]
            token = summed(config, 1, 1, BF16, recompute=True) / 1e6
            times = " | ".join(f"{t:.1f}" for t in seconds(config, ranks, work, machine))
            rows.append(f"| {name} | {ranks} | {' | '.join(told)} | {token:.2f} | {times} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(tensor_table())
