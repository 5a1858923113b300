"""Triton for paged_attention's decode and for paged_append; the contracts are in paged_attention.py.

A context is cut every 256 positions, however long it is and whatever else is in the batch, one program a piece and key
head (flash decoding with a fixed split size, so that a sequence's result never depends on its neighbours). A program
holds all query heads of its key head, so each key is read once. Pieces are merged from left to right by a second
kernel; where tables hold one piece there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels.triton_support import jit, next_power_of_2, tl, where_triton_runs

SPLIT = 256  # positions of a piece
LARGEST_HEAD = 256
WIDEST_ROWS = 32  # query heads of one key head


@jit
def _attend_tile(
    q, q_stride, k_cache, v_cache, table, query, live, head, kv_head, begin, end, scale, blocks,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS pairs of a query and a head over the positions [begin, end): running maximum, sum, and sum of values.

    A table entry outside the cache is not followed, and makes the result NaN.
    """
    d = tl.arange(0, PADDED)
    place = query.to(tl.int64) * q_stride + head * WIDTH
    queries = tl.load(q + place[:, None] + d[None, :], mask=live[:, None] & (d < WIDTH)[None, :], other=0.0)
    m = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < end
        entry = tl.load(table + position // BLOCK, mask=inside, other=0)
        good = inside & (entry >= 0) & (entry < blocks)
        at = ((entry.to(tl.int64) * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * WIDTH
        keys = tl.load(k_cache + at[None, :] + d[:, None], mask=good[None, :] & (d < WIDTH)[:, None], other=0.0)
        values = tl.load(v_cache + at[:, None] + d[None, :], mask=good[:, None] & (d < WIDTH)[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        scores = tl.where(good[None, :], scores, tl.where(inside, float("nan"), float("-inf"))[None, :])
        new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        keep = tl.exp(m - new)
        total = keep * total + tl.sum(p, 1)
        sums = keep[:, None] * sums + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        m = new
    return m, total, sums


@jit
def _decode(
    q, q_stride, k_cache, v_cache, tables, table_stride, context_lens, out, maxima, totals, partial, scale, blocks,
    entries, splits,
    WHOLE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one sequence's context for the queries of one key head; WHOLE: the piece is all there is."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + row)
    known = (context > 0) & (context <= entries * BLOCK)
    begin = split * SPLIT
    end = tl.where(known, tl.minimum(context, begin + SPLIT), begin)
    if WHOLE | (begin < end):
        i = tl.arange(0, ROWS)
        live = i < GROUP
        head = kv_head * GROUP + i
        query = tl.zeros([ROWS], tl.int64) + row
        m, total, sums = _attend_tile(
            q, q_stride, k_cache, v_cache, tables + row * table_stride, query, live, head, kv_head, begin, end, scale,
            blocks, KV_HEADS, WIDTH, PADDED, BLOCK, TILE, ROWS, PRECISION,
        )  # fmt: skip
        d = tl.arange(0, PADDED)
        mask = live[:, None] & (d < WIDTH)[None, :]
        pair = row * (KV_HEADS * GROUP) + head
        if WHOLE:
            result = tl.where(known, sums / total[:, None], float("nan"))
            tl.store(out + pair[:, None] * WIDTH + d[None, :], result, mask=mask)
        else:
            own = pair * splits + split
            tl.store(maxima + own, m, mask=live)
            tl.store(totals + own, total, mask=live)
            tl.store(partial + own[:, None] * WIDTH + d[None, :], sums, mask=mask)


@jit
def _merge(
    context_lens, out, maxima, totals, partial, entries, splits,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The pieces of one query and head, left to right."""
    row = tl.program_id(0).to(tl.int64)
    pair = row * HEADS + tl.program_id(1)
    context = tl.load(context_lens + row)
    known = (context > 0) & (context <= entries * BLOCK)
    pieces = tl.where(known, (context + SPLIT - 1) // SPLIT, 0)
    d = tl.arange(0, PADDED)
    m = tl.full([], -1e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([PADDED], tl.float32)
    for split in range(0, pieces):
        own = pair * splits + split
        other = tl.load(maxima + own)
        new = tl.maximum(m, other)
        keep = tl.exp(m - new)
        gain = tl.exp(other - new)
        total = keep * total + gain * tl.load(totals + own)
        sums = keep * sums + gain * tl.load(partial + own * WIDTH + d, mask=d < WIDTH, other=0.0)
        m = new
    result = tl.where(known, sums / total, float("nan"))
    tl.store(out + pair * WIDTH + d, result, mask=d < WIDTH)


@jit(do_not_specialize=["slots"])
def _append(k, k_stride, v, v_stride, k_cache, v_cache, slot_mapping, slots, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One token's keys and values. A slot outside the cache is left out."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    i = tl.arange(0, PADDED)
    if (slot >= 0) & (slot < slots):
        tl.store(k_cache + slot * SIZE + i, tl.load(k + row * k_stride + i, mask=i < SIZE), mask=i < SIZE)
        tl.store(v_cache + slot * SIZE + i, tl.load(v + row * v_stride + i, mask=i < SIZE), mask=i < SIZE)


def _packed_heads(x: Tensor) -> Tensor:
    """x itself where each [heads, width] is contiguous, as in a slice of the joint projection; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def supports(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale) -> str | None:
    if q.dtype == torch.float64:
        return "q is float64, which only the reference keeps"
    if cu_seqlens_q is not None:
        return "it decodes: one query a sequence"
    if q.shape[2] > LARGEST_HEAD or q.shape[1] // k_cache.shape[2] > WIDEST_ROWS:
        return f"heads of more than {LARGEST_HEAD}, or more than {WIDEST_ROWS} query heads a key head"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "the caches are not contiguous"
    return where_triton_runs(q, k_cache, v_cache, block_tables, context_lens)


def _shape(width: int, element: int) -> tuple[int, int]:
    """(padded head, positions of a tile): at most 16 KiB of keys, so that several programs fit; float32 spills at more
    than 16 positions in some widths."""
    padded = max(next_power_of_2(width), 16)
    return padded, 16 if element == 4 else min(max(16384 // (padded * element), 16), 64)


def forward(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale) -> Tensor:
    q, lens = _packed_heads(q), context_lens.contiguous()
    table = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    rows, heads, width = q.shape
    blocks, block, kv_heads = k_cache.shape[:3]
    entries, group = table.shape[1], heads // kv_heads
    splits = max(-(-entries * block // SPLIT), 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out
    new = {"dtype": torch.float32, "device": q.device}
    pieces = rows * heads * splits if splits > 1 else 0
    maxima, totals = torch.empty(2, pieces, **new)
    partial = torch.empty(pieces * width, **new)
    padded, tile = _shape(width, q.element_size())
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # says nothing of 16-bit factors
    _decode[(rows, kv_heads, splits)](
        q, q.stride(0), k_cache, v_cache, table, table.stride(0), lens, out, maxima, totals, partial,
        width**-0.5 if scale is None else scale, blocks, entries, splits,
        splits == 1, group, kv_heads, width, padded, block, SPLIT, tile, max(next_power_of_2(group), 16), precision,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows, heads)](
            lens, out, maxima, totals, partial, entries, splits, heads, width, padded, block, SPLIT, num_warps=1
        )
    return out


def supports_append(k, v, k_cache, v_cache, slot_mapping) -> str | None:
    return where_triton_runs(k, v, k_cache, v_cache, slot_mapping)


def append(k, v, k_cache, v_cache, slot_mapping) -> None:
    k, v = _packed_heads(k), _packed_heads(v)
    size = k.shape[1] * k.shape[2]
    if k.numel():
        slots = k_cache.shape[0] * k_cache.shape[1]
        tensors = (k, k.stride(0), v, v.stride(0), k_cache, v_cache, slot_mapping.contiguous())
        _append[(k.shape[0],)](*tensors, slots, size, next_power_of_2(size))
