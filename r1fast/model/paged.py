"""What a step of generation hands the decoder: the tokens to run, and where their keys and values live.

The sampler owns the blocks (r1fast/rollout/kv_cache.py counts references); the decoder only reads tables.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1fast_kernels import memory

if TYPE_CHECKING:
    from r1fast.model.decoder_config import DecoderConfig


@dataclass(frozen=True, slots=True)
class PagedStep:
    """T new tokens of S sequences: one each (decode, T == S), or the next stretch of each (prefill, chunked).

    A sequence may read blocks that another one writes in the same step (prompts that begin alike): in every layer all
    keys and values are written before any is read. Two rows with one slot hold the same token at the same place.
    """

    tokens: Tensor  # int64 [T], sequence after sequence
    positions: Tensor  # int64 [T], of each token in its sequence, from 0
    slots: Tensor  # int64 [T], where its key and value are written: block * block_size + offset
    block_tables: Tensor  # int32 [S, M], the blocks of each sequence in order; past its context anything, -1 too
    context_lens: Tensor  # int32 [S], tokens of each sequence after this step, the new ones included
    cu_seqlens_q: Tensor | None = None  # int32 [S+1], the new tokens of each sequence; None: exactly one each
    groups: Tensor | None = None  # int32 [P, S], which sequences have the same blocks where: see `paged_attention`


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The cache: `keys` and `values`, each [layers, blocks + 1, block_size, kv_heads, head_dim], in the model's dtype.

    The last block is nobody's: where a step carries rows along that have nothing to say, they write there.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, blocks: int, block_size: int, device: torch.device | str, dtype: torch.dtype
    ) -> PagedKV:
        """Zeros, not uninitialised memory: a masked weight of 0 times a stray NaN would still be NaN.

        On a CPU the system gives zeroed pages as they are first used, so a large cache costs what is written into it (1
        GiB from torch.zeros: 0.7 s, and all of it resident). It begins where a line of the processor's cache does:
        malloc's memory lies 16 bytes off, and a head's key would then touch five lines, not four. Where the activations
        of a step of training left room enough, it lies there: the two are hardly ever in use at once.
        """
        shape = (config.layers, blocks + 1, block_size, config.kv_heads, config.head_dim)
        if torch.device(device).type == "cpu":
            return cls(*(_zeros(shape, dtype) for _ in range(2)))
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Of keys and values of all layers, for sizing a pool."""
        return 2 * config.layers * block_size * config.kv_heads * config.head_dim * dtype.itemsize

    @property
    def blocks(self) -> int:
        """That sequences can have: block numbers are below it."""
        return self.keys.shape[1] - 1

    @property
    def scratch_slot(self) -> int:
        """Where a row without a sequence writes."""
        return self.blocks * self.block_size

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy-on-write: block source[i] onto target[i] in every layer (int64 [n] each; no target is also a source)."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU: where activations were, or from where a page begins. Pages of the system's own: calloc writes
    all where malloc has a hole of that size (136 MB of a cache that nobody had used yet)."""
    found = memory.recycled(shape, dtype)
    if found is not None:
        return found
    count = math.prod(shape)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
