"""Rewards into advantages: what a group says about each of its members (DeepSeekMath section 4.1.2).

A group whose rewards are all equal says nothing. That is judged on the rewards, max - min, and never on the size of
an advantage: float rounding in the mean gives identical rewards an advantage as large as 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from r1fast_kernels import group_advantage

if TYPE_CHECKING:
    from torch import Tensor

    from r1fast.types import RolloutGroup

LEAST_SPREAD = 1e-6  # of a group's rewards; what differs by less is a sum of the same terms in another order


def group_rewards(groups: Sequence[RolloutGroup]) -> list[Tensor]:
    """The rewards of each group, float64 [its rollouts]."""
    return [torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64) for group in groups]


def informative(group: RolloutGroup) -> bool:
    """Whether the group's rewards differ, so that it carries a policy gradient at all."""
    rewards = [r.reward for r in group.rollouts]
    return max(rewards) - min(rewards) > LEAST_SPREAD


def advantages(groups: Sequence[RolloutGroup], normalize_std: bool) -> Tensor:
    """(r - mean) / (std + eps) within each group, or r - mean without `normalize_std` (Dr. GRPO section 3.2).

    Returns float32 [rollouts of all groups, in order] on the CPU; exact zeros for groups that are not informative.
    """
    sizes = torch.tensor([len(group.rollouts) for group in groups])
    ids = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    rewards = torch.cat(group_rewards(groups)).float()
    told = torch.tensor([informative(group) for group in groups])
    values = group_advantage(rewards, group_ids=ids, normalize_std=normalize_std)
    return torch.where(told[ids], values, 0.0)
