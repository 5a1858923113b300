"""A linear layer whose rows do not know of each other: the same bits for a row, whatever the batch it sits in.

    y[t, n] = sum_k x[t, k] weight[n, k] + bias[n]

A library chooses its kernel by the number of rows, and with it the order in which a row is summed, so that a token's
log-probability depends on what else was in its batch (He et al. 2025, "Defeating nondeterminism in LLM inference"). The
native backend has one order for all: chains of 256 products, each a fused multiply-add, added up one after another; for
any number of rows and of threads. Arithmetic is fp32 (fp64 for fp64 input), rounded once.
It is also the faster one, one core of a Zen 3 beside MKL: forward 1.2 to 1.5 times for 2 to 16 rows, 1.1 for 64 and for
1,056 (0.8 for a single row whose weights are in the cache), gradients of 1,056 rows 1.03 and 1.04 times (docs/log.md).
On a processor with bfloat16 matrix tiles (Intel AMX) the order is another, also one for all: a float32 is taken to
three pieces, whose products the tiles add up as exactly (csrc/cpu/matrix_tiles.h; two pieces or one where
torch.set_float32_matmul_precision asks for less).

    d_x = d_y weight,    d_weight = d_y^T x,    d_bias = sum_t d_y[t]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register


def check(x, weight, bias) -> None:
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear: weight must be [N, K] for x [..., K], not {list(weight.shape)} for {list(x.shape)}")
    if not x.is_floating_point() or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"linear: x and weight must be float tensors of one dtype and device, "
            f"not {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"linear: bias must be {x.dtype} [{weight.shape[0]}] on {x.device} as weight is, "
            f"not {bias.dtype} {list(bias.shape)} on {bias.device}"
        )


def reference(x, weight, bias) -> Tensor:
    """Plain torch: the library's product."""
    return F.linear(x, weight, bias)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., K] as rows whose numbers lie together, and the distance between them."""
    x = native.without_gaps(x) if x.dim() == 2 else x.contiguous().view(-1, x.shape[-1])
    return x, x.stride(0)


def _cpu_inference(x, weight, bias) -> Tensor:
    (rows, row), weight = _rows(x), weight.contiguous()
    out = memory.empty(x, (*x.shape[:-1], weight.shape[0]))
    bias = None if bias is None else bias.contiguous()
    sizes = (len(rows), weight.shape[1], weight.shape[0])
    addresses = (rows.data_ptr(), row, weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    native.cpu().linear_forward(*addresses, *sizes, out.data_ptr())
    return out


def _cpu_forward(x, weight, bias) -> tuple[Tensor, tuple]:
    return _cpu_inference(x, weight, bias), (x, weight)


def _cpu_backward(saved, grads, needs) -> tuple[Tensor | None, ...]:
    x, weight = saved
    (rows, row), weight, (d_y, d_row) = _rows(x), weight.contiguous(), _rows(grads[0])
    sizes = (len(rows), weight.shape[1], weight.shape[0])
    d_x = d_weight = d_bias = None
    if needs[0]:
        d_x = memory.empty(x, x.shape)
        native.cpu().linear_backward_input(d_y.data_ptr(), d_row, weight.data_ptr(), *sizes, d_x.data_ptr())
    if needs[1] or needs[2]:
        d_weight = memory.empty(weight, weight.shape) if len(rows) else torch.zeros_like(weight)
        d_bias = weight.new_zeros(sizes[2]) if needs[2] else None
        native.cpu().linear_backward_weight(
            d_y.data_ptr(),
            d_row,
            rows.data_ptr(),
            row,
            *sizes,
            d_weight.data_ptr(),
            d_bias.data_ptr() if needs[2] else 0,
        )
    return d_x, d_weight, d_bias


def _case(size: str, shape: tuple[int, ...], outputs: int, with_bias: bool) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        width = shape[-1]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64) * width**-0.5
        bias = torch.randn(outputs, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.to(device, dtype), weight.to(device, dtype), bias if with_bias else None

    return Case(f"{'x'.join(map(str, shape))} to {outputs}{' bias' if with_bias else ''}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", (3, 16), 8, False),
        _case("tiny", (5, 24), 10, True),
        _case("ragged", (1, 301), 53, True),  # each way of the forward: few rows, some, many
        _case("ragged", (2, 5, 77), 131, False),
        _case("ragged", (37, 259), 70, True),
        _case("ragged", (257, 65), 33, True),
        _case("model", (64, 512), 2048, False),
        _case("model", (2048, 512), 1536, True),
    ]


def invalid() -> list[tuple[str, tuple]]:
    x, weight = torch.ones(3, 8), torch.ones(5, 8)
    return [
        ("a weight of another width", (x, torch.ones(5, 4), None)),
        ("a weight of one dimension", (x, torch.ones(8), None)),
        ("integers", (x.long(), weight.long(), None)),
        ("two dtypes", (x, weight.double(), None)),
        ("a bias of another length", (x, weight, torch.ones(8))),
    ]


def _bytes(x, weight, bias) -> int:
    return x.element_size() * (x.numel() + weight.numel() + x.numel() // x.shape[-1] * weight.shape[0])


OP = register(
    Op(
        name="linear",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(
                _cpu_forward,
                _cpu_backward,
                _cpu_inference,
                unavailable=native.cpu_unavailable,
                supports=native.only_float32,
            )
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1, 2),
        tolerances={
            torch.float32: Tolerance(2e-6, 1e-5, "sums of up to 512 products of order 1/sqrt(512), in chains of 256"),
            torch.bfloat16: Tolerance(2**-7, 2**-8, "summed in fp32 and rounded once to 8 bits"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(1e-5, 5e-4, "the gradients of weight and bias sum up to 2k rows of order one"),
            torch.bfloat16: Tolerance(2**-6, 2**-2, "sums of up to 257 terms, each of them itself rounded to 8 bits"),
        },
        flops=lambda x, weight, bias: 2 * x.numel() * weight.shape[0],
        bytes=_bytes,
    )
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x weight^T + bias.

    x: float [..., K]. weight: float [N, K], x's dtype. bias: float [N] or None.
    Returns [..., N] in x's dtype. Differentiable in all three. Backend `cpu` gives a row the same bits in every batch.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    return OP(x, weight, bias, backend=backend)
