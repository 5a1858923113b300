"""Causal attention within each sequence of a packed batch: training, prefill, and scoring without padding.

    out[t, h] = sum_{u <= t, same sequence} softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)

Sequences lie end to end; `cu_seqlens` says where each begins (Dao 2023, the varlen form; GQA: Ainslie et al. 2023).
The kernels of libraries, which serve on a GPU, are bound in varlen_attention_library.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels import varlen_attention_library as library
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register


def check(q, k, v, cu_seqlens, max_seqlen, scale) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"varlen_attention: q must be [T, Hq, D], k and v [T, Hkv, D], "
            f"not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"varlen_attention: {q.shape[1]} query heads do not divide over {k.shape[1]} key heads")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"varlen_attention: q, k and v must be of one float dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"varlen_attention: cu_seqlens must be int32 [B+1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if k.device != q.device or v.device != q.device or cu_seqlens.device != q.device:
        raise ValueError("varlen_attention: q, k, v and cu_seqlens must live on one device")


class Padding(NamedTuple):
    """How sequences are put into buckets."""

    waste: int  # score elements (heads * length^2) that padding may waste before a bucket is closed
    multiple: int  # widths of buckets are rounded up to one of it


# A bucket more costs a CPU about 0.3 ms of dispatch. Measured forward and backward on one Zen 5 core, 4 + 2 heads of
# 16: 256 tokens of 8 sequences want one bucket (0.5 ms; three: 0.8), 15k tokens in sequences of 20 to 80 want five or
# six (38 ms; one: 51, twenty: 46). A GPU makes 10^3 times as many scores in that time (not measured), and its libraries
# plan anew for every width.
PADDING = {"cpu": Padding(100_000, 1), "cuda": Padding(30_000_000, 128)}


class Plan(NamedTuple):
    """Sequences in buckets of similar length, each padded on the right to its longest."""

    buckets: tuple[tuple[int, int], ...]  # (sequences, longest) of each
    source: Tensor  # int64 [padded places]: the row of the pack that lies there; any row where padding does
    place: Tensor  # int64 [T]: the padded place of each row of the pack
    longest: int


def plan(cu_seqlens: Tensor, rows: int, heads: int, padding: Padding) -> Plan:
    """Sort sequences by length and close a bucket when its padding wastes more than one bucket costs."""
    ends = cu_seqlens.long()
    lengths, order = (ends[1:] - ends[:-1]).sort(descending=True, stable=True)
    starts = ends[:-1][order]
    listed = lengths.tolist()
    if not listed or listed[-1] < 0 or int(ends[0]) != 0 or sum(listed) != rows:
        raise ValueError(f"varlen_attention: cu_seqlens must ascend from 0 to {rows}, the rows of q")
    edges, waste = [0], 0
    for i, n in enumerate(listed):
        waste += heads * (listed[edges[-1]] ** 2 - n**2)
        if waste > padding.waste:
            edges.append(i)
            waste = 0
    edges.append(len(listed))
    buckets, sources, held = [], [], []
    for a, b in pairwise(edges):
        width = -(-listed[a] // padding.multiple) * padding.multiple
        offset = torch.arange(width, device=ends.device)
        valid = offset < lengths[a:b, None]
        buckets.append((b - a, width))
        sources.append(torch.where(valid, starts[a:b, None] + offset, starts[a:b, None]).view(-1))
        held.append(valid.view(-1))
    source, held = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (sources, held))
    filled = held.nonzero().squeeze(1)
    place = torch.empty_like(filled).index_copy_(0, source.index_select(0, filled), filled)
    return Plan(tuple(buckets), source.clamp(max=rows - 1), place, listed[0])


# The layers of a model attend over the same pack: the last plan is kept with the very tensor it was made from (0.3 ms).
_last: tuple = (None, None, None)


def _plan_of(cu_seqlens: Tensor, rows: int, heads: int) -> Plan:
    global _last
    key = (rows, heads, cu_seqlens._version)
    last = _last
    if last[0] is not cu_seqlens or last[1] != key:
        padding = PADDING["cuda" if cu_seqlens.is_cuda else "cpu"]
        _last = last = (cu_seqlens, key, plan(cu_seqlens, rows, heads, padding))
    return last[2]


def reference(q, k, v, cu_seqlens, max_seqlen, scale) -> Tensor:
    """Gather the pack into padded buckets and call torch's causal attention on each.

    No mask is needed: a causal row never sees what is after it, and padded rows are not read back. Against products and
    a softmax written out, torch's attention took 36 ms to 44 (16.8k tokens, forward and backward, one core).
    """
    if not q.shape[0]:
        return q * 0
    buckets, source, place, longest = _plan_of(cu_seqlens, q.shape[0], q.shape[1])
    if longest > max_seqlen:
        raise ValueError(f"varlen_attention: max_seqlen is {max_seqlen}, but a sequence has {longest} tokens")
    padded = [x.index_select(0, source) for x in (q, k, v)]
    grouped = q.shape[1] != k.shape[1]
    results, start = [], 0
    for count, width in buckets:
        stop = start + count * width
        one = (x[start:stop].view(count, width, *x.shape[1:]).transpose(1, 2) for x in padded)
        out = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=grouped)
        results.append(out.transpose(1, 2).reshape(stop - start, *q.shape[1:]))
        start = stop
    return (torch.cat(results) if len(results) > 1 else results[0]).index_select(0, place)


LARGEST_HEAD = 256  # of the C++ backend


def cpu_supports(q, k, v, cu_seqlens, max_seqlen, scale) -> str | None:
    if q.shape[2] > LARGEST_HEAD:
        return f"a head of {q.shape[2]} is wider than {LARGEST_HEAD}"
    if scale is not None and not scale > 0:
        return f"a scale of {scale} is not positive"
    return native.only_float32(q)


def _cpu_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[Tensor, tuple]:
    """Forward and backward on one AVX-512 core, the reference's time first: 256 tokens in 8 sequences 0.46 and 0.25 ms,
    15k in 256 36 and 14 ms (4+2 heads of 16), 8k in 64 138 and 66 ms (8+4 of 64), 4k in 4 875 and 596 ms (12+2 of 128).
    """
    return cpu_forward(q, k, v, cu_seqlens, max_seqlen, scale)


def cpu_forward(q, k, v, cu_seqlens, max_seqlen, scale, cu_groups: Tensor | None = None) -> tuple[Tensor, tuple]:
    """`cu_groups`: prefix_attention's, which the same C++ serves."""
    q, k, v = native.without_gaps(q), native.without_gaps(k), native.without_gaps(v)
    cu_seqlens = cu_seqlens.contiguous()
    rows, heads, width = q.shape
    out, softmax = memory.empty(q, q.shape), memory.empty(q, (rows, heads, 2))  # of each row: maximum, 1 / sum
    sizes = (heads, k.shape[1], width, width**-0.5 if scale is None else scale)
    ends = (cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1)
    native.cpu().attention_forward(
        *native.place(q), *native.place(k), *native.place(v), *ends, *_groups(cu_seqlens, cu_groups), rows, max_seqlen,
        *sizes, out.data_ptr(), softmax.data_ptr(),
    )  # fmt: skip
    return out, (q, k, v, cu_seqlens, cu_groups, out, softmax, sizes)


def _groups(cu_seqlens: Tensor, cu_groups: Tensor | None) -> tuple[int, int]:
    """Address and number of the groups; without any, each sequence is one."""
    return (0, cu_seqlens.shape[0] - 1) if cu_groups is None else (cu_groups.data_ptr(), cu_groups.shape[0] - 1)


def cpu_backward(saved, grads, needs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens, cu_groups, out, softmax, sizes = saved
    d_out = native.without_gaps(grads[0])
    d_q, d_k, d_v = (memory.empty(x, x.shape) for x in (q, k, v))
    native.cpu().attention_backward(
        *native.place(q), *native.place(k), *native.place(v), *native.place(d_out), cu_seqlens.data_ptr(),
        *_groups(cu_seqlens, cu_groups), *sizes, *(x.data_ptr() for x in (out, softmax, d_q, d_k, d_v)),
    )  # fmt: skip
    return d_q, d_k, d_v


def _by_library(attend, unavailable, deterministic_flag: bool = False, **fields) -> Backend:
    forward, backward = library.by_autograd(attend, deterministic_flag)
    fields.setdefault("supports", library.half_precision)
    return Backend(forward, backward, inference=attend, unavailable=unavailable, **fields)


def _case(size: str, lengths: list[int], heads: int, kv_heads: int, width: int, scale: float | None = None) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, width, generator=generator).to(device, dtype)
        q, k, v = (x.contiguous() for x in qkv.split([heads, kv_heads, kv_heads], 1))
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return q, k, v, ends.to(device), max(lengths), scale

    return Case(f"{len(lengths)} sequences of up to {max(lengths)} {heads}+{kv_heads} heads of {width}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", [5, 9, 1, 12], 4, 2, 16),
        _case("ragged", [1, 0, 130, 17, 64, 3, 250], 6, 2, 24, 0.3),
        _case("ragged", [33, 32, 31], 3, 3, 40),
        _case("model", [40 + i % 21 for i in range(300)], 4, 2, 16),
        _case("model", [1024] * 4, 12, 2, 128),
    ]


def invalid() -> list[tuple[str, tuple]]:
    q, k, ends = torch.ones(6, 4, 8), torch.ones(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    return [
        ("heads that do not divide", (q[:, :3], k, k, ends, 4, None)),
        ("other rows in k", (q, k[:5], k[:5], ends, 4, None)),
        ("two dtypes", (q, k.double(), k.double(), ends, 4, None)),
        ("int64 cu_seqlens", (q, k, k, ends.long(), 4, None)),
        ("cu_seqlens that end early", (q, k, k, ends - ends // 6, 4, None)),
        ("cu_seqlens that descend", (q, k, k, ends[[0, 2, 1, 2]], 6, None)),
        ("a max_seqlen that is too small", (q, k, k, ends, 3, None)),
    ]


def _flops(q, k, v, cu_seqlens, *_) -> int:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return int((lengths * (lengths + 1) // 2).sum()) * 4 * q.shape[1] * q.shape[2]


OP = register(
    Op(
        name="varlen_attention",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, cpu_backward, unavailable=native.cpu_unavailable, supports=cpu_supports),
            "flash": _by_library(library.flash, library.flash_unavailable),
            "torch": _by_library(library.packed, library.torch_unavailable, deterministic_flag=True),
            "cudnn": _by_library(
                library.by_cudnn(reference),
                library.cudnn_unavailable,
                supports=library.cudnn_supports,
                deterministic=False,
            ),
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1, 2),
        tolerances={
            torch.float32: Tolerance(1e-5, 2e-6, "float32 products over D and an average over up to 1k values"),
            torch.bfloat16: Tolerance(2**-7, 2**-6, "probabilities are rounded to 8 bits before they meet v"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(2e-5, 2e-5, "the gradient of a key sums over up to 1k queries"),
            torch.bfloat16: Tolerance(2**-5, 2**-4, "as forward, and ds is rounded to 8 bits before its products"),
        },
        flops=_flops,
        bytes=lambda q, k, *_: 2 * (q.numel() + k.numel()) * q.element_size(),
    )
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal self-attention of packed sequences.

    q: float [T, Hq, D]. k, v: float [T, Hkv, D], Hkv divides Hq. cu_seqlens: int32 [B+1], from 0 to T, ascending.
    max_seqlen: at least the longest sequence. scale: D ** -0.5 where None.
    Returns [T, Hq, D] in q's dtype. Differentiable in q, k and v.
    Raises ValueError on shapes, dtypes or devices that do not fit, or cu_seqlens that do not cover the rows.
    """
    return OP(q, k, v, cu_seqlens, max_seqlen, scale, backend=backend)
