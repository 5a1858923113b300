"""Advantages of equal groups on the CPU, which reads groups by the vector: every size, and rewards that are hard."""

import pytest
import torch
from torch import Tensor

from r1fast_kernels import group_advantage, load_ops

TOLERANCE = load_ops()["group_advantage"].tolerances[torch.float32]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(rewards: Tensor, size: int, normalize: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Ours, and the reference."""
    found = (group_advantage(rewards, size, None, normalize, eps, backend=by) for by in ("cpu", "reference"))
    return tuple(found)


def check(rewards: Tensor, size: int, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    got, expected = both(rewards, size, normalize, eps)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE.rtol, atol=TOLERANCE.atol, equal_nan=True)
    return got


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_groups_of_every_size(offset, normalize):
    """37 groups: more than are taken together, and no multiple of a vector's."""
    for size in [*range(1, 71), 127, 128, 1000]:
        rewards = randn(37, size, seed=size) + offset
        rewards[5] = 0.3
        got = check(rewards.flatten(), size, normalize)
        assert not got.view(37, size)[5].any()


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 24, 32, 64, 100])
def test_equal_rewards_are_exactly_zero_whatever_they_are(size):
    """0.1, a sum of which is rounded in float; the smallest float and the largest; infinity, whose deviation is NaN."""
    values = torch.tensor([0.1, -1 / 3, 1e-45, 3.4e38, 1e-30, 0.0, torch.inf, -torch.inf])
    rewards = values.repeat_interleave(size)
    for normalize, eps in ((True, 1e-6), (True, 0.0), (False, 0.0)):
        got = check(rewards, size, normalize, eps)
        assert not got.any() and not got.isnan().any()


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 24, 32, 64, 100])
def test_the_smallest_difference_counts(size):
    """One reward of a group is one float away from the others."""
    values = torch.tensor([0.0, 1e-45, 1.0, 1e7, 16777215.0, 3.4e38, -1e-38])
    rewards = values.repeat_interleave(size).view(-1, size)
    rewards[:, -1] = torch.nextafter(rewards[:, -1], torch.tensor(torch.inf))
    got = check(rewards.flatten(), size, eps=0.0)
    assert (got.view(-1, size)[:, -1] > 0.7).all()


@pytest.mark.parametrize("size", [3, 4, 8, 16, 24])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_no_number_spoils_its_own_group_alone(size, bad):
    rewards = randn(40, size)
    clean = group_advantage(rewards.flatten(), size, backend="cpu").view(40, size)
    rewards[7, 1] = bad
    rewards[9] = torch.inf
    for normalize in (True, False):
        check(rewards.flatten(), size, normalize)
    got = group_advantage(rewards.flatten(), size, backend="cpu").view(40, size)
    assert got[7].isnan().all() and not got[9].any()
    others = [i for i in range(40) if i not in (7, 9)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("size", [8, 13, 16])
def test_bits_depend_on_nothing_but_the_group(size):
    """Not on the number of threads, nor on what is taken together with it."""
    rewards = randn(9000 * size)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(group_advantage(rewards, size, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    later = group_advantage(rewards[3 * size :].contiguous(), size, backend="cpu")
    assert torch.equal(found[0][3 * size :], later)
