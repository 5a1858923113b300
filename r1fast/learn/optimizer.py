"""AdamW, by whom and with which states, and the learning rate over a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from r1fast.config import UserError
from r1fast.learn.half_states import HalfStateAdamW

if TYPE_CHECKING:
    from torch.nn import Parameter

    from r1fast.schema import OptimizerConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by optimizer step, counted from 0: linear warm-up, a flat part, then the decay.

    `flat` is a share of all steps, warm-up included. The last step runs at `final` times the full rate, and so does
    any step after it.
    """

    config: OptimizerConfig
    total_steps: int

    def __call__(self, step: int) -> float:
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.learning_rate
        start = max(c.warmup_steps, math.floor(c.flat * self.total_steps))
        done = min(max(step - start, 0) / max(self.total_steps - 1 - start, 1), 1.0)
        left = 1.0 - done if c.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return c.learning_rate * (c.final + (1.0 - c.final) * left)


class AdamW(torch.optim.AdamW):
    """torch's, without its compiler. The methods of its optimizers ask torch.compile to leave them alone, and import it
    for that: 73 MB and a second, in a process that compiles nothing. These are the functions themselves."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as `config` says: torch's fused one (one pass over each tensor, CPU and GPU), apex's FusedAdam, or ours
    whose states are bfloat16. Norms, biases and whatever else has one dimension are not decayed: their size is no
    measure of the function's complexity. UserError where apex is asked for and cannot be had."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.implementation == "apex":
        return _apex(groups, config, settings)
    if config.states == "bfloat16":
        return HalfStateAdamW(groups, **settings)
    return AdamW(groups, **settings, fused=True)


def _apex(groups: list[dict], config: OptimizerConfig, settings: dict) -> torch.optim.Optimizer:
    """apex.optimizers.FusedAdam: one launch for many tensors, decay decoupled as in AdamW."""
    if config.states == "bfloat16":
        raise UserError("optimizer.implementation apex keeps its states in float32; leave optimizer.states as it is")
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"optimizer.implementation is apex, but apex cannot be imported ({error}): build it from NVIDIA's sources, "
            f"or leave optimizer.implementation at torch"
        ) from None
    if not all(p.is_cuda for group in groups for p in group["params"]):
        raise UserError("optimizer.implementation is apex, which runs on a CUDA GPU only; use torch here")
    return FusedAdam(groups, **settings, adam_w_mode=True)
