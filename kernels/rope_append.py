"""What new tokens' q, k and v need before attention over the paged cache, in one launch.

For token t with its position and its slot in the cache (block * bs + offset):

    q'[t], k'[t] = rope(q[t]), rope(k[t])       each head normalised before, where q_norm and k_norm are given (Qwen3)
    k_cache[slot[t]], v_cache[slot[t]] = k'[t], v[t]

It is rms_norm, rope and paged_append in turn, their roundings included: the learner runs the first two by themselves,
and the sampler must see what the learner sees. Apart they are four launches and k is written twice (vLLM and FlashInfer
fuse the last two likewise).
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.paged_append import check as check_append
from r1fast_kernels.paged_append import reference as reference_append
from r1fast_kernels.rms_norm import reference as reference_norm
from r1fast_kernels.rope import check as check_rope
from r1fast_kernels.rope import reference as reference_rope
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps) -> None:
    check_rope(q, k, cos, sin, positions, "rope_append")
    check_append(k, v, k_cache, v_cache, slot_mapping, "rope_append")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_append: q_norm and k_norm go together; give both or neither")
    for norm in (q_norm, k_norm):
        if norm is None:
            continue
        if norm.shape != q.shape[2:] or norm.dtype != q.dtype or norm.device != q.device:
            raise ValueError(
                f"rope_append: q_norm and k_norm must be {q.dtype} [{q.shape[2]}] on {q.device} as q is, "
                f"not {norm.dtype} {list(norm.shape)} on {norm.device}"
            )
        if not eps > 0:
            raise ValueError(f"rope_append: eps must be > 0, not {eps}")


def reference(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps) -> Tensor:
    """The three references in turn."""
    if q_norm is not None:
        q, k = reference_norm(q, q_norm, eps, None), reference_norm(k, k_norm, eps, None)
    try:
        q, k = reference_rope(q, k, cos, sin, positions)
        reference_append(k, v, k_cache, v_cache, slot_mapping)
    except ValueError as error:
        raise ValueError(f"rope_append: {error}") from None
    return q


@jit
def _normalised(first, second, weight, column, half, eps):
    """RMSNorm of heads given by halves [N, HALF], rounded to the weight's dtype."""
    width = 2 * half
    scale = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / width + eps)
    w = tl.load(weight + column, mask=column < half, other=0.0)
    wide = w.to(tl.float32)
    first = (first * scale[:, None] * wide[None, :]).to(w.dtype).to(tl.float32)
    wide = tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)
    second = (second * scale[:, None] * wide[None, :]).to(w.dtype).to(tl.float32)
    return first, second


@jit
def _rotated(
    x, row_stride, head_stride, row, head, live, cos, sin, position, known, weight, column, half, eps,
    NORM: tl.constexpr,
):  # fmt: skip
    """Both halves of the heads [N, HALF] after norm and rotation; NaN where the position is outside the tables."""
    mask = live[:, None] & (column < half)[None, :]
    place = (row * row_stride + head * head_stride)[:, None] + column[None, :]
    first = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        first, second = _normalised(first, second, weight, column, half, eps)
    angle = position[:, None] * half + column[None, :]
    angles = known[:, None] & mask
    c = tl.load(cos + angle, mask=angles, other=float("nan"))
    s = tl.load(sin + angle, mask=angles, other=float("nan"))
    return first * c - second * s, second * c + first * s


@jit(do_not_specialize=["rows", "table_rows", "slots"])
def _place(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, positions, slot_mapping, q_norm, k_norm, eps,
    q_out, k_cache, v_cache, rows, table_rows, slots, q_heads, kv_heads, half, q_parts,
    NORM: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """ROWS tokens x HEADS heads a program: the first q_parts of the second axis are q's heads, the others k's and v's.
    """
    flat = tl.program_id(0) * ROWS * HEADS + tl.arange(0, ROWS * HEADS)
    row = (flat // HEADS).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, HALF)
    position = tl.load(positions + row, mask=inside, other=0)
    known = (position >= 0) & (position < table_rows)
    part = tl.program_id(1)
    if part < q_parts:
        head = (part * HEADS + flat % HEADS).to(tl.int64)
        live = inside & (head < q_heads)
        first, second = _rotated(
            q, q_row, q_head, row, head, live, cos, sin, position, known, q_norm, column, half, eps, NORM
        )
        mask = live[:, None] & (column < half)[None, :]
        to = ((row * q_heads + head) * 2 * half)[:, None] + column[None, :]
        tl.store(q_out + to, first, mask=mask)
        tl.store(q_out + to + half, second, mask=mask)
    else:
        head = ((part - q_parts) * HEADS + flat % HEADS).to(tl.int64)
        slot = tl.load(slot_mapping + row, mask=inside, other=-1)
        live = inside & (head < kv_heads) & known & (slot >= 0) & (slot < slots)
        first, second = _rotated(
            k, k_row, k_head, row, head, live, cos, sin, position, known, k_norm, column, half, eps, NORM
        )
        mask = live[:, None] & (column < half)[None, :]
        to = ((slot * kv_heads + head) * 2 * half)[:, None] + column[None, :]
        tl.store(k_cache + to, first, mask=mask)
        tl.store(k_cache + to + half, second, mask=mask)
        place = (row * v_row + head * v_head)[:, None] + column[None, :]
        tl.store(v_cache + to, tl.load(v + place, mask=mask), mask=mask)
        tl.store(v_cache + to + half, tl.load(v + place + half, mask=mask), mask=mask)


def _float32_tables(cos, sin) -> str | None:
    wrong = cos.dtype is not torch.float32 or sin.dtype is not torch.float32
    return f"it reads float32 tables, and these are {cos.dtype} and {sin.dtype}" if wrong else None


def _triton_supports(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, *_) -> str | None:
    if q.dtype == torch.float64:
        return "q is float64, which only the reference keeps"
    return _float32_tables(cos, sin) or where_triton_runs(q, cos, positions, k_cache, slot_mapping)


def _triton_forward(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps) -> Tensor:
    q, k, v = (native.without_gaps(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows, q_heads, width = q.shape
    kv_heads = k.shape[1]
    if not rows:
        return out
    half = next_power_of_2(width // 2)
    heads = min(next_power_of_2(max(q_heads, kv_heads)), max(1, 1024 // half))
    tile = max(1, 1024 // (half * heads))
    q_parts, kv_parts = -(-q_heads // heads), -(-kv_heads // heads)
    strided = (value for x in (q, k, v) for value in (x, x.stride(0), x.stride(1)))
    tables = (cos.contiguous(), sin.contiguous(), positions.contiguous(), slot_mapping.contiguous())
    norms = (q, k) if q_norm is None else (q_norm.contiguous(), k_norm.contiguous())
    sizes = (rows, cos.shape[0], k_cache.shape[0] * k_cache.shape[1], q_heads, kv_heads, width // 2, q_parts)
    _place[(-(-rows // tile), q_parts + kv_parts)](
        *strided, *tables, *norms, eps, out, k_cache, v_cache, *sizes, q_norm is not None, tile, heads, half
    )
    return out


LARGEST_HEAD = 1024  # of the C++ backend, which normalises a head on its stack


def _cpu_supports(q, k, v, cos, sin, *_) -> str | None:
    if q.shape[2] > LARGEST_HEAD:
        return f"a head of {q.shape[2]} is wider than {LARGEST_HEAD}"
    return _float32_tables(cos, sin) or native.only_float32(q)


def _native_arguments(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps, out) -> tuple:
    """What both native functions take, in their order; the tensors must outlive the call, so they come ready."""
    return (
        *native.place(q), *native.place(k), *native.place(v), cos.data_ptr(), sin.data_ptr(), cos.shape[0],
        positions.data_ptr(), slot_mapping.data_ptr(), k_cache.shape[0] * k_cache.shape[1],
        0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr(), eps,
        q.shape[0], q.shape[1], k.shape[1], cos.shape[1], out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
    )  # fmt: skip


def _ready(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps) -> tuple:
    rows = (native.without_gaps(x) for x in (q, k, v))
    tables = (x.contiguous() for x in (cos, sin, positions))
    norms = (None, None) if q_norm is None else (q_norm.contiguous(), k_norm.contiguous())
    return *rows, *tables, k_cache, v_cache, slot_mapping.contiguous(), *norms, eps


def _cpu_forward(*args) -> Tensor:
    args = _ready(*args)
    out = args[0].new_empty(args[0].shape)
    native.cpu().rope_append(*_native_arguments(*args, out))
    return out


def _cuda_supports(q, k, v, cos, sin, *_) -> str | None:
    if q.dtype not in native.ELEMENT_TYPES:
        return f"it has no {q.dtype}"
    return _float32_tables(cos, sin)


def _cuda_forward(*args) -> Tensor:
    args = _ready(*args)
    q = args[0]
    out = q.new_empty(q.shape)
    native.launch(q.device, "rope_append", native.ELEMENT_TYPES[q.dtype], *_native_arguments(*args, out))
    return out


def _case(size: str, rows: int, heads: tuple[int, int, int], norm: bool, blocks: int, block: int) -> Case:
    q_heads, kv_heads, width = heads

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(rows, q_heads + 2 * kv_heads, width, generator=generator, dtype=torch.float64)
        q, k, v = qkv.to(device, dtype).split((q_heads, kv_heads, kv_heads), 1)
        caches = torch.randn(2, blocks, block, kv_heads, width, generator=generator).to(device, dtype)
        frequency = 1000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
        angle = torch.arange(300, dtype=torch.float64)[:, None] * frequency
        positions = torch.randint(0, 300, (rows,), generator=generator).to(device)
        slots = torch.randperm(blocks * block, generator=generator)[:rows].to(device)
        norms = [None, None]
        if norm:
            norms = (1 + 0.2 * torch.randn(2, width, generator=generator, dtype=torch.float64)).to(device, dtype)
        tables = (angle.cos().float().to(device), angle.sin().float().to(device))
        return q, k, v, *tables, positions, *caches, slots, *norms, 1e-6

    return Case(f"{rows} rows {q_heads}+{kv_heads} heads of {width}{' normalised' if norm else ''}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 5, (4, 2, 16), False, 3, 4),
        _case("tiny", 3, (4, 2, 32), True, 3, 4),
        _case("ragged", 37, (3, 1, 26), True, 7, 16),
        _case("ragged", 1, (7, 7, 80), False, 2, 5),
        _case("ragged", 9, (2, 2, 256), True, 2, 16),
        _case("model", 256, (4, 2, 16), True, 1024, 16),
        _case("model", 4096, (12, 2, 128), False, 300, 16),
    ]


def invalid() -> list[tuple[str, tuple]]:
    q, k, table, rows = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.ones(5, 4), torch.arange(3)
    caches = tuple(torch.zeros(2, 5, 4, 2, 8))
    tables, norm = (table, table, rows), torch.ones(8)
    plain = (None, None, 1e-6)
    return [
        ("an odd head", (q[..., :7], k[..., :7], k[..., :7], *tables, *caches, rows, *plain)),
        ("other heads than the cache", (q, k[:, :1], k[:, :1], *tables, *caches, rows, *plain)),
        ("other rows in v", (q, k, k[:2], *tables, *caches, rows, *plain)),
        ("int32 positions", (q, k, k, table, table, rows.int(), *caches, rows, *plain)),
        ("a position past the tables", (q, k, k, table, table, rows + 3, *caches, rows, *plain)),
        ("a slot past the cache", (q, k, k, *tables, *caches, rows + 18, *plain)),
        ("a cache of another dtype", (q, k, k, *tables, *(c.double() for c in caches), rows, *plain)),
        ("one norm of two", (q, k, k, *tables, *caches, rows, norm, None, 1e-6)),
        ("a norm of half a head", (q, k, k, *tables, *caches, rows, norm[:4], norm[:4], 1e-6)),
        ("an eps of zero", (q, k, k, *tables, *caches, rows, norm, norm, 0.0)),
    ]


OP = register(
    Op(
        name="rope_append",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, unavailable=native.cpu_unavailable, supports=_cpu_supports),
            "cuda": Backend(_cuda_forward, unavailable=native.cuda_unavailable, supports=_cuda_supports),
            "triton": Backend(_triton_forward, unavailable=triton_unavailable, supports=_triton_supports),
        },
        cases=cases,
        invalid=invalid,
        mutates=(6, 7),
        tolerances={
            torch.float32: Tolerance(2e-6, 4e-6, "a few float32 roundings of numbers up to 4"),
            torch.bfloat16: Tolerance(2**-7, 2**-6, "the norm and the rotation are each rounded to 8 bits"),
            torch.float16: Tolerance(2**-10, 2**-9, "the norm and the rotation are each rounded to 11 bits"),
        },
        flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
        bytes=lambda q, k, v, cos, *_: (
            2 * (q.numel() + 2 * k.numel()) * q.element_size() + q.shape[0] * (16 + 8 * cos.shape[1])
        ),
    )
)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Rotate q and k and write k and v into the cache, in place; returns the rotated q. For inference: no gradient.

    q: float [T, Hq, D]. k, v: float [T, Hkv, D]. cos, sin: float32 [P, D/2]. positions: int64 [T], in [0, P). k_cache,
    v_cache: float [N, bs, Hkv, D], contiguous. slot_mapping: int64 [T], distinct: block * bs + offset of each token.
    q_norm, k_norm: float [D], weights of the RMSNorm of each head before the rotation, or both None; eps: of that norm.
    All floats but cos and sin are of one dtype. Returns [T, Hq, D].
    Raises ValueError on shapes, dtypes or devices that do not fit, a position outside the tables or a slot outside the
    cache. (On a GPU nothing is said, as the host would have to wait to hear of it: the q of such a position is NaN, and
    neither it nor such a slot is written.)
    """
    with torch.no_grad():
        args = (q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps)
        return OP(*args, backend=backend)
