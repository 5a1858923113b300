"""The group-relative advantage of GRPO, one number a completion.

    A_i = (r_i - mean(group)) / (std(group) + eps)      with normalize_std
    A_i =  r_i - mean(group)                            without (Dr. GRPO, arXiv 2503.20783)

DeepSeekMath (arXiv 2402.03300) section 4.1.2. `std` is the sample standard deviation (ddof = 1), which is what
torch.std computes and TRL trains with. A group whose rewards are all equal has advantages of exactly zero: that is
judged by comparing the rewards, since rounding in mean and std would leave 1e-3 of noise to train on.

Groups are either equal runs of `group_size` rows, or named by `group_ids`: rows with equal ids form a group, wherever
they stand. Sums are taken in double: rewards are few, and a large common offset must cost no digits.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check(rewards, group_size, group_ids, normalize_std, eps) -> None:
    if not isinstance(rewards, Tensor) or rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError("group_advantage: rewards must be a float tensor [N]")
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_advantage: give either group_size or group_ids")
    if not eps >= 0:
        raise ValueError(f"group_advantage: eps must be >= 0, not {eps}")
    if group_size is not None:
        if group_size < 1 or rewards.shape[0] % group_size:
            raise ValueError(
                f"group_advantage: {rewards.shape[0]} rewards do not divide into groups of {group_size}; "
                "for unequal groups give group_ids"
            )
    elif group_ids.shape != rewards.shape or group_ids.dtype != torch.int64 or group_ids.device != rewards.device:
        raise ValueError(
            f"group_advantage: group_ids must be int64 {list(rewards.shape)} on {rewards.device}, "
            f"not {group_ids.dtype} {list(group_ids.shape)} on {group_ids.device}"
        )


def reference(rewards, group_size, group_ids, normalize_std, eps) -> Tensor:
    """Plain torch: float64 sums, the result in float32 (float64 for float64 rewards)."""
    r = rewards.detach().double()
    if group_ids is None:
        index = torch.arange(r.shape[0], device=r.device) // group_size
        groups = r.shape[0] // group_size
    else:
        names, index = torch.unique(group_ids, return_inverse=True)
        groups = names.shape[0]

    def total(values: Tensor) -> Tensor:
        return r.new_zeros(groups).index_add_(0, index, values)[index]

    def extreme(kind: str) -> Tensor:
        return r.new_zeros(groups).scatter_reduce_(0, index, r, kind, include_self=False)[index]

    count = total(torch.ones_like(r))
    centred = r - total(r) / count
    if normalize_std:
        std = (total(centred.square()) / (count - 1)).sqrt()
        centred = centred / (std + eps)
    equal = extreme("amax") == extreme("amin")
    return torch.where(equal, 0.0, centred).to(torch.promote_types(rewards.dtype, torch.float32))


@jit
def _equal_groups(
    rewards, out, groups, group_size, eps, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS groups a program, COLUMNS >= group_size."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = (row < groups)[:, None] & (column < group_size)[None, :]
    place = row[:, None] * group_size + column[None, :]
    r = tl.load(rewards + place, mask=live, other=0.0)
    first = tl.load(rewards + row * group_size, mask=row < groups, other=0.0)
    varies = tl.sum((live & (r != first[:, None])).to(tl.int32), 1) > 0
    r = r.to(tl.float64)
    mean = tl.sum(tl.where(live, r, 0.0), 1) / group_size
    centred = r - mean[:, None]
    if NORMALIZE:
        squares = tl.sum(tl.where(live, centred * centred, 0.0), 1)
        std = tl.sqrt(squares / tl.maximum(group_size - 1, 1))
        centred = centred / (std[:, None] + eps)
    advantage = tl.where(varies[:, None], centred, 0.0)
    tl.store(out + place, advantage.to(tl.float32), mask=live)


@jit
def _groups_by_id(rewards, ids, out, count, eps, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows a program, each looking at every row for its group: quadratic, but one launch and no atomics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    own = tl.load(rewards + row, mask=row < count, other=0.0)
    own_id = tl.load(ids + row, mask=row < count, other=0)
    total = tl.zeros([ROWS], tl.float64)
    members = tl.zeros([ROWS], tl.float64)
    differing = tl.zeros([ROWS], tl.int32)
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        r = tl.load(rewards + column, mask=column < count, other=0.0)
        same = (own_id[:, None] == tl.load(ids + column, mask=column < count, other=0)[None, :]) & (column < count)[
            None, :
        ]
        total += tl.sum(tl.where(same, r[None, :].to(tl.float64), 0.0), 1)
        members += tl.sum(same.to(tl.float64), 1)
        differing += tl.sum((same & (r[None, :] != own[:, None])).to(tl.int32), 1)
    mean = total / tl.maximum(members, 1.0)
    centred = own.to(tl.float64) - mean
    if NORMALIZE:
        squares = tl.zeros([ROWS], tl.float64)
        for start in range(0, count, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            r = tl.load(rewards + column, mask=column < count, other=0.0)
            same = (own_id[:, None] == tl.load(ids + column, mask=column < count, other=0)[None, :]) & (column < count)[
                None, :
            ]
            deviation = tl.where(same, r[None, :].to(tl.float64) - mean[:, None], 0.0)
            squares += tl.sum(deviation * deviation, 1)
        centred = centred / (tl.sqrt(squares / tl.maximum(members - 1.0, 1.0)) + eps)
    advantage = tl.where(differing > 0, centred, 0.0)
    tl.store(out + row, advantage.to(tl.float32), mask=row < count)


LARGEST_TILE = 8192  # elements of one group that one Triton program holds
LARGEST_QUADRATIC = 65536  # rows that the GPU compares with one another: 4e9 comparisons, about a millisecond


def _only_float32(rewards, *_rest) -> str | None:
    return "rewards are float64, which only the reference keeps" if rewards.dtype == torch.float64 else None


def _gpu_limits(rewards, group_size, group_ids, *_rest) -> str | None:
    if group_ids is not None and rewards.shape[0] > LARGEST_QUADRATIC:
        return f"it compares all rows by id, and there are more than {LARGEST_QUADRATIC}"
    return _only_float32(rewards)


def _triton_supports(rewards, group_size, group_ids, *rest) -> str | None:
    if group_size is not None and group_size > LARGEST_TILE:
        return f"groups of more than {LARGEST_TILE}"
    return _gpu_limits(rewards, group_size, group_ids) or where_triton_runs(rewards, group_ids)


def _triton_forward(rewards, group_size, group_ids, normalize_std, eps) -> Tensor:
    r = rewards.float().contiguous()
    out = torch.empty_like(r)
    count = r.shape[0]
    if count and group_ids is None:
        columns = next_power_of_2(group_size)
        rows = max(1, 1024 // columns)
        grid = (-(-count // (group_size * rows)),)
        _equal_groups[grid](r, out, count // group_size, group_size, eps, bool(normalize_std), rows, columns)
    elif count:
        grid = (-(-count // 16),)
        _groups_by_id[grid](r, group_ids.contiguous(), out, count, eps, bool(normalize_std), 16, 64)
    return out


def _native_forward(run, rewards, group_size, group_ids, normalize_std, eps) -> Tensor:
    """`run(name, *arguments)` calls the native function of that name."""
    r = rewards.float().contiguous()
    out = torch.empty_like(r)
    if r.shape[0] == 0:
        return out
    if group_ids is None:
        sizes = (r.shape[0] // group_size, group_size)
        run("group_advantage", r.data_ptr(), out.data_ptr(), *sizes, bool(normalize_std), eps)
    else:
        ids = group_ids.contiguous()
        addresses = (r.data_ptr(), ids.data_ptr(), out.data_ptr())
        run("group_advantage_ids", *addresses, r.shape[0], bool(normalize_std), eps)
    return out


def _cpu_forward(*args) -> Tensor:
    return _native_forward(native.call_cpu, *args)


def _cuda_forward(*args) -> Tensor:
    return _native_forward(partial(native.launch, args[0].device), *args)


def _case(size: str, counts: list[int], equal: bool, normalize: bool = True) -> Case:
    """Groups of `counts` rows, or by shuffled ids; some groups do not vary, and one lies at a million."""

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        names = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        flat, far = names % 5 == 3, names == 1
        rewards = torch.randn(sum(counts), generator=generator, dtype=torch.float64)
        rewards = torch.where(flat, 0.3, rewards) + torch.where(far & (dtype != torch.float16), 1e6, 0.0)
        if equal:
            return rewards.to(device, dtype), counts[0], None, normalize, 1e-6
        order = torch.randperm(len(rewards), generator=generator)
        ids = (names * 7_000_000_007 - 3)[order]
        return rewards[order].to(device, dtype), None, ids.to(device), normalize, 1e-6

    return Case(
        f"{len(counts)} groups {'of ' + str(counts[0]) if equal else 'by id'}{'' if normalize else ' centred'}",
        size,
        make,
    )


def cases() -> list[Case]:
    return [
        _case("tiny", [4] * 3, equal=True),
        _case("ragged", [7] * 43, equal=True),
        _case("ragged", [1] * 5 + [300] + [2, 3, 17] * 9, equal=False),
        _case("ragged", [5] * 13, equal=True, normalize=False),
        _case("ragged", [3, 1, 9, 4], equal=False, normalize=False),
        _case("model", [16] * 512, equal=True),
        _case("model", [14, 16, 18] * 100, equal=False),
    ]


def invalid() -> list[tuple[str, tuple]]:
    r, ids = torch.rand(6), torch.zeros(6, dtype=torch.int64)
    return [
        ("two dimensions", (r.view(2, 3), 3, None, True, 1e-6)),
        ("integer rewards", (r.long(), 3, None, True, 1e-6)),
        ("a size that does not divide", (r, 4, None, True, 1e-6)),
        ("a size of zero", (r, 0, None, True, 1e-6)),
        ("neither size nor ids", (r, None, None, True, 1e-6)),
        ("both size and ids", (r, 3, ids, True, 1e-6)),
        ("too few ids", (r, None, ids[:5], True, 1e-6)),
        ("float ids", (r, None, ids.float(), True, 1e-6)),
        ("a negative eps", (r, 3, None, True, -1.0)),
    ]


OP = register(
    Op(
        name="group_advantage",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, unavailable=native.cpu_unavailable, supports=_only_float32),
            "cuda": Backend(_cuda_forward, unavailable=native.cuda_unavailable, supports=_gpu_limits),
            "triton": Backend(_triton_forward, unavailable=triton_unavailable, supports=_triton_supports),
        },
        cases=cases,
        invalid=invalid,
        tolerances={
            torch.float32: Tolerance(2e-7, 1e-9, "all sums are double and the result is rounded once: one float32 ulp"),
            torch.float64: Tolerance(1e-12, 1e-12, "double sums in another order"),
        },
        flops=lambda rewards, *_: 7 * rewards.numel(),
        bytes=lambda rewards, group_size, group_ids, *_: rewards.numel() * (8 if group_ids is None else 16),
    )
)


def group_advantage(
    rewards: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    normalize_std: bool = True,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Advantage of each reward within its group.

    rewards: float [N]. group_size: rows per group, consecutive; or group_ids: int64 [N], any values in any order.
    Returns float32 [N] (float64 for float64 rewards), without a gradient. A group of one, or of equal rewards: zeros.
    Raises ValueError on shapes or dtypes that do not fit, or when not exactly one of group_size and group_ids is given.
    """
    return OP(rewards, group_size, group_ids, normalize_std, eps, backend=backend)
