"""Activations that are cheap to make again are not kept for the backward pass.

What enters a product is needed again for the gradient of its weight. Where a norm or the gate of the MLP made it, what
that was made from is kept anyway, and a pass over it costs little beside the product: at 30M parameters 29% of all
activations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recalls(device: str, split: bool) -> bool:
    """Whether a decoder does so there. split: it is held by several ranks together (tensor_parallel.py)."""
    return device == "cpu" and not split


def recalled(x: Tensor, again: Callable[[], Tensor] | None) -> AbstractContextManager:
    """Within, autograd keeps `again` in place of x, and calls it in the backward pass: it must give the same bits.

    On a CPU alone, where a launch costs nothing and memory is what bounds a micro-batch. None: x is kept."""
    if again is None or not recalls(x.device.type, False) or not torch.is_grad_enabled():
        return nullcontext()
    place, shape = x.data_ptr(), x.shape  # x itself would be kept by what remembers it

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return again if tensor.data_ptr() == place and tensor.shape == shape else tensor

    @torch.no_grad()
    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else again()

    return saved_tensors_hooks(pack, unpack)
