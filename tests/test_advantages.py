"""Group advantages by the papers' formulas, and what counts as a group that says something."""

import math
import statistics

import pytest
import torch

from r1fast.learn.advantages import advantages, group_rewards, informative
from r1fast.rewards.length import overlong_penalty
from r1fast.types import Prompt, Rollout, RolloutGroup


def group(*rewards: float) -> RolloutGroup:
    prompt = Prompt("p", (1,), "", None, "made-up")
    return RolloutGroup(prompt, [Rollout([1], [0.0], "stop", reward=r) for r in rewards], 0)


def test_normalised_is_the_papers_formula_per_group():
    groups = [group(1.0, 0.0, 0.2, 1.2), group(0.0, 1.0), group(-3.0, 5.0, 5.5)]
    expected = []
    for g in groups:
        rewards = [r.reward for r in g.rollouts]
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        expected += [(r - mean) / (std + 1e-6) for r in rewards]
    got = advantages(groups, True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_without_std_it_is_the_distance_to_the_mean():
    got = advantages([group(1.0, 0.0, 0.2, 1.2), group(0.0, 4.0)], False)
    torch.testing.assert_close(got, torch.tensor([0.4, -0.6, -0.4, 0.6, -2.0, 2.0]), rtol=1e-5, atol=1e-6)


def test_equal_rewards_give_exact_zeros_however_they_were_summed():
    almost = group(0.1 + 0.2, 0.3, 0.3 + 1e-9, 0.3)  # a sum of the same terms in another order
    got = advantages([almost, group(0.7, 0.7, 0.7), group(0.0, 1.0)], True)
    assert (got[:7] == 0.0).all()
    assert (got[7:] != 0.0).all()
    assert not informative(almost)
    assert not informative(group(0.3))
    assert informative(group(0.3, 0.3, 0.3001))


def test_group_rewards_are_per_group():
    assert [r.tolist() for r in group_rewards([group(1.0, 2.0), group(3.0)])] == [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (150, -1.0)]
)
def test_overlong_penalty_is_dapo_eq_13(length, expected):
    assert math.isclose(overlong_penalty(length, max_tokens=100, window=20), expected, abs_tol=1e-12)
