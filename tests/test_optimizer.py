"""The schedule at its corners, and which tensors decay."""

import math

import pytest
import torch

from r1fast.learn.optimizer import Schedule, build_optimizer
from r1fast.schema import OptimizerConfig


def rates(total: int, **settings) -> list[float]:
    schedule = Schedule(OptimizerConfig(learning_rate=2.0, **settings), total)
    return [schedule(step) for step in range(total)]


def test_constant_with_warmup():
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_reaches_its_last_rate_on_the_last_step():
    got = rates(11, schedule="linear", final=0.1)
    assert got == pytest.approx([2.0 - 0.18 * i for i in range(11)])
    assert got[-1] == pytest.approx(0.2)


def test_cosine_is_half_way_in_the_middle():
    got = rates(101, schedule="cosine", final=0.1)
    assert got[0] == 2.0
    assert got[50] == pytest.approx(1.1)
    assert got[25] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert got[100] == pytest.approx(0.2)
    assert got == sorted(got, reverse=True)


def test_flat_share_counts_from_the_first_step():
    got = rates(100, schedule="linear", warmup_steps=10, flat=0.4, final=0.05)
    assert got[9:41] == [2.0] * 32
    assert got[41] < 2.0
    assert got[-1] == pytest.approx(0.1)
    assert got[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])


def test_past_the_end_and_very_short_runs_stay_at_the_last_rate():
    schedule = Schedule(OptimizerConfig(learning_rate=1.0, schedule="cosine", final=0.3), 10)
    assert schedule(10) == schedule(500) == pytest.approx(0.3)
    assert rates(1, schedule="linear") == [2.0]
    assert rates(3, schedule="linear", warmup_steps=8) == [0.25, 0.5, 0.75]


def test_norms_and_biases_do_not_decay():
    matrix, bias, frozen = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (2, 2)))
    frozen.requires_grad_(False)
    optimizer = build_optimizer([matrix, bias, frozen], OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    matrix.grad, bias.grad = torch.zeros_like(matrix), torch.zeros_like(bias)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 2), 0.95))
    assert (bias == 1.0).all()
    assert (frozen == 1.0).all()


def test_a_step_is_adamw_as_published():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3))
    start = p.detach().clone()
    settings = OptimizerConfig(learning_rate=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    optimizer = build_optimizer([p], settings)
    m = v = torch.zeros_like(start)
    x = start.clone()
    for t in range(1, 4):
        p.grad = torch.randn(4, 3)
        x = x * (1 - 0.01 * 0.1)
        m, v = 0.8 * m + 0.2 * p.grad, 0.9 * v + 0.1 * p.grad**2
        x = x - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        optimizer.step()
    torch.testing.assert_close(p.detach(), x)
