"""AdamW whose two moments are bfloat16: 4 bytes a parameter instead of 8, for when memory is short.

The second moment moves by (1 - beta2)(g^2 - v), which for beta2 = 0.999 is less than bfloat16's half step of 2^-9:
rounded to nearest it would stand still. So what is stored is rounded up or down at random with the probabilities that
make its mean right (stochastic rounding). The noise of a value depends on the step and on its place in the whole
parameter alone: a resumed run rounds the same, and so do shares of a parameter, however many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from r1fast.model.sharding import own, place_of_share

# Values whose moments are float32 at a time. On a CPU they stay in the cache, where the noise takes as long as torch's
# own generator (22 ms for 4 million values, one core; 69 in one piece); a GPU has fewer launches.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}


def noise(first: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [count] in [0, 2^16): of the values at `first` and after it, MurmurHash3's finalizer of place and seed."""
    bits = torch.arange(count, dtype=torch.int32, device=device).add_(_int32(first)).mul_(_int32(0x9E3779B1))
    bits.bitwise_xor_(_int32(seed))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits.bitwise_and_(0xFFFF))


def _int32(value: int) -> int:
    """The same 32 bits as a signed number; int32 products and sums of torch keep the lower half."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def round_at_random(values: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours; the expected result is the value. Infinities and NaN stay.
    noise: int32 of the same shape, uniform over [0, 2^16)."""
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
        numbered = enumerate((group, p) for group in self.param_groups for p in group["params"])
        for number, (group, p) in numbered:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=own(p).device)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
            self._update(p, state, group, number)

    @staticmethod
    def _update(p: Tensor, state: dict, group: dict, number: int) -> None:
        beta1, beta2 = group["betas"]
        step, before = state["step"], state["step"].clone()
        place, seed = place_of_share(p), 0x85EBCA77 * (int(before) + 1) + 0xC2B2AE3D * number
        size = PIECE[p.device.type]
        pieces = (own(x).view(-1).split(size) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        for weights, gradient, mean, square in zip(*pieces, strict=True):
            moments = mean.float(), square.float()
            step.copy_(before)  # the formula's own counting, once for each piece
            adamw(
                [weights], [gradient], [moments[0]], [moments[1]], [], [step], fused=True, amsgrad=False, beta1=beta1,
                beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            for stored, moment, salt in ((mean, moments[0], 0), (square, moments[1], 0x27D4EB2F)):
                stored.copy_(round_at_random(moment, noise(place, len(moment), seed + salt, moment.device)))
            place += len(weights)

    def load_state_dict(self, state_dict: dict) -> None:
        """As saved: torch would cast the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            saved = state_dict["state"].get(index)
            if saved is not None:
                self.state[p] = {name: value.clone().to(p.device) for name, value in saved.items()}
