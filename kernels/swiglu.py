"""SwiGLU: the gated activation of Llama's and Qwen's MLP, on the fused gate-and-up projection.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i],    silu(a) = a * sigmoid(a)        (Shazeer 2020, eq. 6)

One projection of width 2I feeds it, so the two halves are read where they lie and no split copy is made.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reference(gate_up: Tensor) -> Tensor:
    """Plain torch, fp32 inside for half-precision input."""
    gate, up = gate_up.chunk(2, -1)
    if gate_up.element_size() >= 4:
        return F.silu(gate) * up
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(first half) * second half of the last dimension.

    gate_up: float [..., 2I], gate first. Returns [..., I] in the same dtype. Differentiable.
    Raises ValueError where the last dimension is odd.
    """
    return reference(gate_up)
