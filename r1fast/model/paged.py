"""What a step of generation hands the decoder: the tokens to run, and where their keys and values live.

The sampler owns the blocks (r1fast/rollout/kv_cache.py counts references); the decoder only reads tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from r1fast.model.decoder_config import DecoderConfig


@dataclass(frozen=True, slots=True)
class PagedStep:
    """T new tokens of S sequences: one each (decode, T == S), or the next stretch of each (prefill, chunked)."""

    tokens: Tensor  # int64 [T], sequence after sequence
    positions: Tensor  # int64 [T], of each token in its sequence, from 0
    slots: Tensor  # int64 [T], where its key and value are written: block * block_size + offset
    block_tables: Tensor  # int32 [S, M], the blocks of each sequence in order; past its context anything, -1 too
    context_lens: Tensor  # int32 [S], tokens of each sequence after this step, the new ones included
    cu_seqlens_q: Tensor | None = None  # int32 [S+1], the new tokens of each sequence; None: exactly one each


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The cache: `keys` and `values`, each [layers, blocks, block_size, kv_heads, head_dim], in the model's dtype."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, blocks: int, block_size: int, device: torch.device | str, dtype: torch.dtype
    ) -> PagedKV:
        """Zeros, not uninitialised memory: a masked weight of 0 times a stray NaN would still be NaN."""
        shape = (config.layers, blocks, block_size, config.kv_heads, config.head_dim)
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Of keys and values of all layers, for sizing a pool."""
        return 2 * config.layers * block_size * config.kv_heads * config.head_dim * dtype.itemsize

    @property
    def blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy-on-write: block source[i] onto target[i] in every layer (int64 [n] each; no target is also a source)."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
