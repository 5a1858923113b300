"""Attention over a key-value cache kept in fixed-size blocks, and the op that writes into it.

A sequence's keys and values lie in blocks named by its row of the block table (Kwon et al. 2023): position p is in block
table[p // bs] at offset p % bs. Sequences may share blocks, so a group's prompt is stored once.

    out[t, h] = sum_{u < visible(t)} softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)

Decode has one query a sequence, which sees the whole context. With `cu_seqlens_q` (chunked prefill) the queries of a
sequence are the last of its context, each seeing up to itself. The cache must hold finite numbers everywhere, also in
slots not yet written (allocate it with zeros).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _gather(cache: Tensor, table: Tensor) -> Tensor:
    """Blocks of each sequence in order: [N, bs, Hkv, D], [S, M] -> [S, Hkv, M*bs, D]."""
    blocks = cache.index_select(0, table.reshape(-1))
    return blocks.view(table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:]).transpose(1, 2)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Gather the blocks a batch needs and call torch's attention; query heads of a kv head go as rows of one product."""
    heads, width = q.shape[1:]
    block, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    if not q.shape[0]:
        return torch.empty_like(q)
    used = -(-int(context_lens.max()) // block)
    table = block_tables[:, :used].clamp(min=0)
    keys, values = _gather(k_cache, table), _gather(v_cache, table)
    place = torch.arange(used * block, device=q.device, dtype=torch.int32)
    if cu_seqlens_q is None:
        mask = (place < context_lens[:, None])[:, None, None]  # [S, 1, 1, L]
        rows = q.view(-1, kv_heads, group, width)
        return F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale).reshape(q.shape)

    lengths = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    longest = int(lengths.max())
    offset = torch.arange(longest, device=q.device, dtype=torch.int32)
    valid = offset < lengths[:, None]  # [S, Q]
    index = torch.where(valid, cu_seqlens_q[:-1, None] + offset, 0)
    visible = torch.where(valid, (context_lens - lengths)[:, None] + offset + 1, 1)
    mask = (place < visible[:, :, None])[:, None]  # [S, 1, Q, L]
    rows = q.index_select(0, index.view(-1)).view(*index.shape, heads, width).transpose(1, 2)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale, enable_gqa=group > 1)
    return out.transpose(1, 2)[valid]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of new queries over cached keys and values. For inference: no gradient.

    q: float [T, Hq, D]. k_cache, v_cache: float [N, bs, Hkv, D], q's dtype, the new tokens already appended.
    block_tables: int32 [S, M]; entries past a context are ignored and may be -1. context_lens: int32 [S], >= 1, the new
    tokens included. cu_seqlens_q: int32 [S+1] or None; None means one query a sequence (T == S). scale: D ** -0.5 where None.
    Returns [T, Hq, D] in q's dtype.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    with torch.no_grad():
        return reference(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale)


def paged_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, backend: str | None = None
) -> None:
    """Write new keys and values into the cache, in place.

    k, v: float [T, Hkv, D]. k_cache, v_cache: float [N, bs, Hkv, D], contiguous. slot_mapping: int64 [T], distinct,
    block * bs + offset of each token.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    with torch.no_grad():
        for new, cache in ((k, k_cache), (v, v_cache)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, new)
