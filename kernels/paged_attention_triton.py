"""Triton for paged_attention: decoding, with and without groups, and prefill; the contract is in paged_attention.py.

Decoding. A context is cut every PIECE positions, however long it is and whatever else is in the batch, one program a
piece and key head (flash decoding with a fixed split size, so that a sequence's result never depends on its
neighbours). A program holds all query heads of its key head, so each key is read once. Pieces are merged from left to
right by a second kernel; where tables hold one piece there is none.

Groups. The first row of a group does a piece for as many of the next ones as fit its tile, and theirs return at once:
the grid, the places of the sums and the merge are those of rows alone, and the shapes of all products are the same in
every group, so a row has the same bits in a group of one.

Prefill. A program has a tile of the queries of one sequence, times the query heads of a key head, and goes through all
that they see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.paged_groups import PIECE, pieces_of
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, where_triton_runs

LARGEST_HEAD = 256
WIDEST_ROWS = 32  # query heads of one key head


@jit
def _load_queries(
    q, q_stride, row, live, head, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """ROWS pairs of a row of q and a head, [ROWS, PADDED]."""
    d = tl.arange(0, PADDED)
    place = row.to(tl.int64) * q_stride + head * WIDTH
    return tl.load(q + place[:, None] + d[None, :], mask=live[:, None] & (d < WIDTH)[None, :], other=0.0)


@jit
def _attend_tile(
    queries, k_cache, v_cache, table, visible, kv_head, begin, end, scale, blocks,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries [ROWS, PADDED] over the positions [begin, end) of a table, of which row i sees those before visible[i]:
    running maximum, sum, and sum of values. end: the largest `visible`.

    A table entry outside the cache is not followed, and makes the results of those who see it NaN.
    """
    d = tl.arange(0, PADDED)
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
        scores = tl.where(good[None, :], scores, float("nan"))
        scores = tl.where(position[None, :] < visible[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        keep = tl.exp(m - new)
        total = keep * total + tl.sum(p, 1)
        sums = keep[:, None] * sums + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        m = new
    return m, total, sums


@jit
def _decode(
    q, q_stride, k_cache, v_cache, tables, table_stride, context_lens, groups, groups_stride, out, maxima, totals,
    partial, scale, blocks, entries, rows, splits,
    WHOLE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of a context for the queries of one key head, of a row or, GROUPED, of the rows that share it.

    WHOLE: the piece is all there is.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    i = tl.arange(0, ROWS)
    member = row + i // GROUP
    leads = True
    if GROUPED:
        together: tl.constexpr = ROWS // GROUP
        of_piece = groups + split.to(tl.int64) * groups_stride
        first = tl.load(of_piece + row)
        leads = (row - first) % together == 0
        live = (i < together * GROUP) & (member < rows)
        live &= tl.load(of_piece + member, mask=live, other=-1) == first
    else:
        live = i < GROUP
    context = tl.load(context_lens + member, mask=live, other=0)
    known = (context > 0) & (context <= entries * BLOCK)
    begin = split * PIECE
    visible = tl.where(known, tl.minimum(context, begin + PIECE), 0)
    end = tl.max(visible, 0)
    if leads & (WHOLE | (begin < end)):
        head = kv_head * GROUP + i % GROUP
        queries = _load_queries(q, q_stride, member, live, head, WIDTH, PADDED)
        m, total, sums = _attend_tile(
            queries, k_cache, v_cache, tables + row.to(tl.int64) * table_stride, visible, kv_head, begin, end, scale,
            blocks, KV_HEADS, WIDTH, PADDED, BLOCK, TILE, ROWS, PRECISION,
        )  # fmt: skip
        d = tl.arange(0, PADDED)
        mask = live[:, None] & (d < WIDTH)[None, :]
        pair = member.to(tl.int64) * (KV_HEADS * GROUP) + head
        if WHOLE:
            result = tl.where(known[:, None], sums / total[:, None], float("nan"))
            tl.store(out + pair[:, None] * WIDTH + d[None, :], result, mask=mask)
        else:
            own = pair * splits + split
            tl.store(maxima + own, m, mask=live)
            tl.store(totals + own, total, mask=live)
            tl.store(partial + own[:, None] * WIDTH + d[None, :], sums, mask=mask)


@jit
def _merge(
    context_lens, out, maxima, totals, partial, entries, splits,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The pieces of one query and head, left to right."""
    row = tl.program_id(0).to(tl.int64)
    pair = row * HEADS + tl.program_id(1)
    context = tl.load(context_lens + row)
    known = (context > 0) & (context <= entries * BLOCK)
    pieces = tl.where(known, (context + PIECE - 1) // PIECE, 0)
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


@jit
def _prefill(
    q, q_stride, k_cache, v_cache, tables, table_stride, context_lens, starts, out, scale, blocks, entries, tokens,
    sequences,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS // GROUP queries of one sequence, the query heads of one key head.

    The host does not know how many queries a sequence has, so sequence s has the tiles from starts[s] // each + s on,
    which are never too few; a tile without queries ends at once.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    each: tl.constexpr = ROWS // GROUP
    begun = 0
    for some in range(0, sequences, 64):
        s = some + tl.arange(0, 64)
        first = tl.load(starts + s, mask=s < sequences, other=0)
        begun += tl.sum(((s < sequences) & (first // each + s <= tile)).to(tl.int32), 0)
    sequence = tl.maximum(begun - 1, 0).to(tl.int64)
    first = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first
    i = tl.arange(0, ROWS)
    token = (tile - (first // each + begun - 1)) * each + i // GROUP
    row = first + token
    live = (i < each * GROUP) & (token >= 0) & (token < count) & (row >= 0) & (row < tokens)
    context = tl.load(context_lens + sequence)
    known = (context >= count) & (context <= entries * BLOCK)
    visible = tl.where(live & known, context - count + token + 1, 0)
    head = kv_head * GROUP + i % GROUP
    queries = _load_queries(q, q_stride, row, live, head, WIDTH, PADDED)
    _, total, sums = _attend_tile(
        queries, k_cache, v_cache, tables + sequence * table_stride, visible, kv_head, 0, tl.max(visible, 0), scale,
        blocks, KV_HEADS, WIDTH, PADDED, BLOCK, TILE, ROWS, PRECISION,
    )  # fmt: skip
    d = tl.arange(0, PADDED)
    place = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * WIDTH
    result = tl.where(known, sums / total[:, None], float("nan"))
    tl.store(out + place[:, None] + d[None, :], result, mask=live[:, None] & (d < WIDTH)[None, :])


def supports(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> str | None:
    if q.dtype == torch.float64:
        return "q is float64, which only the reference keeps"
    if q.shape[2] > LARGEST_HEAD or q.shape[1] // k_cache.shape[2] > WIDEST_ROWS:
        return f"heads of more than {LARGEST_HEAD}, or more than {WIDEST_ROWS} query heads a key head"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "the caches are not contiguous"
    return where_triton_runs(q, k_cache, v_cache, block_tables, context_lens)


def _shape(group: int, width: int, element: int, many: bool) -> tuple[int, int, int, int]:
    """(padded head, positions of a tile, query rows of a tile, warps). many: queries of several rows.

    At most 16 KiB of keys, so that several programs fit, and no more than keeps the registers of two programs on a
    multiprocessor; float32 spills at more than 16 positions in some widths.
    """
    padded = max(next_power_of_2(width), 16)
    tile = 16 if element == 4 else min(max(16384 // (padded * element), 16), 64)
    rows = max(next_power_of_2(group), 16)
    if not many:
        return padded, tile, rows, 4
    if element == 4:
        rows = max(rows, 32 if padded <= 128 else 16)
        return padded, tile, rows, 8 if rows * padded > 4096 else 4
    return padded, min(tile, 32) if padded >= 128 else tile, max(rows, 64 if padded <= 128 else 32), 4


def forward(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> Tensor:
    q, lens = native.packed_heads(q), context_lens.contiguous()
    table = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    rows, heads, width = q.shape
    blocks, block, kv_heads = k_cache.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out
    group, entries = heads // kv_heads, table.shape[1]
    many = groups is not None or cu_seqlens_q is not None
    padded, tile, tile_rows, warps = _shape(group, width, q.element_size(), many)
    scale = width**-0.5 if scale is None else scale
    cache = (q, q.stride(0), k_cache, v_cache, table, table.stride(0), lens)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # says nothing of 16-bit factors
    form = {"num_warps": warps, "num_stages": 2}
    if cu_seqlens_q is not None:
        sequences, each = len(lens), tile_rows // group
        sizes = (scale, blocks, entries, rows, sequences)
        shape = (group, kv_heads, width, padded, block, tile, tile_rows, precision)
        _prefill[(rows // each + sequences, kv_heads)](*cache, cu_seqlens_q.contiguous(), out, *sizes, *shape, **form)
        return out
    splits = pieces_of(entries, block)
    new = {"dtype": torch.float32, "device": q.device}
    pieces = rows * heads * splits if splits > 1 else 0
    maxima, totals = torch.empty(2, pieces, **new)
    partial = torch.empty(pieces * width, **new)
    grouped = (lens, 0) if groups is None else (groups, groups.stride(0))
    _decode[(rows, kv_heads, splits)](
        *cache, *grouped, out, maxima, totals, partial, scale, blocks, entries, rows, splits,
        splits == 1, groups is not None, group, kv_heads, width, padded, block, PIECE, tile, tile_rows, precision,
        **form,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows, heads)](
            lens, out, maxima, totals, partial, entries, splits, heads, width, padded, block, PIECE, num_warps=1
        )
    return out
