"""float32 master weights behind a model in half precision.

A step of 1e-6 changes nothing in a bfloat16 weight, whose neighbours are 2^-8 apart, and gradients of many
micro-batches added up in bfloat16 lose the small ones. So the optimizer owns float32 copies, gradients are summed in
float32, and the model's own tensors, which the sampler reads too, are the masters rounded, in place (Micikevicius et
al. 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class Masters:
    """`parameters[i]` is the float32 master of `weights[i]`; its `.grad` is the sum of what backward gave so far."""

    def __init__(self, weights: Sequence[Parameter]) -> None:
        self.weights = list(weights)
        self.parameters = [Parameter(w.detach().float()) for w in weights]
        for weight, master in zip(self.weights, self.parameters, strict=True):
            weight.register_post_accumulate_grad_hook(self._taker(master))

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
        torch._foreach_copy_(self.weights, self.parameters)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"masters": [p.detach() for p in self.parameters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for parameter, saved in zip(self.parameters, state["masters"], strict=True):
            parameter.copy_(saved)
        self.publish()
