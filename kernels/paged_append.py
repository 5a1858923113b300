"""The write of new keys and values into a cache of fixed-size blocks, which paged_attention.py reads.

k_cache[slot[t]], v_cache[slot[t]] = k[t], v[t],    slot = block * bs + offset
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, next_power_of_2, tl, triton_unavailable, where_triton_runs


def check_cache(op, k_cache, v_cache, like) -> None:
    """`op` names the caller; like: what the cache's heads must fit."""
    if k_cache.dim() != 4 or v_cache.shape != k_cache.shape or k_cache.shape[3] != like.shape[-1]:
        raise ValueError(
            f"{op}: k_cache and v_cache must be [N, bs, Hkv, {like.shape[-1]}], "
            f"not {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if not like.is_floating_point() or k_cache.dtype != like.dtype or v_cache.dtype != like.dtype:
        raise ValueError(f"{op}: all must be of one float dtype, not {like.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if k_cache.device != like.device or v_cache.device != like.device:
        raise ValueError(f"{op}: the caches must live on {like.device}, not {k_cache.device} and {v_cache.device}")


def check(k, v, k_cache, v_cache, slot_mapping, op: str = "paged_append") -> None:
    """`op` names the caller, where the write is part of another op."""
    if k.dim() != 3 or v.shape != k.shape or k_cache.dim() != 4 or k.shape[1] != k_cache.shape[2]:
        raise ValueError(
            f"{op}: k and v must be [T, Hkv, D] with the heads of the caches, "
            f"not {list(k.shape)} and {list(v.shape)} for {list(k_cache.shape)}"
        )
    check_cache(op, k_cache, v_cache, k)
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64 or slot_mapping.device != k.device:
        raise ValueError(
            f"{op}: slot_mapping must be int64 [{k.shape[0]}] on {k.device}, "
            f"not {slot_mapping.dtype} {list(slot_mapping.shape)} on {slot_mapping.device}"
        )
    if v.dtype != k.dtype or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"{op}: k and v must be of one dtype, and the caches contiguous")


def reference(k, v, k_cache, v_cache, slot_mapping) -> None:
    """Plain torch."""
    try:
        for new, cache in ((k, k_cache), (v, v_cache)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, new)
    except IndexError:
        slots = k_cache.shape[0] * k_cache.shape[1]
        raise ValueError(f"paged_append: a slot lies outside the cache, which has {slots}") from None


@jit(do_not_specialize=["slots"])
def _append(k, k_stride, v, v_stride, k_cache, v_cache, slot_mapping, slots, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One token's keys and values. A slot outside the cache is left out."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    i = tl.arange(0, PADDED)
    if (slot >= 0) & (slot < slots):
        tl.store(k_cache + slot * SIZE + i, tl.load(k + row * k_stride + i, mask=i < SIZE), mask=i < SIZE)
        tl.store(v_cache + slot * SIZE + i, tl.load(v + row * v_stride + i, mask=i < SIZE), mask=i < SIZE)


def _triton_supports(k, v, k_cache, v_cache, slot_mapping) -> str | None:
    return where_triton_runs(k, v, k_cache, v_cache, slot_mapping)


def _triton_forward(k, v, k_cache, v_cache, slot_mapping) -> None:
    k, v = native.packed_heads(k), native.packed_heads(v)
    size = k.shape[1] * k.shape[2]
    if k.numel():
        slots = k_cache.shape[0] * k_cache.shape[1]
        tensors = (k, k.stride(0), v, v.stride(0), k_cache, v_cache, slot_mapping.contiguous())
        _append[(k.shape[0],)](*tensors, slots, size, next_power_of_2(size))


def _cpu_supports(k, v, k_cache, *_rest) -> str | None:
    return None if k.dtype == torch.float32 else f"it copies float32, and k is {k.dtype}"


def _cpu_forward(k, v, k_cache, v_cache, slot_mapping) -> None:
    k, v, slots = native.packed_heads(k), native.packed_heads(v), slot_mapping.contiguous()
    addresses = (k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr())
    sizes = (k.shape[0], k.shape[1] * k.shape[2], k_cache.shape[0] * k_cache.shape[1])
    native.cpu().paged_append(*addresses, slots.data_ptr(), *sizes)


def _cuda_supports(k, *_rest) -> str | None:
    return None if k.dtype in native.ELEMENT_TYPES else f"it has no {k.dtype}"


def _cuda_forward(k, v, k_cache, v_cache, slot_mapping) -> None:
    k, v, slots = native.packed_heads(k), native.packed_heads(v), slot_mapping.contiguous()
    addresses = (k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr())
    sizes = (k.shape[0], k.shape[1] * k.shape[2], k_cache.shape[0] * k_cache.shape[1], k.element_size())
    native.launch(k.device, "paged_append", *addresses, slots.data_ptr(), *sizes)


def random_cache(
    blocks: int, block: int, kv_heads: int, width: int, device: str, dtype: torch.dtype, generator
) -> list[Tensor]:
    shape = (2, blocks, block, kv_heads, width)
    return list(torch.randn(shape, generator=generator).to(device, dtype))


def _case(size: str, rows: int, blocks: int, block: int, kv_heads: int, width: int) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        k, v = torch.randn(2, rows, kv_heads, width, generator=generator).to(device, dtype)
        slots = torch.randperm(blocks * block, generator=generator)[:rows].to(device)
        return k, v, *random_cache(blocks, block, kv_heads, width, device, dtype, generator), slots

    return Case(f"{rows} rows {kv_heads} heads of {width}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 5, 3, 4, 2, 16),
        _case("ragged", 101, 9, 16, 3, 20),
        _case("model", 512, 1024, 16, 2, 128),
    ]


def invalid() -> list[tuple[str, tuple]]:
    k, cache, slots = torch.ones(3, 2, 8), torch.ones(5, 4, 2, 8), torch.arange(3)
    return [
        ("other heads than the cache", (k[:, :1], k[:, :1], cache, cache, slots)),
        ("another width", (k[..., :4], k[..., :4], cache, cache, slots)),
        ("int32 slots", (k, k, cache, cache, slots.int())),
        ("a cache with gaps", (k, k, cache.transpose(0, 1), cache.transpose(0, 1), slots)),
        ("a slot past the cache", (k, k, cache, cache, slots + 18)),
    ]


OP = register(
    Op(
        name="paged_append",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, unavailable=native.cpu_unavailable, supports=_cpu_supports),
            "cuda": Backend(_cuda_forward, unavailable=native.cuda_unavailable, supports=_cuda_supports),
            "triton": Backend(
                _triton_forward,
                unavailable=triton_unavailable,
                supports=_triton_supports,
            ),
        },
        cases=cases,
        invalid=invalid,
        mutates=(2, 3),
        tolerances={dtype: Tolerance(0, 0, "a copy: exact") for dtype in (torch.float32, torch.bfloat16)},
        flops=lambda *_: 0,
        bytes=lambda k, *_: 4 * k.numel() * k.element_size(),
    )
)


def paged_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, backend: str | None = None
) -> None:
    """Write new keys and values into the cache, in place.

    k, v: float [T, Hkv, D]. k_cache, v_cache: float [N, bs, Hkv, D], contiguous, of the same dtype. slot_mapping: int64
    [T], distinct: block * bs + offset of each token.
    Raises ValueError on shapes, dtypes or devices that do not fit, or a slot outside the cache. (On a GPU
    such a token is left out and nothing is said, as the host would have to wait to hear of it.)
    """
    with torch.no_grad():
        OP(k, v, k_cache, v_cache, slot_mapping, backend=backend)
