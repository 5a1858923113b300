"""RMSNorm with an optional residual sum in the same pass.

    s = x + residual                       (only where a residual is given; rounded to x's dtype)
    y = s / sqrt(mean(s^2, last dim) + eps) * weight          (Zhang & Sennrich 2019, eq. 4)

All arithmetic is fp32 (fp64 for fp64 input) and y is rounded once, at the end. Llama and Qwen call it twice a
layer, and Qwen3 on every attention head too, so in a small model it is the most frequent op of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check(x, weight, eps, residual) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [H] for x [..., H], not {list(weight.shape)} for {list(x.shape)}")
    if not x.is_floating_point() or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"rms_norm: x and weight must be float tensors of one dtype and device, "
            f"not {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"rms_norm: residual must be {x.dtype} {list(x.shape)} on {x.device} as x is, "
            f"not {residual.dtype} {list(residual.shape)} on {residual.device}"
        )
    if not eps > 0:
        raise ValueError(f"rms_norm: eps must be > 0, not {eps}")


def reference(x, weight, eps, residual) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch. Its fused forward takes 0.4 ms and its backward 4 (15k x 64, one core); a hand-written backward of
    torch ops took 2.8 there and was no faster at 256 rows, so autograd's stays."""
    if residual is not None:
        x = x + residual
    if x.element_size() >= 4:
        y = F.rms_norm(x, weight.shape, weight, eps)
    else:
        y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if residual is None else (y, x)


@jit
def _norm_rows(
    x,
    residual,
    weight,
    y,
    total,
    scale,
    rows,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows a program, COLUMNS >= width."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=live, other=0.0)
    if RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + place, mask=live, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + place, value, mask=live)
    value = value.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(scale + row, r, mask=row < rows)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + place, value * r[:, None] * w[None, :], mask=live)


@jit
def _norm_rows_backward(
    d_y, d_total, x, weight, scale, d_x, partial, rows, width, tiles,
    TOTAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`tiles` runs of ROWS rows a program; each program keeps its share of the weight's gradient, so no atomics."""
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    share = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(0, tiles):
        row = (first + tile) * ROWS + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        g = tl.load(d_y + place, mask=live, other=0.0).to(tl.float32)
        r = tl.load(scale + row, mask=row < rows, other=0.0)
        unit = tl.load(x + place, mask=live, other=0.0).to(tl.float32) * r[:, None]
        share += tl.sum(g * unit, 0)
        g *= w[None, :]
        d = r[:, None] * (g - unit * (tl.sum(g * unit, 1) / width)[:, None])
        if TOTAL:
            d += tl.load(d_total + place, mask=live, other=0.0).to(tl.float32)
        tl.store(d_x + place, d, mask=live)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, share, mask=column < width)


LARGEST_WIDTH = 16384  # columns that one Triton program holds
# Programs of the backward: a fixed number whatever the card, so that the weight's gradient is summed in one order.
PROGRAMS = 512


def _tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: about 2k elements, 16 to a thread at most."""
    columns = next_power_of_2(width)
    return max(1, 2048 // columns), columns, min(max(columns // 512, 4), 16)


def _triton_supports(x, weight, eps, residual) -> str | None:
    if x.dtype == torch.float64:
        return "x is float64, which only the reference keeps"
    if x.shape[-1] > LARGEST_WIDTH:
        return f"rows of more than {LARGEST_WIDTH}"
    return where_triton_runs(x, weight, residual)


def _triton_forward(x, weight, eps, residual) -> tuple:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        tile, columns, warps = _tile(width)
        other = x if residual is None else residual
        _norm_rows[(-(-rows // tile),)](
            x, other, weight, y, total, scale, rows, width, eps, residual is not None, tile, columns, num_warps=warps
        )
    return (y if residual is None else (y, total)), (total, weight, scale, residual is not None)


def _triton_backward(saved, grads, needs) -> tuple:
    x, weight, scale, with_residual = saved
    d_y, d_total = grads[0].contiguous(), grads[1].contiguous() if with_residual else None
    d_x, width = torch.empty_like(x), x.shape[-1]
    rows = scale.shape[0]
    tile, columns, warps = _tile(width)
    tiles = -(-rows // (tile * PROGRAMS))
    programs = -(-rows // (tile * tiles)) if rows else 0
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if rows:
        other = d_y if d_total is None else d_total
        _norm_rows_backward[(programs,)](
            d_y,
            other,
            x,
            weight,
            scale,
            d_x,
            partial,
            rows,
            width,
            tiles,
            with_residual,
            tile,
            columns,
            num_warps=warps,
        )
    return d_x, partial.sum(0).to(weight.dtype) if needs[1] else None, d_x if with_residual else None


def _cpu_place(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x or a copy, and (address, two strides, rows, rows that the first stride steps over, width). The heads of q in a
    fused projection (QK-norm) are read where they lie."""
    width = x.shape[-1]
    if x.dim() == 3 and x.stride(2) == 1 and x.shape[1] and width:
        return x, (*native.place(x), x.shape[0] * x.shape[1], x.shape[1], width)
    x = x.contiguous()
    return x, (x.data_ptr(), width, 0, x.numel() // width if width else 0, 1, width)


def _cpu_forward(x, weight, eps, residual) -> tuple[Tensor | tuple[Tensor, Tensor], tuple]:
    """Forward and backward on one AVX-512 core, the reference's time first: 256 x 64 0.19 and 0.16 ms, 15k x 64 7.0 and
    2.6 ms, the heads of q (15k x 4 x 16) 6.6 and 2.8 ms, 8k x 512 35 and 14 ms."""
    x, place = _cpu_place(x)
    weight = weight.contiguous()
    y, scale = memory.empty(x, x.shape), x.new_empty(place[3])
    if residual is None:
        native.cpu().rms_norm_forward(*place, 0, weight.data_ptr(), eps, 0, y.data_ptr(), scale.data_ptr())
        return y, (x, weight, scale, False)
    residual, total = residual.contiguous(), memory.empty(x, x.shape)
    addresses = (total.data_ptr(), y.data_ptr(), scale.data_ptr())
    native.cpu().rms_norm_forward(*place, residual.data_ptr(), weight.data_ptr(), eps, *addresses)
    return (y, total), (total, weight, scale, True)


def _cpu_backward(saved, grads, needs) -> tuple[Tensor, Tensor, Tensor | None]:
    normalised, weight, scale, with_residual = saved
    normalised, place = _cpu_place(normalised)
    d_y, d_x = grads[0].contiguous(), memory.empty(weight, normalised.shape)
    d_weight = weight.new_empty(weight.shape)
    d_total = grads[1].contiguous() if with_residual else None
    native.cpu().rms_norm_backward(
        *place, weight.data_ptr(), scale.data_ptr(), d_y.data_ptr(), 0 if d_total is None else d_total.data_ptr(),
        d_x.data_ptr(), d_weight.data_ptr(),
    )  # fmt: skip
    return d_x, d_weight, d_x if with_residual else None


def _case(size: str, shape: tuple[int, ...], with_residual: bool) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        weight = 1 + 0.2 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
        residual = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.to(device, dtype), weight.to(device, dtype), 1e-6, residual if with_residual else None

    return Case(f"{'x'.join(map(str, shape))}{' residual' if with_residual else ''}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", (5, 64), False),
        _case("tiny", (5, 64), True),
        _case("tiny", (7, 4, 16), False),
        _case("ragged", (33, 100), True),
        _case("ragged", (3, 5, 257), False),
        _case("model", (4096, 1536), True),
        _case("model", (8192, 12, 128), False),
    ]


def invalid() -> list[tuple[str, tuple]]:
    x, weight = torch.ones(3, 8), torch.ones(8)
    return [
        ("a weight of another width", (x, torch.ones(4), 1e-6, None)),
        ("integer input", (x.long(), weight.long(), 1e-6, None)),
        ("two dtypes", (x, weight.double(), 1e-6, None)),
        ("a residual of another shape", (x, weight, 1e-6, torch.ones(2, 8))),
        ("an eps of zero", (x, weight, 0.0, None)),
    ]


def _bytes(x, weight, eps, residual) -> int:
    return x.element_size() * (x.numel() * (2 if residual is None else 4) + weight.numel())


OP = register(
    Op(
        name="rms_norm",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(
                _cpu_forward, _cpu_backward, unavailable=native.cpu_unavailable, supports=native.only_float32
            ),
            "triton": Backend(
                _triton_forward, _triton_backward, unavailable=triton_unavailable, supports=_triton_supports
            ),
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1, 3),
        outputs_with_gradient=(0, 1),
        tolerances={
            torch.float32: Tolerance(2e-6, 1e-6, "a few float32 roundings, and a mean of up to 2k squares"),
            torch.bfloat16: Tolerance(2**-7, 2**-8, "the residual sum and y are each rounded to 8 bits"),
            torch.float16: Tolerance(2**-10, 2**-10, "the residual sum and y are each rounded to 11 bits"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(2e-5, 2e-4, "the weight's gradient sums up to 100k rows of order one"),
            torch.bfloat16: Tolerance(2**-6, 2**-5, "as forward, and the rounded sum enters every term"),
            torch.float16: Tolerance(2**-9, 2**-7, "as forward, and the rounded sum enters every term"),
        },
        flops=lambda x, *_: 4 * x.numel(),
        bytes=_bytes,
    )
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of x.

    x: float [..., H]. weight: float [H], x's dtype. residual: float [..., H], x's shape and dtype, or None.
    Returns y [..., H] in x's dtype; with a residual, (y, x + residual). Differentiable in all tensors.
    Raises ValueError on shapes, dtypes or devices that do not fit, or an eps that is not positive.
    """
    return OP(x, weight, eps, residual, backend=backend)
