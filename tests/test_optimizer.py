"""The schedule at its corners, which tensors decay, and AdamW by whoever computes it, in whatever precision."""

import copy
import math
import sys
import types

import pytest
import torch
from rollouts import tiny_decoder

from r1fast.config import UserError
from r1fast.learn import half_states
from r1fast.learn.half_states import noise, round_at_random
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss
from r1fast.learn.masters import Masters
from r1fast.learn.optimizer import Schedule, build_optimizer
from r1fast.learn.packing import loss_weights, pack, row_from_example
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


# -- who computes it, in which precision ------------------------------------------------------------------------


class FusedAdam(torch.optim.AdamW):
    """apex's, by its signature; its arithmetic is AdamW's where adam_w_mode is set."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert adam_w_mode and bias_correction and not master_weights
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def apex(monkeypatch) -> None:
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam


def test_apex_is_used_where_it_is_asked_for(monkeypatch):
    apex(monkeypatch)
    settings = OptimizerConfig(implementation="apex", learning_rate=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    with pytest.raises(UserError, match="runs on a CUDA GPU only"):
        build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], settings)
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, bias], settings)
    assert type(optimizer) is FusedAdam
    got = [(g["weight_decay"], g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups]
    assert got == [(0.1, 0.01, (0.8, 0.9), 1e-3), (0.0, 0.01, (0.8, 0.9), 1e-3)]
    with pytest.raises(UserError, match="keeps its states in float32"):
        build_optimizer([matrix], settings.model_copy(update={"states": "bfloat16"}))


def test_apex_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"apex cannot be imported .*leave optimizer.implementation at torch"):
        build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], OptimizerConfig(implementation="apex"))


def test_random_rounding_is_right_in_the_mean_and_keeps_what_bfloat16_has():
    value = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way to its upper neighbour
    rounded = round_at_random(value, noise(0, 200_000, seed=1)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value[0].item(), abs=3e-5)
    kept = torch.tensor([0.0, -1.5, torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_at_random(kept, noise(0, 5, seed=1)).float().nan_to_num(), kept.nan_to_num())


def test_noise_is_murmurs_finalizer_uniform_and_of_the_place_alone():
    def by_hand(place: int, seed: int) -> int:
        x = (place * 0x9E3779B1 ^ seed) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % 2**32
        return (x >> 16 ^ x) % 2**16

    for first, seed in ((0, 3), (2**31 - 5, 12345678901), (2**35, -7)):
        assert noise(first, 9, seed).tolist() == [by_hand(first + i, seed) for i in range(9)]
    drawn = noise(0, 1 << 18, seed=5)
    assert torch.equal(drawn[1000:3000], noise(1000, 2000, seed=5))
    others = torch.stack([drawn, noise(1, 1 << 18, seed=5), noise(0, 1 << 18, seed=6)]).float()
    assert (torch.corrcoef(others) - torch.eye(3)).abs().max() < 0.01
    counts = torch.bincount(drawn >> 8, minlength=256)
    assert len(counts) == 256 and (counts - 1024).abs().max() < 6 * 32  # six standard deviations


def test_half_states_follow_adamw_and_take_half_the_memory(monkeypatch):
    """A noisy quadratic, whose gradients' squares shrink slowly: rounded to nearest, v would stay where it was."""
    monkeypatch.setitem(half_states.PIECE, "cpu", 700)  # 1,500 values in three pieces
    settings = OptimizerConfig(learning_rate=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    found = {}
    for states in ("float32", "bfloat16"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(30, 50) + 3)
        optimizer = build_optimizer([p], settings.model_copy(update={"states": states}))
        for _ in range(300):
            p.grad = p.detach() + 0.1 * torch.randn(30, 50)
            optimizer.step()
        state = optimizer.state[p]
        found[states] = p.detach(), state["exp_avg_sq"].float().flatten()
        assert state["exp_avg"].dtype == getattr(torch, states) and float(state["step"]) == 300
    assert (found["float32"][0].abs().mean() - 3).abs() > 1  # it moved
    assert (found["bfloat16"][0] - found["float32"][0]).abs().mean() < 0.02
    assert (found["bfloat16"][1] / found["float32"][1]).mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_a_half_model_moves_by_its_masters_and_resumes_with_the_same_bits(states):
    """Updates far below a bfloat16 weight's step add up to one; a resumed learner goes on as the whole one."""

    def learner_of(seed: int) -> Learner:
        return Learner(tiny_decoder(seed, torch.bfloat16), OptimizerConfig(learning_rate=1e-5, states=states), 100)

    rows = [row_from_example([i % 5, 3], [(i * 7 + k) % 19 for k in range(1 + i % 4)]) for i in range(12)]
    batches = pack(rows, loss_weights(rows, "token"), 40)
    whole = learner_of(0)
    start = [p.detach().clone() for p in whole.model.parameters()]
    for _ in range(4):
        stats = whole.step(batches, cross_entropy_loss)
    assert len(batches) > 1 and stats.grad_norm > 0.1
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in whole.model.parameters())
    assert all(torch.equal(w, m.bfloat16()) for w, m in zip(whole.model.parameters(), whole.parameters, strict=True))
    moved = torch.cat([(m - s.float()).abs().flatten() for m, s in zip(whole.parameters, start, strict=True)])
    assert moved.max() > 2e-5 and (moved > 0).float().mean() > 0.9
    changed = torch.cat([(a != b).flatten() for a, b in zip(whole.model.parameters(), start, strict=True)])
    assert changed.float().mean() < 0.1  # a weight of the model moves only when its master has crossed a step
    state = copy.deepcopy({"learner": whole.state_dict(), "model": whole.model.state_dict()})
    resumed = learner_of(9)
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["learner"])
    for learner in (whole, resumed):
        learner.step(batches, cross_entropy_loss)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_gradients_of_a_half_model_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    masters = Masters([weight])
    for value in (256.0, 0.5, 0.5):  # bfloat16 would keep 256
        (weight * value).sum().backward()
    assert masters.parameters[0].grad.tolist() == [257.0] * 3 and weight.grad is None
