"""Rotary position embedding of queries and keys, in the half-split layout of NeoX, Llama and Qwen.

With x = (x1, x2) the two halves of a head, and c, s the cosine and sine of its position (Su et al. 2021, eq. 34):

    x1' = x1 * c - x2 * s
    x2' = x2 * c + x1 * s

The angles come as tables [P, D/2], so every scaling of the frequencies (linear, llama3, yarn with its
magnitude folded in) is the caller's and costs nothing here. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch; half-precision inputs meet fp32 tables, so the arithmetic is fp32."""
    cos = cos.index_select(0, positions).unsqueeze(1)
    sin = sin.index_select(0, positions).unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angle of each row's position.

    q: float [T, Hq, D]. k: float [T, Hkv, D]. cos, sin: float32 [P, D/2]. positions: int64 [T], in [0, P).
    Returns (q', k') in their dtypes. Differentiable in q and k.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    return reference(q, k, cos, sin, positions)
