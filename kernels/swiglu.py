"""SwiGLU: the gated activation of Llama's and Qwen's MLP, on the fused gate-and-up projection.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i],    silu(a) = a * sigmoid(a)        (Shazeer 2020, eq. 6)

One projection of width 2I feeds it, so the two halves are read where they lie and no split copy is made. Arithmetic is
fp32 (fp64 for fp64 input), rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check(gate_up) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(
            f"swiglu: gate_up must be float [..., 2I], an even last dimension, "
            f"not {gate_up.dtype} {list(gate_up.shape)}"
        )


def reference(gate_up) -> Tensor:
    """Plain torch. A backward written out of torch ops took 15 ms to autograd's 13 (15k x 320, one core)."""
    gate, up = gate_up.chunk(2, -1)
    if gate_up.element_size() >= 4:
        return F.silu(gate) * up
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


@jit
def _gate(gate_up, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of ROWS x COLUMNS results a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * (2 * width) + column[None, :]
    a = tl.load(gate_up + place, mask=live, other=0.0).to(tl.float32)
    b = tl.load(gate_up + place + width, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * width + column[None, :], a / (1.0 + tl.exp(-a)) * b, mask=live)


@jit
def _gate_backward(d_out, gate_up, d_gate_up, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu'(a) = s (1 + a (1 - s)), s = sigmoid(a)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * (2 * width) + column[None, :]
    g = tl.load(d_out + row[:, None] * width + column[None, :], mask=live, other=0.0).to(tl.float32)
    a = tl.load(gate_up + place, mask=live, other=0.0).to(tl.float32)
    b = tl.load(gate_up + place + width, mask=live, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-a))
    tl.store(d_gate_up + place, g * b * s * (1.0 + a * (1.0 - s)), mask=live)
    tl.store(d_gate_up + place + width, g * a * s, mask=live)


def _launch(kernel, rows: int, width: int, *tensors: Tensor) -> None:
    columns = min(next_power_of_2(width), 1024)
    tile = 1024 // columns
    if rows:
        kernel[(-(-rows // tile), -(-width // columns))](*tensors, rows, width, tile, columns)


def _triton_supports(gate_up) -> str | None:
    if gate_up.dtype == torch.float64:
        return "gate_up is float64, which only the reference keeps"
    return where_triton_runs(gate_up)


def _triton_forward(gate_up) -> tuple:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _launch(_gate, out.numel() // max(width, 1), width, gate_up, out)
    return out, (gate_up,)


def _triton_backward(saved, grads, needs) -> tuple:
    (gate_up,) = saved
    d_gate_up, width = torch.empty_like(gate_up), gate_up.shape[-1] // 2
    _launch(_gate_backward, grads[0].numel() // max(width, 1), width, grads[0].contiguous(), gate_up, d_gate_up)
    return (d_gate_up,)


def _cpu_sizes(gate_up: Tensor) -> tuple[int, int, int]:
    """Stride of a row, rows, and the width of a half."""
    width = gate_up.shape[-1]
    row = gate_up.stride(0) if gate_up.dim() == 2 else width
    return row, gate_up.numel() // width if width else 0, width // 2


def _cpu_forward(gate_up) -> tuple[Tensor, tuple]:
    """Forward and backward on one AVX-512 core, the reference's time first: 256 x 320 0.15 and 0.13 ms, 15k x 320 16
    and 9 ms, 8k x 3072 65 and 33 ms."""
    gate_up = native.without_gaps(gate_up) if gate_up.dim() == 2 else gate_up.contiguous()
    sizes = _cpu_sizes(gate_up)
    out = memory.empty(gate_up, (*gate_up.shape[:-1], sizes[2]))
    native.cpu().swiglu_forward(gate_up.data_ptr(), *sizes, out.data_ptr())
    return out, (gate_up,)


def _cpu_backward(saved, grads, needs) -> tuple[Tensor]:
    (gate_up,) = saved
    row, rows, width = _cpu_sizes(gate_up)
    d_out, d_gate_up = grads[0].contiguous(), memory.empty(gate_up, gate_up.shape)
    native.cpu().swiglu_backward(gate_up.data_ptr(), row, d_out.data_ptr(), rows, width, d_gate_up.data_ptr())
    return (d_gate_up,)


def _case(size: str, rows: int, width: int) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        gate_up = 2 * torch.randn(rows, 2 * width, generator=generator, dtype=torch.float64)
        gate_up[0, : min(3, width)] = torch.tensor([-60.0, 60.0, 0.0])[: min(3, width)]  # sigmoid at its ends
        return (gate_up.to(device, dtype),)

    return Case(f"{rows}x{width}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 7, 160),
        _case("ragged", 33, 129),
        _case("ragged", 1, 5),
        _case("model", 4096, 8960),
    ]


def invalid() -> list[tuple[str, tuple]]:
    return [
        ("an odd width", (torch.ones(3, 7),)),
        ("a scalar", (torch.tensor(1.0),)),
        ("integers", (torch.ones(3, 8, dtype=torch.int64),)),
    ]


OP = register(
    Op(
        name="swiglu",
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
        gradients=(0,),
        tolerances={
            torch.float32: Tolerance(1e-6, 1e-6, "an exp, a division and two products, each one float32 rounding"),
            torch.bfloat16: Tolerance(2**-8, 1e-6, "rounded once to 8 bits"),
            torch.float16: Tolerance(2**-11, 1e-6, "rounded once to 11 bits"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(2e-6, 5e-6, "the terms of silu's derivative partly cancel"),
            torch.bfloat16: Tolerance(2**-7, 2**-9, "as forward, on a gradient that was itself rounded to 8 bits"),
            torch.float16: Tolerance(2**-10, 2**-12, "as forward, on a gradient that was itself rounded to 11 bits"),
        },
        flops=lambda gate_up: 3 * gate_up.numel(),
        bytes=lambda gate_up: gate_up.numel() * gate_up.element_size() * 3 // 2,
    )
)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(first half) * second half of the last dimension.

    gate_up: float [..., 2I], gate first. Returns [..., I] in the same dtype. Differentiable.
    Raises ValueError where the last dimension is odd or the dtype is not a float.
    """
    return OP(gate_up, backend=backend)
