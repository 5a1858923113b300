"""Causal attention within each sequence of a packed batch: training, prefill, and scoring without padding.

    out[t, h] = sum_{u <= t, same sequence} softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)

Sequences lie end to end; `cu_seqlens` says where each begins (Dao 2023, the varlen form; GQA: Ainslie et al. 2023).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Score elements (heads * length^2) that padding may waste before a bucket is closed. A bucket more costs about 0.3 ms of
# dispatch forward and backward. Measured on one core (Zen 5, D 16, forward and backward): 256 tokens of 8 sequences want
# one bucket (0.5 ms; three: 0.8); 15k tokens in sequences of 20 to 80 want five (45 ms; one: 58, twenty: 55).
BUCKET_WASTE = 100_000


class Plan(NamedTuple):
    """Sequences in buckets of similar length, each padded on the right to its longest."""

    buckets: tuple[tuple[int, int], ...]  # (sequences, longest) of each
    source: Tensor  # int64 [padded places]: the row of the pack that lies there; any row of the sequence where padding does
    place: Tensor  # int64 [T]: the padded place of each row of the pack


def plan(cu_seqlens: Tensor, heads: int) -> Plan:
    """Sort sequences by length and close a bucket when its padding wastes more than one bucket costs."""
    ends = cu_seqlens.long()
    lengths, order = (ends[1:] - ends[:-1]).sort(descending=True, stable=True)
    starts = ends[:-1][order]
    listed = lengths.tolist()
    edges, waste = [0], 0
    for i, n in enumerate(listed):
        waste += heads * (listed[edges[-1]] ** 2 - n**2)
        if waste > BUCKET_WASTE:
            edges.append(i)
            waste = 0
    edges.append(len(listed))
    buckets, sources, held = [], [], []
    for a, b in pairwise(edges):
        offset = torch.arange(listed[a], device=ends.device)
        valid = offset < lengths[a:b, None]
        buckets.append((b - a, listed[a]))
        sources.append(torch.where(valid, starts[a:b, None] + offset, starts[a:b, None]).view(-1))
        held.append(valid.view(-1))
    source, held = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (sources, held))
    filled = held.nonzero().squeeze(1)
    place = torch.empty_like(filled).index_copy_(0, source.index_select(0, filled), filled)
    return Plan(tuple(buckets), source.clamp(max=max(place.shape[0] - 1, 0)), place)


# The layers of a model attend over the same pack: the last plan is kept with the very tensor it was made from (0.3 ms).
_last: tuple = (None, None, None)


def _plan_of(cu_seqlens: Tensor, heads: int) -> Plan:
    global _last
    key = (heads, cu_seqlens._version)
    last = _last
    if last[0] is not cu_seqlens or last[1] != key:
        _last = last = (cu_seqlens, key, plan(cu_seqlens, heads))
    return last[2]


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None) -> Tensor:
    """Gather the pack into padded buckets and call torch's causal attention on each.

    No mask is needed: a causal row never sees what is after it, and padded rows are not read back. Against products and
    a softmax written out, torch's attention took 36 ms to 44 (16.8k tokens, forward and backward, one core).
    """
    if not q.shape[0]:
        return q * 0
    buckets, source, place = _plan_of(cu_seqlens, q.shape[1])
    padded = [x.index_select(0, source) for x in (q, k, v)]
    grouped = q.shape[1] != k.shape[1]
    results, start = [], 0
    for count, longest in buckets:
        stop = start + count * longest
        one = (x[start:stop].view(count, longest, *x.shape[1:]).transpose(1, 2) for x in padded)
        out = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=grouped)
        results.append(out.transpose(1, 2).reshape(stop - start, *q.shape[1:]))
        start = stop
    return (torch.cat(results) if len(results) > 1 else results[0]).index_select(0, place)


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
