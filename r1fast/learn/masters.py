"""float32 master weights behind a model in half precision.

A step of 1e-6 changes nothing in a bfloat16 weight, whose neighbours are 2^-8 apart, and gradients of many
micro-batches added up in bfloat16 lose the small ones. So the optimizer owns float32 copies, gradients are summed in
float32, and the model's own tensors, which the sampler reads too, are the masters rounded, in place (Micikevicius et
al. 2018, section 3.1).

Of a sharded model the shares themselves are the masters, which FSDP rounds as it gathers them: there is no copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from r1fast.model.sharding import HALF, shared_like


class Masters:
    """`parameters[i]` is the float32 master of `weights[i]`; its `.grad` is the sum of what backward gave so far."""

    def __init__(self, weights: Sequence[Parameter]) -> None:
        self.weights = [w for w in weights if w.dtype in HALF]  # none of a sharded model
        self.parameters = [Parameter(w.detach().float()) if w.dtype in HALF else w for w in weights]
        self._copies = [p for p, w in zip(self.parameters, weights, strict=True) if p is not w]
        for weight, master in zip(self.weights, self._copies, strict=True):
            weight.register_post_accumulate_grad_hook(self._taker(master))

    @classmethod
    def behind(cls, weights: Sequence[Parameter], used_in: torch.dtype) -> Masters | None:
        """None where `used_in`, the dtype that the weights are multiplied in, is as wide as a master."""
        return cls(weights) if used_in in HALF else None

    @staticmethod
    def _taker(master: Parameter):
        def take(weight: Tensor) -> None:
            """After each backward pass: the half gradient goes into the float32 sum and is freed."""
            gradient, weight.grad = weight.grad, None
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient

        return take

    @torch.no_grad()
    def publish(self) -> None:
        """After an optimizer step: the model's weights are the masters, rounded to nearest."""
        if self.weights:
            torch._foreach_copy_(self.weights, self._copies)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The same of shares and of copies, so that any number of ranks goes on with it."""
        return {"masters": [p.detach() for p in self.parameters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for parameter, saved in zip(self.parameters, state["masters"], strict=True):
            parameter.copy_(shared_like(saved, parameter))
        self.publish()
