"""From the fused projection of q, k and v to what attention takes, in one pass: what a layer of training does.

    q[t], k[t] = rope(x[t, : Hq]), rope(x[t, Hq : Hq + Hkv])       each head normalised before, where q_norm and k_norm
    v[t] = x[t, Hq + Hkv :]                                        are given (Qwen3); v is a view of x

It is rms_norm of q's and of k's heads and rope in turn, their roundings included. Apart, those are four passes over
q and k forward and five backward, and the gradients of q, k and v are laid together by two more; here two, and three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.rms_norm import reference as reference_norm
from r1fast_kernels.rms_norm import rms_norm
from r1fast_kernels.rope import check as check_rope
from r1fast_kernels.rope import reference as reference_rope
from r1fast_kernels.rope import rope


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the heads of q, k and v."""
    kv_heads = (qkv.shape[1] - heads) // 2
    return qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)


def check(qkv, heads, cos, sin, positions, q_norm, k_norm, eps) -> None:
    if qkv.dim() != 3 or not 0 < heads < qkv.shape[1] or (qkv.shape[1] - heads) % 2:
        raise ValueError(
            f"qkv_rope: qkv must be [T, Hq + 2 Hkv, D] with Hq of {heads} and a head of k and v at least, "
            f"not {list(qkv.shape)}"
        )
    q, k, _ = split(qkv, heads)
    check_rope(q, k, cos, sin, positions, "qkv_rope")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("qkv_rope: q_norm and k_norm go together; give both or neither")
    for norm in () if q_norm is None else (q_norm, k_norm):
        if norm.shape != qkv.shape[2:] or norm.dtype != qkv.dtype or norm.device != qkv.device:
            raise ValueError(
                f"qkv_rope: q_norm and k_norm must be {qkv.dtype} [{qkv.shape[2]}] on {qkv.device} as qkv is, "
                f"not {norm.dtype} {list(norm.shape)} on {norm.device}"
            )
        if not eps > 0:
            raise ValueError(f"qkv_rope: eps must be > 0, not {eps}")


def reference(qkv, heads, cos, sin, positions, q_norm, k_norm, eps) -> tuple[Tensor, Tensor, Tensor]:
    """The references in turn."""
    q, k, v = split(qkv, heads)
    if q_norm is not None:
        q, k = reference_norm(q, q_norm, eps, None), reference_norm(k, k_norm, eps, None)
    try:
        return *reference_rope(q, k, cos, sin, positions), v
    except ValueError as error:
        raise ValueError(str(error).replace("rope:", "qkv_rope:")) from None


def by_ops(qkv, heads, cos, sin, positions, q_norm, k_norm, eps, backend=None) -> tuple[Tensor, Tensor, Tensor]:
    """The ops in turn, each by its own backend: what serves on a GPU."""
    q, k, v = split(qkv, heads)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps, backend=backend), rms_norm(k, k_norm, eps, backend=backend)
    return *rope(q, k, cos, sin, positions, backend=backend), v


LARGEST_HEAD = 1024  # of the C++ backend, which normalises a head on its stack


def _cpu_supports(qkv, heads, cos, sin, *_) -> str | None:
    if qkv.shape[2] > LARGEST_HEAD:
        return f"a head of {qkv.shape[2]} is wider than {LARGEST_HEAD}"
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return f"it reads float32 tables, and these are {cos.dtype} and {sin.dtype}"
    return native.only_float32(qkv)


def _place(qkv, heads, cos, sin, positions, q_norm, k_norm, eps) -> tuple:
    """What both native functions take first; the tensors must outlive the call, so they come contiguous."""
    norms = (0, 0) if q_norm is None else (q_norm.data_ptr(), k_norm.data_ptr())
    sizes = (qkv.shape[0], heads, (qkv.shape[1] - heads) // 2, qkv.shape[2] // 2)
    tables = (cos.data_ptr(), sin.data_ptr(), cos.shape[0], positions.data_ptr())
    return qkv.data_ptr(), qkv.stride(0), *tables, *norms, eps, *sizes


def _cpu_forward(qkv, heads, cos, sin, positions, q_norm, k_norm, eps) -> tuple[tuple[Tensor, Tensor, Tensor], tuple]:
    rows = native.packed_heads(qkv)
    tables = (x.contiguous() for x in (cos, sin, positions))
    norms = (None, None) if q_norm is None else (q_norm.contiguous(), k_norm.contiguous())
    saved = (rows, heads, *tables, *norms, eps)
    q, k, v = split(qkv, heads)
    q_out, k_out = memory.empty(qkv, q.shape), memory.empty(qkv, k.shape)
    native.cpu().qkv_rope_forward(*_place(*saved), q_out.data_ptr(), k_out.data_ptr())
    return (q_out, k_out, v), saved


def _cpu_backward(saved, grads, needs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    qkv, q_norm, k_norm = saved[0], saved[5], saved[6]
    d_q, d_k, d_v = (native.without_gaps(grad) for grad in grads)
    d_qkv = memory.empty(qkv, qkv.shape)
    d_norms = (None, None) if q_norm is None else (q_norm.new_empty(q_norm.shape), k_norm.new_empty(k_norm.shape))
    native.cpu().qkv_rope_backward(
        *_place(*saved), *native.place(d_q), *native.place(d_k), *native.place(d_v), d_qkv.data_ptr(),
        *(0 if x is None else x.data_ptr() for x in d_norms),
    )  # fmt: skip
    return d_qkv, *d_norms


def _case(size: str, rows: int, heads: tuple[int, int, int], norm: bool) -> Case:
    q_heads, kv_heads, width = heads

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(rows, q_heads + 2 * kv_heads, width, generator=generator, dtype=torch.float64)
        frequency = 1000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
        angle = torch.arange(300, dtype=torch.float64)[:, None] * frequency
        positions = torch.randint(0, 300, (rows,), generator=generator).to(device)
        norms = [None, None]
        if norm:
            norms = (1 + 0.2 * torch.randn(2, width, generator=generator, dtype=torch.float64)).to(device, dtype)
        tables = (angle.cos().float().to(device), angle.sin().float().to(device))
        return qkv.to(device, dtype), q_heads, *tables, positions, *norms, 1e-6

    return Case(f"{rows} rows {q_heads}+{kv_heads} heads of {width}{' normalised' if norm else ''}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 5, (4, 2, 16), False),
        _case("tiny", 3, (4, 2, 32), True),
        _case("ragged", 71, (3, 1, 26), True),
        _case("ragged", 1, (7, 7, 80), False),
        _case("ragged", 9, (2, 2, 256), True),
        _case("model", 1280, (4, 2, 64), True),
        _case("model", 2048, (12, 2, 128), False),
    ]


def invalid() -> list[tuple[str, tuple]]:
    qkv, table, rows, norm = torch.ones(3, 8, 8), torch.ones(5, 4), torch.arange(3), torch.ones(8)
    tables, plain = (table, table, rows), (None, None, 1e-6)
    return [
        ("an odd head", (qkv[..., :7], 4, *tables, *plain)),
        ("heads that leave a k without its v", (qkv, 5, *tables, *plain)),
        ("no head of k", (qkv, 8, *tables, *plain)),
        ("int32 positions", (qkv, 4, table, table, rows.int(), *plain)),
        ("a position past the tables", (qkv, 4, table, table, rows + 3, *plain)),
        ("one norm of two", (qkv, 4, *tables, norm, None, 1e-6)),
        ("a norm of half a head", (qkv, 4, *tables, norm[:4], norm[:4], 1e-6)),
        ("an eps of zero", (qkv, 4, *tables, norm, norm, 0.0)),
    ]


OP = register(
    Op(
        name="qkv_rope",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, _cpu_backward, unavailable=native.cpu_unavailable, supports=_cpu_supports)
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 5, 6),
        outputs_with_gradient=(0, 1, 2),
        tolerances={
            torch.float32: Tolerance(2e-6, 4e-6, "a few float32 roundings of numbers up to 4"),
            torch.bfloat16: Tolerance(2**-7, 2**-6, "the norm and the rotation are each rounded to 8 bits"),
            torch.float16: Tolerance(2**-10, 2**-9, "the norm and the rotation are each rounded to 11 bits"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(2e-5, 1e-4, "the norms' gradients sum up to 5k heads of order one"),
            torch.bfloat16: Tolerance(2**-6, 2**-4, "gradients are rounded to 8 bits between norm and rotation"),
            torch.float16: Tolerance(2**-9, 2**-7, "gradients are rounded to 11 bits between norm and rotation"),
        },
        flops=lambda qkv, heads, cos, sin, positions, q_norm, *_: (
            (3 if q_norm is None else 7) * (qkv.shape[1] + heads) // 2 * qkv.shape[0] * qkv.shape[2]
        ),
        bytes=lambda qkv, heads, cos, *_: (
            qkv.shape[0] * ((qkv.shape[1] + heads) * qkv.shape[2] * qkv.element_size() + 8 + 8 * cos.shape[1])
        ),
    )
)


def qkv_rope(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised and rotated by the angle of each row's position, and values, of a fused projection.

    qkv: float [T, Hq + 2 Hkv, D], the heads of q, then of k, then of v. heads: Hq. cos, sin: float32 [P, D/2].
    positions: int64 [T], in [0, P). q_norm, k_norm: float [D] in qkv's dtype, weights of the RMSNorm of each head
    before the rotation, or both None; eps: of that norm.
    Returns (q [T, Hq, D], k and v [T, Hkv, D]) in qkv's dtype; v is a view of qkv. Differentiable in qkv and the norms.
    On a GPU it is rms_norm's and rope's kernels in turn.
    Raises ValueError on shapes, dtypes or devices that do not fit, or a position outside the tables.
    """
    if qkv.is_cpu or backend == "reference":
        return OP(qkv, heads, cos, sin, positions, q_norm, k_norm, eps, backend=backend)
    check(qkv, heads, cos, sin, positions, q_norm, k_norm, eps)
    return by_ops(qkv, heads, cos, sin, positions, q_norm, k_norm, eps, backend)
