"""Memory for the large float32 tensors that the ops make on a CPU: apart from malloc's, taken once and kept.

A step of training makes and frees the same few hundred megabytes for every micro-batch, of another length each time.
Through malloc every step left its holes elsewhere: glibc cannot give an aligned block the hole that one of its size
left (its bug 14581), so a process grew for hours. Here large blocks have a stretch of addresses of their own
(csrc/cpu_memory.h), with nothing small between them that would keep holes apart; and its pages are the large ones where
the system has them. What came once is kept for the next step: a first touch costs ten times a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import float32 as FLOAT32
from torch.utils.dlpack import from_dlpack

from r1fast_kernels import native

LEAST = 1 << 15  # elements from which a tensor is made here: below it malloc reuses its holes


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """like.new_empty(shape): uninitialised, of `like`'s dtype, on its device, contiguous, 256-byte aligned."""
    if math.prod(shape) < LEAST or like.dtype is not FLOAT32 or not like.is_cpu:
        return like.new_empty(shape)
    capsule = native.cpu().memory(tuple(shape))
    return like.new_empty(shape) if capsule is None else from_dlpack(capsule)


def recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Zeros where tensors from here lay before, for what lives while they do not: it costs the process no page. None
    where they left no hole of that size, or dtype is not float32."""
    if dtype is not FLOAT32 or native.cpu_unavailable() is not None:
        return None
    capsule = native.cpu().memory(tuple(shape), touched=True)
    return None if capsule is None else from_dlpack(capsule).zero_()


def in_use() -> int:
    """Bytes of all tensors from here that are still alive."""
    return native.cpu().memory_in_use()
