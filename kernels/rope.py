"""Rotary position embedding of queries and keys, in the half-split layout of NeoX, Llama and Qwen.

With x = (x1, x2) the two halves of a head, and c, s the cosine and sine of its position (Su et al. 2021, eq. 34):

    x1' = x1 * c - x2 * s
    x2' = x2 * c + x1 * s

The angles come as tables [P, D/2], so every scaling of the frequencies (linear, llama3, yarn with its
magnitude folded in) is the caller's and costs nothing here. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1fast_kernels import memory, native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check(q, k, cos, sin, positions, op: str = "rope") -> None:
    """`op` names the caller, where the rotation is part of another op."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(
            f"{op}: q must be [T, Hq, D] and k [T, Hkv, D] with an even D, not {list(q.shape)} and {list(k.shape)}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype:
        raise ValueError(f"{op}: q and k must be float tensors of one dtype, not {q.dtype} and {k.dtype}")
    if cos.dim() != 2 or cos.shape[1] * 2 != q.shape[2] or sin.shape != cos.shape:
        raise ValueError(
            f"{op}: cos and sin must be [P, {q.shape[2] // 2}], half a head, "
            f"not {list(cos.shape)} and {list(sin.shape)}"
        )
    if positions.shape != q.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(f"{op}: positions must be int64 [{q.shape[0]}], not {positions.dtype} {list(positions.shape)}")
    device = q.device
    if k.device != device or cos.device != device or sin.device != device or positions.device != device:
        raise ValueError(f"{op}: q, k, cos, sin and positions must live on one device")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * (c, c) + (x2, x1) * (-s, s): one copy and two passes over whole heads, where halves would be short rows."""
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    return torch.cat((wide[..., half:], wide[..., :half]), -1).mul_(sin).addcmul_(wide, cos).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: 5.7 ms to autograd's 8.0 (15k x 6 heads of 16, one core)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q: Tensor, d_k: Tensor):
        cos, sin = ctx.saved_tensors
        back = -sin
        return _rotated(d_q, cos, back), _rotated(d_k, cos, back), None, None


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch; fp32 inside (fp64 for fp64 input)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    try:
        cos, sin = (table.index_select(0, positions).unsqueeze(1).to(work) for table in (cos, sin))
    except IndexError:
        raise ValueError(f"rope: a position lies outside the tables, which have {cos.shape[0]} rows") from None
    return _Rotation.apply(q, k, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


@jit
def _rotate_heads(
    x, out, cos, sin, positions, rows, heads, half, row_stride, head_stride, turn,
    ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows x HEADS heads a program, both halves of each head. turn: 1 forward, -1 back."""
    flat = tl.program_id(0) * ROWS * HEADS + tl.arange(0, ROWS * HEADS)
    head = (tl.program_id(1) * HEADS + flat % HEADS).to(tl.int64)  # heads may be the outer dimension of x
    row = (flat // HEADS).to(tl.int64)
    column = tl.arange(0, HALF)
    live = ((row < rows) & (head < heads))[:, None] & (column < half)[None, :]
    position = tl.load(positions + row, mask=row < rows, other=0)
    angle = position[:, None] * half + column[None, :]
    c = tl.load(cos + angle, mask=live, other=0.0)
    s = tl.load(sin + angle, mask=live, other=0.0) * turn
    place = (row * row_stride + head * head_stride)[:, None] + column[None, :]
    first = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=live, other=0.0).to(tl.float32)
    place = ((row * heads + head) * 2 * half)[:, None] + column[None, :]
    tl.store(out + place, first * c - second * s, mask=live)
    tl.store(out + place + half, second * c + first * s, mask=live)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, turn: float) -> Tensor:
    """x may be a slice of a fused projection: only the elements of a head must lie together."""
    x = x if x.stride(2) == 1 else x.contiguous()
    rows, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = next_power_of_2(width // 2)
    group = min(next_power_of_2(heads), max(1, 1024 // half))
    tile = max(1, 1024 // (half * group))
    if out.numel():
        grid = (-(-rows // tile), -(-heads // group))
        strides = (x.stride(0), x.stride(1))
        _rotate_heads[grid](x, out, cos, sin, positions, rows, heads, width // 2, *strides, turn, tile, group, half)
    return out


def _triton_supports(q, k, cos, sin, positions) -> str | None:
    if q.dtype == torch.float64 or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return "it takes float32 tables and no float64"
    return where_triton_runs(q, k, cos, sin, positions)


def _triton_forward(q, k, cos, sin, positions) -> tuple:
    tables = (cos.contiguous(), sin.contiguous(), positions.contiguous())
    return (_turned(q, *tables, 1.0), _turned(k, *tables, 1.0)), tables


def _triton_backward(saved, grads, needs) -> tuple:
    return tuple(_turned(grad, *saved, -1.0) for grad in grads)


def _cpu_supports(q, k, cos, sin, positions) -> str | None:
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return f"it reads float32 tables, and these are {cos.dtype} and {sin.dtype}"
    return native.only_float32(q)


def _cpu_rotate(q, k, cos, sin, positions, turn: float) -> tuple[Tensor, Tensor]:
    """`turn`: 1, or -1 to rotate back. q and k are read where they lie in the fused projection. Forward and backward on
    one AVX-512 core, the reference's time first: 256 rows of 4+2 heads of 16 0.26 and 0.14 ms, 15k rows 8.1 and 2.2 ms.
    """
    q, k = native.without_gaps(q), native.without_gaps(k)
    q_out, k_out = memory.empty(q, q.shape), memory.empty(k, k.shape)
    tables = (cos.data_ptr(), sin.data_ptr(), cos.shape[0], positions.data_ptr())
    sizes = (q.shape[0], q.shape[1], k.shape[1], cos.shape[1])
    native.cpu().rope(*native.place(q), *native.place(k), *tables, *sizes, turn, q_out.data_ptr(), k_out.data_ptr())
    return q_out, k_out


def _cpu_forward(q, k, cos, sin, positions) -> tuple[tuple[Tensor, Tensor], tuple]:
    saved = (cos.contiguous(), sin.contiguous(), positions.contiguous())
    return _cpu_rotate(q, k, *saved, 1.0), saved


def _cpu_backward(saved, grads, needs) -> tuple[Tensor, Tensor]:
    return _cpu_rotate(*grads, *saved, -1.0)


def _case(size: str, rows: int, heads: int, kv_heads: int, width: int) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(rows, heads, width, generator=generator, dtype=torch.float64).to(device, dtype)
        k = torch.randn(rows, kv_heads, width, generator=generator, dtype=torch.float64).to(device, dtype)
        frequency = 1000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
        angle = torch.arange(512, dtype=torch.float64)[:, None] * frequency
        positions = torch.randint(0, 512, (rows,), generator=generator)
        cos, sin = (1.1 * angle.cos()).float(), (1.1 * angle.sin()).float()  # 1.1: yarn's magnitude may be folded in
        return q, k, cos.to(device), sin.to(device), positions.to(device)

    return Case(f"{rows} rows {heads}+{kv_heads} heads of {width}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 5, 4, 2, 16),
        _case("ragged", 37, 3, 1, 26),
        _case("ragged", 1, 7, 7, 80),
        _case("model", 8192, 12, 2, 128),
    ]


def invalid() -> list[tuple[str, tuple]]:
    q, k, table, positions = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.ones(5, 4), torch.arange(3)
    return [
        ("an odd head", (q[..., :7], k[..., :7], table, table, positions)),
        ("other rows in k", (q, k[:2], table, table, positions)),
        ("two dtypes", (q, k.double(), table, table, positions)),
        ("tables of a whole head", (q, k, torch.ones(5, 8), torch.ones(5, 8), positions)),
        ("int32 positions", (q, k, table, table, positions.int())),
        ("too few positions", (q, k, table, table, positions[:2])),
        ("a position past the tables", (q, k, table, table, positions + 3)),
    ]


OP = register(
    Op(
        name="rope",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, _cpu_backward, unavailable=native.cpu_unavailable, supports=_cpu_supports),
            "triton": Backend(
                _triton_forward, _triton_backward, unavailable=triton_unavailable, supports=_triton_supports
            ),
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1),
        outputs_with_gradient=(0, 1),
        tolerances={
            torch.float32: Tolerance(1e-6, 2e-6, "two products and a sum of order one, each one float32 rounding"),
            torch.bfloat16: Tolerance(2**-8, 1e-6, "rounded once to 8 bits"),
            torch.float16: Tolerance(2**-11, 1e-6, "rounded once to 11 bits"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(1e-6, 2e-6, "the same rotation, back"),
            torch.bfloat16: Tolerance(2**-7, 2**-7, "as forward, on a gradient that was itself rounded to 8 bits"),
            torch.float16: Tolerance(2**-10, 2**-10, "as forward, on a gradient that was itself rounded to 11 bits"),
        },
        flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
        bytes=lambda q, k, cos, sin, positions: (
            2 * (q.numel() + k.numel()) * q.element_size() + positions.numel() * (8 + 8 * cos.shape[1])
        ),
    )
)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angle of each row's position.

    q: float [T, Hq, D]. k: float [T, Hkv, D]. cos, sin: float32 [P, D/2]. positions: int64 [T], in [0, P).
    Returns (q', k') in their dtypes. Differentiable in q and k.
    Raises ValueError on shapes, dtypes or devices that do not fit, or a position outside the tables.
    """
    return OP(q, k, cos, sin, positions, backend=backend)
