"""AdamW whose two moments are bfloat16: 4 bytes a parameter instead of 8, for when memory is short.

The second moment moves by (1 - beta2)(g^2 - v), which for beta2 = 0.999 is less than bfloat16's half step of 2^-9:
rounded to nearest it would stand still. So what is stored is rounded up or down at random with the probabilities that
make its mean right (stochastic rounding), from noise that depends on the step alone: a resumed run rounds the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PIECE = 1 << 22  # values whose moments are float32 at a time: 16 MiB each


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours; the expected result is the value. Infinities and NaN stay."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


class HalfStateAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019) of float32 parameters; moments kept in bfloat16."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if any(p.dtype != torch.float32 for group in self.param_groups for p in group["params"]):
            raise ValueError("HalfStateAdamW updates float32 parameters; half weights have float32 masters")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros(p.numel(), dtype=torch.bfloat16, device=p.device)
                    state["exp_avg_sq"] = torch.zeros(p.numel(), dtype=torch.bfloat16, device=p.device)
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(int(state["step"]))
                self._update(p, state, group, generators[p.device])

    @staticmethod
    def _update(p: Tensor, state: dict, group: dict, generator: torch.Generator) -> None:
        beta1, beta2 = group["betas"]
        step, before = state["step"], state["step"].clone()
        pieces = (x.view(-1).split(PIECE) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        for weights, gradient, mean, square in zip(*pieces, strict=True):
            moments = mean.float(), square.float()
            step.copy_(before)  # the formula's own counting, once for each piece
            adamw(
                [weights], [gradient], [moments[0]], [moments[1]], [], [step], fused=True, amsgrad=False, beta1=beta1,
                beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            mean.copy_(round_at_random(moments[0], generator))
            square.copy_(round_at_random(moments[1], generator))

    def load_state_dict(self, state_dict: dict) -> None:
        """As saved: torch would cast the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            saved = state_dict["state"].get(index)
            if saved is not None:
                self.state[p] = {name: value.clone().to(p.device) for name, value in saved.items()}
