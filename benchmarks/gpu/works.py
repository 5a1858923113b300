"""The work that each op is measured on: real sizes on a GPU, what must move and be computed at least, and its peers.

A `Work` whose op has several backends is measured with all that run. Bytes are those of inputs read once and outputs
written once; FLOPs those of the products. Sizes are of Qwen2.5-1.5B at 32,768 tokens where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.shapes import SIZES, Sizes
from r1fast.model.decoder import DecoderConfig
from r1fast_kernels.paged_groups import find_groups

BLOCK = 16  # tokens of a block of the cache
GROUP = 16  # samples of a prompt

Peer = Callable[[tuple], Callable[[], object]]  # arguments of the op -> a run of the same work


@dataclass(frozen=True, slots=True)
class Work:
    what: str
    op: str  # of the registry
    args: Callable[[], tuple]
    moved: float  # bytes
    flops: float = 0.0
    backward: str = ""  # "alone": only the backward is timed; "both": forward and backward
    peers: dict[str, Peer] = field(default_factory=dict)


class Works:
    """All of them at some sizes."""

    def __init__(self, at: Sizes = SIZES) -> None:
        self.at, self.config, self.bytes = at, at.config, at.dtype.itemsize

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        made = torch.empty(shape, device=self.at.device, dtype=dtype or self.at.dtype)
        return made if self.at.virtual else made.normal_(0, scale)

    def numbers(self, count: int, scale: float = 1.0) -> Tensor:
        return self.normal(count, dtype=torch.float32, scale=scale)

    def counted(self, rows: int, below: int) -> Tensor:
        return torch.arange(rows, device=self.at.device) % below

    # -- rows -------------------------------------------------------------------------------------------------------

    def advantages(self) -> Iterator[Work]:
        for name, count in self.at.rewards.items():
            args = partial(self.rewards, count)
            yield Work(f"group_advantage {name}", "group_advantage", args, 8 * count)

    def rewards(self, count: int) -> tuple:
        return self.numbers(count), 16, None, True, 1e-6

    def rows(self) -> Iterator[Work]:
        tokens, hidden, inner = self.at.tokens, self.config.hidden_size, self.config.intermediate_size

        def norm(residual: bool) -> tuple:
            x, weight = self.normal(tokens, hidden), self.normal(hidden)
            return x, weight, 1e-6, self.normal(tokens, hidden) if residual else None

        passed = tokens * hidden * self.bytes
        liger = {"Liger": peers.liger_norm}
        yield Work("rms_norm with residual, forward", "rms_norm", lambda: norm(True), 4 * passed, peers=liger)
        yield Work("rms_norm, backward", "rms_norm", lambda: norm(False), 3 * passed, backward="alone", peers=liger)
        passed = tokens * inner * self.bytes

        def args() -> tuple:
            return (self.normal(tokens, 2 * inner),)

        yield Work("swiglu, forward", "swiglu", args, 3 * passed, peers={"Liger": peers.liger_swiglu})
        # Liger's backward works in place and cannot be repeated alone
        yield Work("swiglu, backward", "swiglu", args, 5 * passed, backward="alone")
        heads = (self.config.heads + self.config.kv_heads) * self.config.head_dim
        yield Work("rope", "rope", self.rotation, 2 * tokens * heads * self.bytes)
        yield Work(
            "grpo_loss with KL, both directions",
            "grpo_loss",
            lambda: (*(self.numbers(64 * tokens, 0.1) for _ in range(5)), 0.2, 0.28, 0.001, "k3", None),
            (24 + 8) * 64 * tokens,  # five streams in, a loss out; a slope kept and read again
            backward="both",
        )

    def angles(self, positions: int = 2048) -> tuple[Tensor, Tensor]:
        angle = self.normal(positions, self.config.head_dim // 2, dtype=torch.float32)
        return angle.cos(), angle.sin()

    def rotation(self) -> tuple:
        c, tokens = self.config, self.at.tokens
        q, k = self.normal(tokens, c.heads, c.head_dim), self.normal(tokens, c.kv_heads, c.head_dim)
        return q, k, *self.angles(), self.counted(tokens, 2048)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def draws(self, top_p: float) -> tuple:
        rows = self.at.sequences
        number = self.counted(rows, 1 << 30)
        settings = [torch.full((rows,), x, device=self.at.device) for x in (1.0, 0, top_p)]
        logits = self.normal(rows, self.config.vocab_size, dtype=torch.float32, scale=2.0)
        return logits, number, number, number, *settings

    def sampling(self) -> Iterator[Work]:
        moved = 4 * self.at.sequences * self.config.vocab_size
        torch_draw = {"torch softmax and multinomial": peers.torch_draw}
        yield Work("sample_token", "sample_token", lambda: self.draws(1.0), moved, peers=torch_draw)
        yield Work("sample_token of top-p 0.95", "sample_token", lambda: self.draws(0.95), moved)

    def cache(self, context: int, config: DecoderConfig) -> tuple:
        """Every sequence with blocks of its own, in random order."""
        rows, blocks, device = self.at.sequences, -(-context // BLOCK), self.at.device
        shape = (rows * blocks, BLOCK, config.kv_heads, config.head_dim)
        table = torch.randperm(rows * blocks, device=device).int().view(rows, blocks)
        lens = torch.full((rows,), context, device=device, dtype=torch.int32)
        return self.normal(*shape), self.normal(*shape), table, lens

    def decoding(self) -> Iterator[Work]:
        rows = self.at.sequences
        for name, c in self.at.models.items():
            for context in self.at.contexts:
                width = c.heads * c.head_dim
                yield Work(
                    f"paged_attention {name}, {rows} contexts of {context}",
                    "paged_attention",
                    lambda c=c, context=context: (
                        self.normal(rows, c.heads, c.head_dim), *self.cache(context, c), None, None, None,
                    ),
                    2 * rows * (context * c.kv_heads * c.head_dim + width) * self.bytes,
                    4 * rows * context * width,
                    peers={"FlashInfer": peers.flashinfer_decode},
                )  # fmt: skip
                yield self.grouped_decoding(name, c, context)
        c, count = self.config, 8 * rows
        passed = 2 * count * c.kv_heads * c.head_dim * self.bytes  # keys and values
        yield Work(f"paged_append of {count} tokens", "paged_append", lambda: self.appended(count), 2 * passed)
        moved = 2 * passed + 2 * count * c.heads * c.head_dim * self.bytes
        yield Work(f"rope_append of {count} tokens", "rope_append", lambda: self.rotated(count), moved)

    def grouped_decoding(self, name: str, c: DecoderConfig, context: int) -> Work:
        """Each GROUP rows have the blocks of the first half of their contexts in common."""
        rows, width, shared = self.at.sequences, c.heads * c.head_dim, context // 2 // BLOCK
        positions = rows * (context - shared * BLOCK) + -(-rows // GROUP) * shared * BLOCK

        def args() -> tuple:
            k_cache, v_cache, table, lens = self.cache(context, c)
            leader = torch.arange(rows, device=self.at.device) // GROUP * GROUP
            table[:, :shared] = table[leader, :shared]
            q = self.normal(rows, c.heads, c.head_dim)
            return q, k_cache, v_cache, table, lens, None, None, find_groups(table, BLOCK)

        return Work(
            f"paged_attention {name}, {rows} contexts of {context}, {GROUP} behind one prompt",
            "paged_attention",
            args,
            2 * (positions * c.kv_heads * c.head_dim + rows * width) * self.bytes,
            4 * rows * context * width,
            peers={
                "FlashInfer": peers.flashinfer_decode,
                "FlashInfer, cascade": partial(peers.flashinfer_cascade, group=GROUP, shared=shared),
            },
        )

    def products(self) -> Iterator[Work]:
        """The two largest of a layer, in decoding and in learning: how near the library is to its own ceiling."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        sizes = (("up", hidden, 2 * inner), ("down", inner, hidden))
        for rows, when in ((self.at.sequences, "decoding"), (self.at.tokens, "learning")):
            for what, depth, width in sizes:
                numbers = rows * depth + depth * width + rows * width
                args = partial(self.product, rows, depth, width)
                yield Work(f"linear {what}, {when}", "linear", args, numbers * self.bytes, 2 * rows * depth * width)

    def product(self, rows: int, depth: int, width: int) -> tuple:
        return self.normal(rows, depth), self.normal(width, depth, scale=depth**-0.5), None

    def appended(self, count: int) -> tuple:
        c = self.config
        k_cache, v_cache, _, _ = self.cache(128, c)
        slots = torch.randperm(len(k_cache) * BLOCK, device=self.at.device)[:count]
        return *(self.normal(count, c.kv_heads, c.head_dim) for _ in range(2)), k_cache, v_cache, slots

    def rotated(self, count: int) -> tuple:
        c = self.config
        weights = [self.normal(c.head_dim) for _ in range(2)] if c.qk_norm else [None, None]
        k, v, *cache = self.appended(count)
        q, turned = self.normal(count, c.heads, c.head_dim), (*self.angles(), self.counted(count, 2048))
        return q, k, v, *turned, *cache, *weights, 1e-6

    # -- learning -----------------------------------------------------------------------------------------------------

    def attention(self) -> Iterator[Work]:
        c, length = self.config, self.at.length
        count = max(1, self.at.tokens // 2 // length)
        tokens, width = count * length, c.heads * c.head_dim

        def args() -> tuple:
            qkv = [self.normal(tokens, heads, c.head_dim) for heads in (c.heads, c.kv_heads, c.kv_heads)]
            starts = torch.arange(0, tokens + 1, length, device=self.at.device, dtype=torch.int32)
            return *qkv, starts, length, None

        flops = 4 * count * (length * (length + 1) // 2) * width
        moved = 2 * tokens * (width + c.kv_heads * c.head_dim) * self.bytes
        what = f"varlen_attention, {count} of {length}"
        yield Work(f"{what}, forward", "varlen_attention", args, moved, flops)
        yield Work(f"{what}, backward", "varlen_attention", args, 2 * moved, 2.5 * flops, backward="alone")

    def head(self, c: DecoderConfig) -> tuple:
        """What decides which rows have a gradient is as in a step: both signs, some clipped."""
        tokens = self.at.tokens
        logp = self.numbers(tokens, 0.1) - 12.0
        streams = (logp, logp + self.numbers(tokens, 0.1), self.numbers(tokens))
        hidden, weight = self.normal(tokens, c.hidden_size), self.normal(c.vocab_size, c.hidden_size, scale=0.03)
        weights = torch.full((tokens,), 1 / tokens, device=self.at.device)
        return hidden, weight, self.counted(tokens, c.vocab_size), *streams, weights, 1.0, 0.2, 0.28, 0.001, "k3"

    def supervised_head(self, c: DecoderConfig) -> tuple:
        return tuple(a for i, a in enumerate(self.head(c)) if i in (0, 1, 2, 6))

    def heads(self) -> Iterator[Work]:
        for name, c in self.at.heads.items():
            product = self.at.tokens * c.vocab_size * c.hidden_size
            losses = {"TRL": peers.trl_loss, "Liger": peers.liger_loss}
            entropies = {"cut-cross-entropy": peers.cut_cross_entropy, "Liger": peers.liger_cross_entropy}
            both = {"moved": 0.0, "flops": 6 * product, "backward": "both"}
            args, supervised = partial(self.head, c), partial(self.supervised_head, c)
            yield Work(f"linear_grpo_loss {name}", "linear_grpo_loss", args, **both, peers=losses)
            yield Work(f"linear_cross_entropy {name}", "linear_cross_entropy", supervised, **both, peers=entropies)

    def __iter__(self) -> Iterator[Work]:
        """What has a target first: what does not fit the time is at the end."""
        first = (self.advantages, self.rows, self.sampling, self.decoding, self.heads)
        for kind in (*first, self.attention, self.products):
            yield from kind()
