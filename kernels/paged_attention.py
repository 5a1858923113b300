"""Attention over a key-value cache kept in fixed-size blocks, and the op that writes into it.

A sequence's keys and values lie in blocks named by its row of the block table (Kwon et al. 2023): position p is in
block table[p // bs] at offset p % bs. Sequences may share blocks, so a group's prompt is stored once.

    out[t, h] = sum_{u < visible(t)} softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)

Decode has one query a sequence, which sees the whole context. With `cu_seqlens_q` (chunked prefill) the queries of a
sequence are the last of its context, each seeing up to itself. The cache must hold finite numbers everywhere, also in
slots not yet written (allocate it with zeros).

Groups. `groups` says which rows of a decode step have the same blocks in a piece of `PIECE` positions (paged_groups.py
finds them): a GPU then reads the piece once for all of them, with their queries and heads as the rows of one product,
and each row goes through the pieces that it shares with nobody by itself. A product has up to 128 rows in CUDA C++, and
64 of heads wider than 128; in Triton 64 and 32; a group of more reads the piece again. In float32 CUDA C++ takes each
row by itself, groups or not. Pieces are merged in their order, whoever did them.
What holds for the bits of a row: they depend neither on the rest of the batch nor on who else is in its groups, so a
row that is left alone keeps them (by construction: the same products of the same shapes; no GPU has shown it yet). With
and without `groups` they may differ, as the products have other shapes.
The C++ backend of the CPU finds rows that share blocks by itself, needs no `groups`, and has the same bits either way.

The Triton kernels are in paged_attention_triton.py, those in CUDA C++ in csrc/cuda/paged_attention.cu (rows alone) and
csrc/cuda/paged_attention_groups.cu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import native, paged_attention_triton
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.paged_append import check_cache, random_cache
from r1fast_kernels.paged_groups import PIECE, find_groups, pieces_of, positions_read, same_as_before
from r1fast_kernels.triton_support import triton_unavailable


def check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> None:
    if q.dim() != 3:
        raise ValueError(f"paged_attention: q must be [T, Hq, D], not {list(q.shape)}")
    check_cache("paged_attention", k_cache, v_cache, q)
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"paged_attention: {q.shape[1]} query heads do not divide over {k_cache.shape[2]} key heads")
    sequences = context_lens.shape[0]
    tables = block_tables.dim() == 2 and block_tables.shape[0] == sequences and block_tables.dtype == torch.int32
    if not tables or context_lens.dim() != 1 or context_lens.dtype != torch.int32:
        raise ValueError(
            f"paged_attention: block_tables must be int32 [S, M] and context_lens int32 [S], not {block_tables.dtype} "
            f"{list(block_tables.shape)} and {context_lens.dtype} {list(context_lens.shape)}"
        )
    if cu_seqlens_q is None:
        if q.shape[0] != sequences:
            raise ValueError(f"paged_attention: {q.shape[0]} queries for {sequences} sequences; give cu_seqlens_q")
    elif cu_seqlens_q.shape != (sequences + 1,) or cu_seqlens_q.dtype != torch.int32:
        raise ValueError(
            f"paged_attention: cu_seqlens_q must be int32 [{sequences + 1}], "
            f"not {cu_seqlens_q.dtype} {list(cu_seqlens_q.shape)}"
        )
    if block_tables.device != q.device or context_lens.device != q.device:
        raise ValueError(f"paged_attention: block_tables and context_lens must live on {q.device} as q does")
    if groups is not None:
        _check_groups(groups, block_tables, k_cache.shape[1], cu_seqlens_q)


def _check_groups(groups, block_tables, block: int, cu_seqlens_q) -> None:
    if cu_seqlens_q is not None:
        raise ValueError("paged_attention: groups are of decode steps; leave them out where cu_seqlens_q is given")
    shape = (pieces_of(block_tables.shape[1], block), block_tables.shape[0])
    if groups.shape != shape or groups.dtype != torch.int32 or groups.device != block_tables.device:
        raise ValueError(
            f"paged_attention: groups must be int32 {list(shape)} on {block_tables.device}, a row for each {PIECE} "
            f"positions of the tables, not {groups.dtype} {list(groups.shape)} on {groups.device}"
        )
    if groups.stride(1) != 1:
        raise ValueError("paged_attention: the rows of groups must be contiguous")
    if groups.is_cpu:  # a GPU is not asked
        row = torch.arange(shape[1], dtype=torch.int32)
        goes_on = torch.zeros_like(groups, dtype=torch.bool)
        goes_on[:, 1:] = groups[:, 1:] == groups[:, :-1]
        wrong = ~torch.where(goes_on, same_as_before(block_tables, block), groups == row)
        if wrong.any():
            piece, at = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"paged_attention: groups[{piece}, {at}] is {int(groups[piece, at])}; it must be {at}, or as the one "
                f"before where both rows have the same blocks in that piece"
            )


def _gather(cache: Tensor, table: Tensor) -> Tensor:
    """Blocks of each sequence in order: [N, bs, Hkv, D], [S, M] -> [S, Hkv, M*bs, D]."""
    blocks = cache.index_select(0, table.reshape(-1))
    return blocks.view(table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:]).transpose(1, 2)


def _longest(op: str, context_lens: Tensor, block_tables: Tensor, block: int) -> int:
    """Blocks of the longest context."""
    shortest, longest = (int(x) for x in torch.aminmax(context_lens))
    if shortest < 1 or longest > block_tables.shape[1] * block:
        raise ValueError(
            f"{op}: context_lens go from {shortest} to {longest}; they must lie in "
            f"[1, {block_tables.shape[1] * block}], what {block_tables.shape[1]} blocks of {block} hold"
        )
    return -(-longest // block)


def reference(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> Tensor:
    """Gather the blocks a batch needs and call torch's attention.

    In decode the query heads of one key head go as rows of one product, so no key is repeated: 0.75 ms for 256
    sequences of 64 (4 + 2 heads of 16, one core), 0.5 of it torch's attention.
    """
    heads, width = q.shape[1:]
    block, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    if not q.shape[0]:
        return torch.empty_like(q)
    used = _longest("paged_attention", context_lens, block_tables, block)
    place = torch.arange(used * block, device=q.device, dtype=torch.int32)
    table = torch.where(place[::block] < context_lens[:, None], block_tables[:, :used], 0)
    keys, values = _gather(k_cache, table), _gather(v_cache, table)
    if cu_seqlens_q is None:
        mask = (place < context_lens[:, None])[:, None, None]  # [S, 1, 1, L]
        rows = q.reshape(-1, kv_heads, group, width)
        return F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale).reshape(q.shape)

    lengths = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    offset = torch.arange(int(lengths.max()), device=q.device, dtype=torch.int32)
    valid = offset < lengths[:, None]  # [S, Q]
    index = torch.where(valid, cu_seqlens_q[:-1, None] + offset, 0)
    visible = torch.where(valid, (context_lens - lengths)[:, None] + offset + 1, 1)
    mask = (place < visible[:, :, None])[:, None]  # [S, 1, Q, L]
    rows = q.index_select(0, index.view(-1)).view(*index.shape, heads, width).transpose(1, 2)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale, enable_gqa=group > 1)
    return out.transpose(1, 2)[valid]


WIDEST_GROUP = 4096  # floats of the query heads that share a key head, which the CPU kernel keeps on the stack


def _cpu_supports(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> str | None:
    if q.dtype != torch.float32:
        return f"it computes in float32, and q is {q.dtype}"
    if q.shape[1] // k_cache.shape[2] * q.shape[2] > WIDEST_GROUP:
        return f"the query heads of one key head hold more than {WIDEST_GROUP} numbers"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "the caches are not contiguous"
    return None


def _cpu_forward(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> Tensor:
    q, table, lens = native.packed_heads(q), block_tables, context_lens.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    starts = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    out = torch.empty(q.shape)
    rows, heads, width = q.shape
    blocks, block, kv_heads = k_cache.shape[:3]
    addresses = (q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), table.data_ptr(), table.stride(0))
    places = (lens.data_ptr(), 0 if starts is None else starts.data_ptr(), out.data_ptr())
    sizes = (rows, len(lens), heads, kv_heads, width, blocks, block, table.shape[1])
    native.cpu().paged_attention(*addresses, *places, *sizes, scale or width**-0.5)
    return out


WIDEST_HEAD = 256  # of the CUDA kernel: a lane holds 8 numbers of a head, and a warp has 32 lanes
LONGEST_TABLE = 1 << 24  # positions: splits of 256 lie along a dimension of the grid that ends at 65535


def _cuda_supports(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> str | None:
    if q.dtype not in native.ELEMENT_TYPES:
        return f"it has no {q.dtype}"
    if cu_seqlens_q is not None:
        return "it decodes, one query a sequence"
    if q.shape[2] % 8 or q.shape[2] > WIDEST_HEAD:
        return f"its head sizes are multiples of 8 up to {WIDEST_HEAD}, and here it is {q.shape[2]}"
    if not 0 < block_tables.shape[1] * k_cache.shape[1] <= LONGEST_TABLE or not k_cache.numel():
        return f"its tables hold 1 to {LONGEST_TABLE} positions, and its cache is not empty"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()) or k_cache.data_ptr() % 16 or v_cache.data_ptr() % 16:
        return "the caches are not contiguous, or do not begin at a multiple of 16 bytes"
    return None


def _cuda_slower(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> str | None:
    """Its tensor cores take 16-bit factors; float32 ones as three products of TF32 would want tiles of their own, for
    a type that no preset decodes in on a GPU."""
    if groups is not None and q.dtype == torch.float32:
        return "in float32 each row of a group reads its pieces by itself"
    return None


def _cuda_forward(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups) -> Tensor:
    q, table, lens = native.packed_heads(q), block_tables, context_lens.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    rows, heads, width = q.shape
    blocks, block, kv_heads = k_cache.shape[:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    splits = native.cuda().paged_attention_splits(table.shape[1], block)
    partial = lens.new_empty(rows * splits * heads * (width + 2) if splits > 1 else 0, dtype=torch.float32)
    cache = (k_cache.data_ptr(), v_cache.data_ptr(), native.ELEMENT_TYPES[q.dtype])
    together = (0, 0) if groups is None else (groups.data_ptr(), groups.stride(0))
    tables = (table.data_ptr(), table.stride(0), lens.data_ptr(), *together)
    sizes = (rows, heads, kv_heads, width, blocks, block, table.shape[1], scale or width**-0.5)
    results = (out.data_ptr(), partial.data_ptr())
    native.launch(q.device, "paged_attention", q.data_ptr(), q.stride(0), *cache, *tables, *results, *sizes)
    return out


def _case(
    size: str,
    contexts: list[int],
    block: int,
    heads: tuple[int, int, int],
    queries: list[int] | None = None,
    shared: list[int] | None = None,
) -> Case:
    """Tables in random order; the first two sequences share their first block; past a context are -1 and junk.

    shared: of each sequence how many of its first blocks are those of the sequence before it; groups are found then.
    """
    query_heads, kv_heads, width = heads

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        used = [-(-n // block) for n in contexts]
        blocks = sum(used) + 3
        order = torch.randperm(blocks, generator=generator).int()
        table = torch.full((len(contexts), max(used) + 2), -1, dtype=torch.int32)
        table[len(contexts) // 2 :, 1:] = 1_000_000
        for i, n in enumerate(used):
            table[i, :n] = order[sum(used[:i]) : sum(used[: i + 1])]
            if shared:
                table[i, : shared[i]] = table[i - 1, : shared[i]]
        table[min(1, len(used) - 1), 0] = table[0, 0]
        rows = len(contexts) if queries is None else sum(queries)
        q = torch.randn(rows, query_heads, width, generator=generator).to(device, dtype)
        caches = random_cache(blocks, block, kv_heads, width, device, dtype, generator)
        starts = None if queries is None else torch.tensor([0, *queries]).cumsum(0).int().to(device)
        groups = find_groups(table, block).to(device) if shared else None
        lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        return q, *caches, table.to(device), lens, starts, None, groups

    kind = "prefill" if queries else "grouped decode" if shared else "decode"
    name = f"{kind} {len(contexts)} contexts up to {max(contexts)} {query_heads}+{kv_heads} heads of {width}"
    return Case(name, size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", [5, 17, 1], 4, (4, 2, 16)),
        _case("tiny", [5, 17, 9], 4, (4, 2, 16), [5, 2, 1]),
        _case("tiny", [258, 259, 5], 16, (4, 2, 16), shared=[0, 16, 0]),
        _case("ragged", [1, 33, 200, 7, 64, 63, 65], 16, (6, 1, 24)),
        _case("ragged", [70, 33, 3], 16, (3, 3, 40), [70, 16, 0]),
        _case("ragged", [600, 256, 7, 257], 16, (8, 2, 64)),  # more than one piece of a split context
        _case("ragged", [300, 1, 129, 40], 13, (7, 1, 72), [41, 1, 5, 40]),
        # An odd block, so that pieces begin inside of one; groups of four, of one and of two, and a shorter one.
        _case("ragged", [600, 520, 519, 700, 9, 280, 300, 550], 13, (3, 1, 24), shared=[0, 40, 39, 39, 0, 0, 21, 20]),
        _case("model", [40 + i % 25 for i in range(256)], 16, (4, 2, 16)),
        _case("model", [900 + i for i in range(64)], 16, (12, 2, 128)),
        _case("model", [1100 + i for i in range(64)], 16, (12, 2, 128), shared=[64 * (i % 16 > 0) for i in range(64)]),
        _case("model", [530 + i for i in range(16)], 16, (16, 8, 64), shared=[0, *[32] * 15]),
        _case("model", [530 + i for i in range(16)], 16, (16, 4, 256), shared=[0, *[32] * 15]),
        _case("model", [512, 700, 300], 16, (14, 2, 64), [512, 200, 300]),
        _case("model", [512, 700, 300], 16, (12, 2, 128), [512, 200, 300]),
        _case("model", [512, 700], 16, (8, 1, 256), [512, 200]),
    ]


def invalid() -> list[tuple[str, tuple]]:
    q, cache = torch.ones(2, 4, 8), torch.ones(5, 4, 2, 8)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    lens = torch.tensor([3, 6], dtype=torch.int32)
    own, long = torch.tensor([[0, 1]], dtype=torch.int32), table.repeat(1, 200)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    return [
        ("heads that do not divide", (q[:, :3], cache, cache, table, lens, None, None, None)),
        ("caches of two shapes", (q, cache, cache[:4], table, lens, None, None, None)),
        ("two dtypes", (q, cache.double(), cache.double(), table, lens, None, None, None)),
        ("int64 tables", (q, cache, cache, table.long(), lens, None, None, None)),
        ("fewer contexts than tables", (q, cache, cache, table, lens[:1], None, None, None)),
        ("queries without cu_seqlens_q", (q[:1], cache, cache, table, lens, None, None, None)),
        ("a short cu_seqlens_q", (q, cache, cache, table, lens, lens, None, None)),
        ("a context longer than its table", (q, cache, cache, table, lens + 3, None, None, None)),
        ("an empty context", (q, cache, cache, table, lens - 3, None, None, None)),
        ("groups of a prefill", (q, cache, cache, table, lens, starts, None, own)),
        ("int64 groups", (q, cache, cache, table, lens, None, None, own.long())),
        ("groups of too few pieces", (q, cache, cache, long, lens, None, None, own)),
        ("a group of different blocks", (q, cache, cache, table, lens, None, None, own * 0)),
        ("a group that begins at a later row", (q, cache, cache, table, lens, None, None, own + 1)),
    ]


def _pairs(q, context_lens, cu_seqlens_q) -> int:
    """Pairs of a query and a position that it sees."""
    if cu_seqlens_q is None:
        return int(context_lens.sum())
    counts = cu_seqlens_q.diff().long()
    return int((counts * context_lens - counts * (counts - 1) // 2).sum())


def _positions(context_lens, groups) -> int:
    return int(context_lens.sum()) if groups is None else positions_read(groups, context_lens)


OP = register(
    Op(
        name="paged_attention",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, unavailable=native.cpu_unavailable, supports=_cpu_supports),
            "cuda": Backend(
                _cuda_forward, unavailable=native.cuda_unavailable, supports=_cuda_supports, slower=_cuda_slower
            ),
            "triton": Backend(
                paged_attention_triton.forward,
                unavailable=triton_unavailable,
                supports=paged_attention_triton.supports,
            ),
        },
        cases=cases,
        invalid=invalid,
        tolerances={
            torch.float32: Tolerance(1e-5, 2e-6, "float32 products over D and an average over up to 1k values"),
            torch.bfloat16: Tolerance(2**-7, 2**-6, "probabilities may be rounded to 8 bits before they meet v"),
        },
        flops=lambda q, k_cache, v_cache, table, lens, starts, *_: (
            4 * _pairs(q, lens, starts) * q.shape[1] * q.shape[2]
        ),
        bytes=lambda q, k_cache, v_cache, table, lens, starts, scale, groups: (
            q.element_size() * (2 * q.numel() + 2 * _positions(lens, groups) * k_cache.shape[2] * q.shape[2])
        ),
    )
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    groups: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of new queries over cached keys and values. For inference: no gradient.

    q: float [T, Hq, D]. k_cache, v_cache: float [N, bs, Hkv, D], q's dtype, the new tokens already appended.
    block_tables: int32 [S, M]; entries past a context are ignored and may be anything. context_lens: int32 [S], >= 1,
    the new tokens included. cu_seqlens_q: int32 [S+1] or None; None means one query a sequence (T == S). scale:
    D ** -0.5 where None. groups: int32 [P, S] of decode steps, P the pieces of PIECE positions that a table holds, or
    None: the rows from groups[p, s] to s have the same blocks in piece p (`paged_groups.find_groups`).
    Returns [T, Hq, D] in q's dtype.
    Raises ValueError on shapes, dtypes or devices that do not fit, a context longer than its table, or groups of rows
    that do not have the same blocks.
    The kernels on a GPU do not make the host wait for their verdict on contexts, tables and groups: they read nothing
    outside the cache and give NaN for a sequence that would.
    """
    with torch.no_grad():
        return OP(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, groups, backend=backend)
