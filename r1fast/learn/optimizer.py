"""AdamW and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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


def build_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (one pass over each tensor, CPU and GPU). Norms, biases and whatever else has one dimension
    are not decayed: their size is no measure of the function's complexity."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
