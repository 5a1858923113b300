"""The references of the losses and of the head: against formulas written out here, TRL's loss, differences of numbers.

Everything is float64 unless it says otherwise, so that a wrong term cannot hide in rounding.
"""

import math
import sys

import pytest
import torch
from torch import Tensor

import r1fast_kernels as k

torch_double = {"dtype": torch.float64}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **torch_double)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- head and log-softmax


def logprobs_at_once(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(hidden @ weight.T / temperature, 1)


def small_head(rows: int = 9, vocabulary: int = 13, hidden: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    h, w = randn(rows, hidden).requires_grad_(), randn(vocabulary, hidden, seed=1).requires_grad_()
    return h, w, torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=[4, 1000], ids=["chunks of four rows", "one chunk"])
def chunks(request, monkeypatch):
    k.linear_logprob.__doc__  # noqa: B018
    monkeypatch.setattr(sys.modules["r1fast_kernels.linear_logprob"], "chunk_rows", lambda vocabulary: request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_linear_logprob_against_all_logits_at_once(temperature):
    h, w, targets = small_head()
    logp, entropy = k.linear_logprob(h, w, targets, temperature)
    full = logprobs_at_once(h, w, temperature)
    close(logp, full[torch.arange(9), targets])
    close(entropy, torch.distributions.Categorical(logits=full).entropy())
    assert not entropy.requires_grad
    weight = randn(9, seed=3)
    expected = torch.autograd.grad((full[torch.arange(9), targets] * weight).sum(), (h, w))
    for a, e in zip(torch.autograd.grad((logp * weight).sum(), (h, w)), expected, strict=True):
        close(a, e)


@pytest.mark.usefixtures("chunks")
def test_gradient_of_linear_logprob():
    h, w, targets = small_head(5, 6, 3)
    assert torch.autograd.gradcheck(lambda h, w: k.linear_logprob(h, w, targets, 0.7)[0], (h, w))


@pytest.mark.usefixtures("chunks")
def test_fused_loss_changes_along_its_gradient():
    """Central differences of the loss in random directions of hidden and weight."""
    h, w, targets = small_head()
    old, ref, advantages, weights = randn(4, 9, seed=4)
    streams = (targets, old - 2, ref - 2, advantages, weights, 0.7, 0.2, 0.2, 0.3)
    d_h, d_w = torch.autograd.grad(k.linear_grpo_loss(h, w, *streams)[0], (h, w))
    step = 1e-6
    for seed in range(5):
        u, v = randn(9, 5, seed=20 + seed), randn(13, 5, seed=40 + seed)
        with torch.no_grad():
            up, down = (k.linear_grpo_loss(h + s * u, w + s * v, *streams)[0] for s in (step, -step))
        close((up - down) / (2 * step), (d_h * u).sum() + (d_w * v).sum(), 1e-7)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_linear_grpo_loss_is_its_two_halves(kl_kind):
    """Loss, both gradients, statistics and log-probabilities equal grpo_loss after linear_logprob."""
    h, w, targets = small_head()
    old, ref, advantages, weights = randn(4, 9, seed=4)
    weights[::4], advantages[1::4] = 0, 0
    logp, entropy = k.linear_logprob(h, w, targets, 0.8)
    old, ref = logp.detach() + 0.4 * old, logp.detach() + ref
    rows, stats = k.grpo_loss(logp, old, ref, advantages, weights, 0.2, 0.3, 0.1, kl_kind, return_stats=True)
    fused, found = k.linear_grpo_loss(h, w, targets, old, ref, advantages, weights, 0.8, 0.2, 0.3, 0.1, kl_kind)
    close(fused, rows.sum())
    for name in stats._fields:
        close(getattr(found, name), getattr(stats, name))
    close(found.logp, logp.detach())
    close(found.entropy, entropy)
    expected = torch.autograd.grad(rows.sum() * 1.7, (h, w))
    for a, e in zip(torch.autograd.grad(fused * 1.7, (h, w)), expected, strict=True):
        close(a, e)


@pytest.mark.usefixtures("chunks")
def test_rows_without_a_slope_are_left_out_exactly():
    """Hidden gradients of skipped rows are exactly zero, and the rest is what it would be without those rows."""
    h, w, targets = small_head()
    advantages, weights = randn(9, seed=4), torch.ones(9, **torch_double)
    advantages[[0, 3]], weights[[5, 8]] = 0, 0
    live = [1, 2, 4, 6, 7]
    loss, _ = k.linear_grpo_loss(h, w, targets, None, None, advantages, weights)
    d_h, d_w = torch.autograd.grad(loss, (h, w))
    assert not d_h[[0, 3, 5, 8]].any()
    alone, _ = k.linear_grpo_loss(h[live], w, targets[live], None, None, advantages[live], weights[live])
    expected = torch.autograd.grad(alone, (h, w))
    close(d_h, expected[0])
    close(d_w, expected[1])


def test_on_policy_gradient_is_reinforce():
    """old_logp=None: ratio 1 for every row, loss -sum(w A), gradient that of -sum(w A logp)."""
    h, w, targets = small_head()
    advantages, weights = randn(2, 9, seed=4)
    loss, stats = k.linear_grpo_loss(h, w, targets, None, None, advantages, weights)
    close(loss.detach(), -(weights * advantages).sum())
    assert stats.ratio_max == 1 and stats.clipped_sum == 0
    logp = logprobs_at_once(h, w, 1.0)[torch.arange(9), targets]
    expected = torch.autograd.grad(-(weights * advantages * logp).sum(), (h, w))
    for a, e in zip(torch.autograd.grad(loss, (h, w)), expected, strict=True):
        close(a, e)


def test_linear_cross_entropy_is_torch_cross_entropy():
    h, w, targets = small_head()
    loss, logp = k.linear_cross_entropy(h, w, targets, torch.full((9,), 1 / 9, **torch_double))
    expected = torch.nn.functional.cross_entropy(h @ w.T, targets)
    close(loss, expected)
    close(logp, logprobs_at_once(h, w, 1.0)[torch.arange(9), targets].detach())
    for a, e in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        close(a, e)


def test_fused_losses_refuse_a_second_backward_and_take_no_gradient_without_grad():
    h, w, targets = small_head()
    loss, _ = k.linear_cross_entropy(h, w, targets, torch.ones(9, **torch_double))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    with torch.no_grad():
        assert not k.linear_cross_entropy(h, w, targets, torch.ones(9, **torch_double))[0].requires_grad
    loss, stats = k.linear_grpo_loss(h[:0], w, targets[:0], None, None, randn(0), randn(0))
    assert loss == 0 and stats.count == 0 and stats.logp.shape == (0,)


def test_half_precision_input_keeps_float32_logits():
    """bf16 states, float32 arithmetic: the log-probabilities of the rounded input to float32 accuracy."""
    h, w, targets = (t.detach() for t in small_head(50, 300, 64))
    h, w = h.bfloat16(), w.bfloat16()
    logp, _ = k.linear_logprob(h, w, targets)
    assert logp.dtype == torch.float32
    close(logp.double(), logprobs_at_once(h.double(), w.double(), 1.0)[torch.arange(50), targets], 1e-5)


# ----------------------------------------------------------------------------------------------------------- GRPO, GSPO


def grpo_row(logp, old, ref, advantage, weight, low, high, beta, kind) -> float:
    """DeepSeekMath eq. 3 and 4 on plain numbers, written with cases instead of min and clip."""
    ratio = math.exp(logp - old)
    held = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    surrogate = min(ratio * advantage, held * advantage)
    d = ref - logp
    kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]
    return weight * (beta * kl - surrogate)


GRPO_SETTINGS = [(0.2, 0.2, 0.04, "k3"), (0.2, 0.28, 0.1, "k1"), (10.0, 10.0, 0.1, "k2"), (0.0, 0.0, 0.0, "k3")]


@pytest.mark.parametrize("settings", GRPO_SETTINGS)
def test_grpo_loss_row_by_row_and_its_gradient_by_differences(settings):
    logp, old, ref, advantages, weights = randn(5, 40)
    logp = logp - 3
    old, ref, step = logp + 0.4 * old, logp + ref, 1e-6
    rows = list(zip(logp.tolist(), *(x.tolist() for x in (old, ref, advantages, weights)), strict=True))
    leaf = logp.clone().requires_grad_()
    loss = k.grpo_loss(leaf, old, ref, advantages, weights, *settings)
    close(loss.detach(), torch.tensor([grpo_row(*row, *settings) for row in rows], **torch_double), 1e-11)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    up = [grpo_row(row[0] + step, *row[1:], *settings) for row in rows]
    down = [grpo_row(row[0] - step, *row[1:], *settings) for row in rows]
    expected = torch.tensor([(a - b) / (2 * step) for a, b in zip(up, down, strict=True)], **torch_double)
    close(slope, expected, 1e-7)


def test_grpo_statistics_count_by_hand():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 9.0], **torch_double)
    advantages = torch.tensor([1.0, -1, 1, -1, 1, 1], **torch_double)
    weights = torch.tensor([1.0, 1, 1, 2, 1, 0], **torch_double)
    ref = ratios.log() + torch.tensor([0.0, 1, 2, 0, 0, 5], **torch_double)
    _, stats = k.grpo_loss(ratios.log(), torch.zeros(6, **torch_double), ref, advantages, weights, return_stats=True)
    assert stats.clipped_sum == 2  # the first (up, A > 0) and the fourth (down, A < 0); the masked row is no row
    close(stats.ratio_sum, ratios[:5].sum())
    assert stats.ratio_max == 1.5 and stats.count == 5
    close(stats.kl_sum, torch.tensor(math.e - 2 + math.e**2 - 3, **torch_double))


def test_a_lower_bound_below_zero_never_binds():
    """R1 printed an epsilon of 10: with clip_low = 10 the bound is -9, and only the upper one can hold a ratio."""
    logp = torch.linspace(-30, 2.0, 50, **torch_double).requires_grad_()
    loss = k.grpo_loss(logp, torch.zeros_like(logp), None, -torch.ones_like(logp), torch.ones_like(logp), 10.0, 10.0)
    close(loss, logp.exp())
    close(torch.autograd.grad(loss.sum(), logp)[0], logp.exp().detach())
    loss = k.grpo_loss(logp, torch.zeros_like(logp) - 2, None, torch.ones_like(logp), torch.ones_like(logp), 10.0, 10.0)
    close(loss, -(logp + 2).exp().clamp(max=11.0))


def test_masked_rows_may_hold_anything():
    logp = torch.tensor([-1.0, torch.nan, -torch.inf], **torch_double).requires_grad_()
    old = torch.tensor([-1.2, -1.0, torch.nan], **torch_double)
    mask = torch.tensor([True, False, False])
    loss, stats = k.grpo_loss(logp, old, old, torch.ones(3, **torch_double), mask, kl_coef=0.1, return_stats=True)
    assert loss[1:].tolist() == [0, 0] and all(torch.isfinite(value) for value in stats)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert slope[0] != 0 and slope[1:].tolist() == [0, 0]


def trl_loss(logp, old, ref, advantages, mask, low, high, beta, level) -> Tensor:
    """What TRL 1.16's GRPOTrainer computes on padded [B, L] tensors with loss_type "grpo"; level: token or sequence."""
    log_ratio = logp - old
    if level == "token":
        log_weights = log_ratio
    else:
        log_weights = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    first = torch.exp(log_weights)
    second = torch.clamp(first, 1 - low, 1 + high)
    per_token = -torch.min(first * advantages[:, None], second * advantages[:, None])
    per_token = per_token + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_packed_rows_give_trl_loss_on_padded_ones(level):
    """The weights hold 1 / (sequences * length); sequence level is GSPO."""
    lengths = [5, 1, 7, 3]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).double()
    logp, old, ref = randn(3, 4, 7)
    logp = (logp - 3).requires_grad_()
    old = logp.detach() + (0.3 if level == "token" else 0.1) * old
    ref, advantages = logp.detach() + ref, randn(4, seed=5)
    expected = trl_loss(logp, old, ref, advantages, mask, 0.1, 0.15, 0.04, level)
    rows = mask.bool()
    number = torch.arange(4)[:, None].expand(4, 7)[rows]
    weights = 1 / (4 * torch.tensor(lengths, **torch_double)[number])
    ids = number if level == "sequence" else None
    streams = (logp[rows], old[rows], ref[rows], advantages[number], weights)
    loss = k.grpo_loss(*streams, 0.1, 0.15, 0.04, sequence_ids=ids)
    close(loss.sum(), expected)
    close(torch.autograd.grad(loss.sum(), logp)[0], torch.autograd.grad(expected, logp)[0])


def test_gspo_ignores_masked_rows_and_the_numbering_of_sequences():
    logp, old, advantages = randn(3, 8)
    old = logp + 0.1 * old
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1], **torch_double)
    live = weights != 0
    ids = torch.tensor([0, 0, 0, 0, 5, 5, 9, 9])
    loss = k.grpo_loss(logp, old, None, advantages, weights, sequence_ids=ids)
    kept = k.grpo_loss(logp[live], old[live], None, advantages[live], weights[live], sequence_ids=ids[live] * 3 - 100)
    close(loss[live], kept)
    assert torch.autograd.gradcheck(
        lambda x: k.grpo_loss(x, old, None, advantages, weights, 5.0, 5.0, sequence_ids=ids), (logp.requires_grad_(),)
    )
