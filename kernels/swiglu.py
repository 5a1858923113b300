"""SwiGLU: the gated activation of Llama's and Qwen's MLP, on the fused gate-and-up projection.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i],    silu(a) = a * sigmoid(a)        (Shazeer 2020, eq. 6)

One projection of width 2I feeds it, so the two halves are read where they lie and no split copy is made. Arithmetic is
fp32 (fp64 for fp64 input), rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels.op import Case, Op, Tolerance, register


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
