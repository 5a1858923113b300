"""Rows that lie beyond 2^31 elements of a contiguous tensor: the last ones are what they are by themselves.

On a GPU the tensors are that large, where its memory holds them. On a CPU the same calls are made with small ones,
which shows that these tests are right; what they look for is found there by strided rows (test_kernels.py), by a cache
whose pages are never touched (below), and for Triton by the compiler's own text (triton_compile.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from huge import on_linux, untouched
from torch import Tensor

import r1fast_kernels
from r1fast_kernels.op import LIVES_ON

OPS = r1fast_kernels.load_ops()
LIMIT = 1 << 31 if torch.cuda.is_available() else 1 << 14
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = 48  # rows that are compared


@dataclass(frozen=True)
class Large:
    """An op at a width, and which of its arguments have a row for each row."""

    op: str
    width: int  # elements of a row of the largest argument
    make: Callable[[int], tuple]  # rows -> args
    by_row: tuple[int, ...]
    copies: int = 3  # of the largest argument that the call holds at once, roughly


def normal(*shape: int, dtype=torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def counted(rows: int, below: int = 1 << 40, dtype=torch.int64) -> Tensor:
    return torch.arange(rows, device=DEVICE, dtype=dtype) % below


def full(rows: int, value: float, dtype=torch.float32) -> Tensor:
    return torch.full((rows,), value, device=DEVICE, dtype=dtype)


def attention(rows: int) -> tuple:
    """Sequences of LAST tokens, so that the last rows are a sequence."""
    qkv = [normal(rows, heads, 128) for heads in (8, 2, 2)]
    return *qkv, torch.arange(0, rows + 1, LAST, device=DEVICE, dtype=torch.int32), LAST, None


def head(rows: int) -> tuple:
    return normal(rows, 1024), normal(64, 1024) / 32, counted(rows, 64), 1.0


def draws(rows: int) -> tuple:
    number = counted(rows)
    settings = full(rows, 0.7), full(rows, 9, torch.int32), full(rows, 0.9)
    return normal(rows, 1024), torch.full_like(number, 3), number, number, *settings


def rotation(rows: int) -> tuple:
    angle = normal(64, 64, dtype=torch.float32)
    return normal(rows, 8, 128), normal(rows, 2, 128), angle.cos(), angle.sin(), counted(rows, 64)


LARGE = [
    Large("rms_norm", 1024, lambda rows: (normal(rows, 1024), normal(1024), 1e-6, normal(rows, 1024)), (0, 3), 4),
    Large("swiglu", 2048, lambda rows: (normal(rows, 2048),), (0,)),
    Large("rope", 1024, rotation, (0, 1, 4)),
    Large("sample_token", 1024, draws, (0, 1, 2, 3, 4, 5, 6), 2),
    Large("linear_logprob", 1024, head, (0, 2), 2),
    Large("varlen_attention", 1024, attention, (0, 1, 2)),
]


def runs() -> list:
    found = []
    for large in LARGE:
        for name in ("cpu", "cuda", "triton", "flash", "torch"):
            if name in OPS[large.op].backends and LIVES_ON.get(name, "cuda") == DEVICE:
                found.append(pytest.param(large, name, id=f"{large.op}-{name}"))
    return found


def as_tuple(result) -> tuple:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize(("large", "backend"), runs())
def test_the_last_rows_are_what_they_are_by_themselves(large: Large, backend: str):
    op = OPS[large.op]
    rows = (LIMIT // large.width // LAST + 2) * LAST
    if op.reason(backend) is not None:
        pytest.skip(op.reason(backend))
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < large.copies * rows * large.width * 2:
        pytest.skip("this GPU has too little free memory")
    args = large.make(rows)
    if backend == "cpu":  # it computes in float32
        args = tuple(a.float() if isinstance(a, Tensor) and a.dtype is torch.bfloat16 else a for a in args)
    assert args[0].numel() > LIMIT
    if op.refusal(backend, args) is not None:
        pytest.skip(op.refusal(backend, args))
    with torch.no_grad():
        found = as_tuple(op(*args, backend=backend))
        own = [a[-LAST:].clone() if i in large.by_row else a for i, a in enumerate(args)]
        if large.op == "varlen_attention":
            own[3] = own[3][:2]
        expected = as_tuple(op(*own, backend=backend))
    for a, e in zip(found, expected, strict=True):
        assert e.float().abs().sum() > 0
        assert torch.equal(a[-LAST:], e) or torch.allclose(a[-LAST:].float(), e.float(), rtol=1e-2, atol=1e-3)


def far_cache(dtype: torch.dtype) -> list[Tensor]:
    """Two caches [blocks, 16, 2, 64] of more than 2^31 elements."""
    blocks = (1 << 31) // (16 * 2 * 64) + 40
    if DEVICE == "cpu":
        return [untouched(blocks * 2048, dtype).view(blocks, 16, 2, 64) for _ in range(2)]
    if torch.cuda.mem_get_info()[0] < 3 * blocks * 2048 * dtype.itemsize:
        pytest.skip("this GPU has too little free memory")
    return list(torch.zeros(2, blocks, 16, 2, 64, device=DEVICE, dtype=dtype))


@on_linux
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "triton"])
def test_blocks_beyond_are_written_and_read(backend: str):
    append, attend = OPS["paged_append"], OPS["paged_attention"]
    for reason in (append.reason(backend), attend.reason(backend)):
        if reason is not None:
            pytest.skip(reason)
    if LIVES_ON.get(backend, DEVICE if backend == "reference" else "cuda") != DEVICE:
        pytest.skip(f"its tensors do not live on {DEVICE}")
    caches = far_cache(torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    dtype, context, blocks = caches[0].dtype, 40, 3
    k, v = normal(context, 2, 64, dtype=dtype), normal(context, 2, 64, dtype=dtype)
    q = normal(1, 4, 64, dtype=dtype)
    results = []
    for first in (2, len(caches[0]) - blocks):
        slots = first * 16 + counted(context)
        append(k, v, *caches, slots, backend=backend)
        table = torch.arange(first, first + blocks, device=DEVICE, dtype=torch.int32)[None]
        lens = torch.tensor([context], device=DEVICE, dtype=torch.int32)
        results.append(attend(q, *caches, table, lens, None, None, None, backend=backend))
    assert caches[0][2:5].flatten(0, 1)[:context].equal(k) and caches[1][-3:].flatten(0, 1)[:context].equal(v)
    assert results[0].abs().sum() > 0 and torch.equal(*results)
