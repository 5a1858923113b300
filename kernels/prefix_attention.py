"""Causal attention of groups of sequences behind a shared first one: a prompt's samples, the prompt held once.

    out[t, h] = sum_u softmax_u(scale * q[t, h] . k[u, g(h)]) v[u, g(h)],   g(h) = h // (Hq / Hkv)
    u over: all rows of the group's first sequence, and the rows u <= t of t's own sequence

It is varlen_attention of prompt and completion end to end, for each completion of the group, without the prompt's
copies: forwarded once, its keys and values serve all, and their gradient is the sum over all. (The cascade of
FlashInfer and Hydragen, arXiv 2402.05099, is this for decoding; Prefix Grouper, arXiv 2506.05433, for training.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.varlen_attention import check as check_pack
from r1fast_kernels.varlen_attention import cpu_backward, cpu_forward, cpu_supports, varlen_attention
from r1fast_kernels.varlen_attention import reference as attend_by_reference


def check(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale) -> None:
    try:
        check_pack(q, k, v, cu_seqlens, max_seqlen, scale)
    except ValueError as error:
        raise ValueError(str(error).replace("varlen_attention", "prefix_attention")) from None
    if cu_groups.dim() != 1 or cu_groups.shape[0] == 0 or cu_groups.dtype != torch.int32:
        raise ValueError(
            f"prefix_attention: cu_groups must be int32 [G+1], not {cu_groups.dtype} {list(cu_groups.shape)}"
        )
    if cu_groups.device != q.device:
        raise ValueError("prefix_attention: q and cu_groups must live on one device")


class Unshared(NamedTuple):
    """The same attention as ordinary sequences: what to copy together, and what to keep of the result."""

    rows: Tensor  # int64 [T']: the row of the pack that lies there
    cu_seqlens: Tensor  # int32 [B+1] of the T' rows
    kept: Tensor  # int64 [T]: where each row's result is
    longest: int  # of those sequences
    longest_own: int  # without what they are behind


def unshare(cu_seqlens: Tensor, cu_groups: Tensor, rows: int) -> Unshared:
    """Every sequence with its group's first one before it, the first ones by themselves. Reads the host."""
    ends, groups = cu_seqlens.cpu().long(), cu_groups.cpu().long()
    lengths, sizes = ends.diff(), groups.diff()
    if int(ends[0]) or int(ends[-1]) != rows or (lengths < 0).any():
        raise ValueError(f"prefix_attention: cu_seqlens must ascend from 0 to {rows}, the rows of q")
    if int(groups[0]) or int(groups[-1]) != len(lengths) or (sizes < 1).any():
        raise ValueError(
            f"prefix_attention: cu_groups must rise from 0 to {len(lengths)}, the sequences of cu_seqlens, by at "
            f"least 1"
        )
    first = groups[:-1].repeat_interleave(sizes)  # of each sequence, the first of its group
    behind = torch.arange(len(lengths)) != first
    before = torch.where(behind, lengths[first], 0)
    pieces = torch.stack([before, lengths], 1).view(-1)  # the prefix's copy, then the sequence
    starts = torch.stack([ends[first], ends[:-1]], 1).view(-1)
    stops = pieces.cumsum(0)
    offset = torch.arange(int(pieces.sum())) - (stops - pieces).repeat_interleave(pieces)
    taken = starts.repeat_interleave(pieces) + offset
    own = torch.tensor([False, True]).repeat(len(lengths)).repeat_interleave(pieces)
    whole = torch.cat([stops.new_zeros(1), stops[1::2]]).int()
    found = (taken, whole, own.nonzero().squeeze(1))
    return Unshared(*(x.to(cu_seqlens.device) for x in found), int((before + lengths).max()), int(lengths.max()))


# The layers of a model attend over the same pack: the last one is kept with the very tensors it was made from.
_last: tuple = (None, None, None, None)


def _unshared(cu_seqlens: Tensor, cu_groups: Tensor, rows: int) -> Unshared:
    global _last
    key = (rows, cu_seqlens._version, cu_groups._version)
    if _last[0] is not cu_seqlens or _last[1] is not cu_groups or _last[2] != key:
        _last = (cu_seqlens, cu_groups, key, unshare(cu_seqlens, cu_groups, rows))
    return _last[3]


def _by_copies(attend, q, k, v, cu_seqlens, cu_groups, max_seqlen, scale) -> Tensor:
    """`attend` is a varlen attention; the gradients of the copies are summed by autograd."""
    if not q.shape[0]:
        return q * 0
    plan = _unshared(cu_seqlens, cu_groups, q.shape[0])
    if plan.longest_own > max_seqlen:
        raise ValueError(f"prefix_attention: max_seqlen is {max_seqlen}, but a sequence has {plan.longest_own} tokens")
    copies = (x.index_select(0, plan.rows) for x in (q, k, v))
    return attend(*copies, plan.cu_seqlens, plan.longest, scale).index_select(0, plan.kept)


def reference(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale) -> Tensor:
    """varlen_attention's, of prompt and completion end to end."""
    return _by_copies(attend_by_reference, q, k, v, cu_seqlens, cu_groups, max_seqlen, scale)


def _cpu_supports(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale) -> str | None:
    return cpu_supports(q, k, v, cu_seqlens, max_seqlen, scale)


def _cpu_forward(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale) -> tuple[Tensor, tuple]:
    """csrc/cpu/varlen_attention.cpp: a task is a whole group, which turns the prompt's keys once for all."""
    groups = cu_groups.contiguous()
    try:
        return cpu_forward(q, k, v, cu_seqlens, max_seqlen, scale, groups)
    except ValueError as error:
        raise ValueError(str(error).replace("varlen_attention", "prefix_attention")) from None


def _case(size: str, groups: list[list[int]], heads: int, kv_heads: int, width: int, scale=None) -> Case:
    lengths = [length for group in groups for length in group]

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, width, generator=generator).to(device, dtype)
        q, k, v = (x.contiguous() for x in qkv.split([heads, kv_heads, kv_heads], 1))
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        members = torch.tensor([0, *map(len, groups)]).cumsum(0).int().to(device)
        return q, k, v, ends, members, max(lengths), scale

    name = f"{len(groups)} groups, {len(lengths)} sequences of up to {max(lengths)} {heads}+{kv_heads} heads of {width}"
    return Case(name, size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", [[5, 9, 1, 12], [3, 4]], 4, 2, 16),
        _case("ragged", [[1, 130, 0, 17], [64], [250, 3, 40, 131], [0, 5], [129, 128, 2]], 6, 2, 24, 0.3),
        _case("ragged", [[33, 32, 31], [7, 7]], 3, 3, 40),
        _case("model", [[33, *[127] * 8]] * 8, 8, 4, 64),
        _case("model", [[512, *[127] * 16]] * 2, 8, 4, 64),
    ]


def invalid() -> list[tuple[str, tuple]]:
    q, k, ends = torch.ones(6, 4, 8), torch.ones(6, 2, 8), torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    groups = torch.tensor([0, 2, 3], dtype=torch.int32)
    return [
        ("heads that do not divide", (q[:, :3], k, k, ends, groups, 4, None)),
        ("int64 cu_groups", (q, k, k, ends, groups.long(), 4, None)),
        ("cu_groups that end early", (q, k, k, ends, groups[:2], 4, None)),
        ("an empty group", (q, k, k, ends, groups[[0, 1, 1, 2]], 4, None)),
        ("cu_seqlens that end early", (q, k, k, ends - ends // 6, groups, 4, None)),
        ("a max_seqlen that is too small", (q, k, k, ends, groups, 2, None)),
    ]


def _flops(q, k, v, cu_seqlens, cu_groups, *_) -> int:
    lengths, groups = cu_seqlens.diff().long(), cu_groups.long()
    first = groups[:-1].repeat_interleave(groups.diff())
    before = torch.where(torch.arange(len(lengths), device=first.device) != first, lengths[first], 0)
    return int((lengths * (lengths + 1) // 2 + lengths * before).sum()) * 4 * q.shape[1] * q.shape[2]


OP = register(
    Op(
        name="prefix_attention",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(
                _cpu_forward,
                cpu_backward,
                unavailable=native.cpu_unavailable,
                supports=_cpu_supports,
            )
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1, 2),
        tolerances={
            torch.float32: Tolerance(1e-5, 2e-6, "float32 products over D and an average over up to 1k values"),
            torch.bfloat16: Tolerance(2**-7, 2**-6, "probabilities are rounded to 8 bits before they meet v"),
        },
        gradient_tolerances={
            torch.float32: Tolerance(2e-5, 2e-5, "the gradient of a prompt's key sums over up to 2k queries"),
            torch.bfloat16: Tolerance(
                2**-5, 2**-3, "ds is rounded to 8 bits before its products, and each sample's share of a prompt's sum"
            ),
        },
        flops=_flops,
        bytes=lambda q, k, *_: 2 * (q.numel() + k.numel()) * q.element_size(),
    )
)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of packed sequences, those of a group behind its first one.

    q: float [T, Hq, D]. k, v: float [T, Hkv, D], Hkv divides Hq. cu_seqlens: int32 [B+1], from 0 to T, ascending.
    cu_groups: int32 [G+1], from 0 to B, rising: group g is sequences cu_groups[g] to cu_groups[g+1] - 1, and each of
    them but the first sees all of the first, then itself causally. A group of one is a sequence by itself.
    max_seqlen: at least the longest sequence, without what it is behind. scale: D ** -0.5 where None.
    Returns [T, Hq, D] in q's dtype. Differentiable in q, k and v.
    On a GPU each sequence gets a copy of its prefix's keys, and varlen_attention's kernels do the rest: what sharing
    saves is everything but attention.
    Raises ValueError on shapes, dtypes or devices that do not fit, or offsets that do not cover rows or sequences.
    """
    if q.is_cpu or backend == "reference":
        return OP(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale, backend=backend)
    check(q, k, v, cu_seqlens, cu_groups, max_seqlen, scale)

    def attend(q, k, v, cu_seqlens, max_seqlen, scale):
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, backend=backend)

    return _by_copies(attend, q, k, v, cu_seqlens, cu_groups, max_seqlen, scale)
