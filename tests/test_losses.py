"""Losses against formulas written out from the papers, sequence by sequence, in fp64; packed against unpacked."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rollouts import VOCAB, sampled_groups, tiny_decoder

from r1fast.learn.advantages import advantages
from r1fast.learn.losses import cross_entropy_loss, log_probs, policy_loss
from r1fast.learn.packing import Row, loss_weights, pack, plan, row_lengths, rows_from_groups, unpack
from r1fast.schema import ObjectiveConfig

MAX_TOKENS, TEMPERATURE = 12, 0.8


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(dtype=torch.float64)


@pytest.fixture(scope="module")
def rows(model) -> list[Row]:
    """Rows whose old and reference log-probs are some way off, so that clips and every KL estimate matter; rounded to
    float32, so that packing them loses nothing."""
    noise = np.random.default_rng(1)
    groups = sampled_groups(model, seed=5)
    made = rows_from_groups(groups, advantages(groups, True))

    def near(values, width):
        return np.float32(np.asarray(values) + noise.normal(0, width, len(values))).tolist()

    return [replace(r, old_logprobs=near(r.old_logprobs, 0.3), ref_logprobs=near(r.old_logprobs, 0.5)) for r in made]


def unpacked_logps(model, row: Row, temperature: float) -> torch.Tensor:
    """The row alone, through all its logits."""
    tokens = torch.tensor(row.tokens)
    hidden = model.forward_packed(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
    logits = F.linear(hidden, model.head_weight) / temperature
    logp = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
    return logp[row.prompt_length - 1 :]


def naive_loss(model, rows: list[Row], objective: ObjectiveConfig, temperature: float) -> torch.Tensor:
    """DeepSeekMath eq. 3 with eq. 4's penalty and its variants, one response after the other."""
    responses = []
    for row in rows:
        logp = unpacked_logps(model, row, temperature)
        log_ratio = logp - torch.tensor(row.old_logprobs, dtype=torch.float64)
        if objective.importance == "sequence":  # GSPO eq. 7: one ratio a response, its length's root
            log_ratio = log_ratio.mean().expand(len(logp))
        terms = []
        for t in range(len(logp)):
            ratio, a = log_ratio[t].exp(), row.advantage
            clipped = torch.clamp(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
            gap = row.ref_logprobs[t] - logp[t]
            kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[objective.kl_kind]
            terms.append(torch.min(ratio * a, clipped * a) - objective.kl_coef * kl)
        responses.append(torch.stack(terms))
    if objective.aggregate == "sequence":
        return -torch.stack([r.mean() for r in responses]).mean()
    if objective.aggregate == "token":
        return -torch.cat(responses).mean()
    return -torch.cat(responses).sum() / (MAX_TOKENS * len(rows))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def packed_loss(model, rows, objective, budget, temperature=TEMPERATURE, order=None) -> float:
    weights = loss_weights(rows, objective.aggregate, MAX_TOKENS)
    total = 0.0
    for batch in pack(rows, weights, budget, order=order):
        loss, _ = policy_loss(model, batch, objective, temperature)
        loss.backward()
        total += loss.item()
    return total


OBJECTIVES = {
    "r1": {},
    "r1-eps-10": {"clip_low": 10.0, "clip_high": 10.0, "kl_coef": 0.05},
    "dapo": {"aggregate": "token", "clip_high": 0.28, "kl_coef": 0.0},
    "dr-grpo": {"aggregate": "constant", "kl_coef": 0.02},
    "k1": {"kl_kind": "k1", "kl_coef": 0.3},
    "k2": {"kl_kind": "k2", "kl_coef": 0.3},
    "k3": {"kl_kind": "k3", "kl_coef": 0.3},
    "tight-clip": {"clip_low": 0.05, "clip_high": 0.02},
    "gspo": {"importance": "sequence", "clip_low": 0.1, "clip_high": 0.05, "kl_coef": 0.05},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_papers_formula(model, rows, name):
    objective = ObjectiveConfig(**OBJECTIVES[name])
    expected = naive_loss(model, rows, objective, TEMPERATURE)
    expected.backward()
    wanted = gradients(model)
    assert packed_loss(model, rows, objective, 40) == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    for name, got in gradients(model).items():  # the weights are float32 streams: 6e-8 relative
        torch.testing.assert_close(got, wanted[name], rtol=1e-6, atol=1e-8 * float(wanted[name].abs().max() + 1))


@pytest.mark.parametrize("name", ["r1", "dapo", "gspo"])
def test_packed_is_unpacked_and_any_split_is_the_same(model, rows, name):
    objective = ObjectiveConfig(**OBJECTIVES[name])
    alone = packed_loss(model, rows, objective, 1)
    wanted = gradients(model)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for budget in (23, 60, 10_000):
        assert packed_loss(model, rows, objective, budget) == pytest.approx(alone, rel=1e-12)
        for key, got in gradients(model).items():
            torch.testing.assert_close(got, wanted[key], rtol=0, atol=1e-10)


def test_stats_are_what_they_say(model, rows):
    objective = ObjectiveConfig(clip_low=0.1, clip_high=0.2, kl_coef=0.01)
    (batch,) = pack(rows, loss_weights(rows, "sequence"), 10_000)
    _, told = policy_loss(model, batch, objective, TEMPERATURE)
    (logp,) = log_probs(model, [batch], TEMPERATURE)
    ratio, a = (logp - batch.old_logprob).exp(), batch.advantage
    gap = batch.ref_logprob - logp
    count = logp.shape[0]
    assert told.count.item() == count
    assert told.kl_sum.item() == pytest.approx((gap.exp() - gap - 1).sum().item(), rel=1e-9)
    assert told.ratio_sum.item() == pytest.approx(ratio.sum().item(), rel=1e-9)
    assert told.ratio_max.item() == pytest.approx(ratio.max().item(), rel=1e-9)
    clipped = ((ratio > 1.2) & (a > 0)) | ((ratio < 0.9) & (a < 0))
    assert 0 < clipped.sum() < count
    assert told.clipped_sum.item() == clipped.sum().item()
    assert 0.5 * math.log(VOCAB) * count < told.entropy_sum.item() < math.log(VOCAB) * count
    torch.testing.assert_close(told.logp, logp)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_on_policy_takes_the_ratio_to_itself(model, rows, importance):
    objective = ObjectiveConfig(importance=importance, kl_coef=0.0)
    order = [list(range(len(rows)))]
    weights = loss_weights(rows, "sequence")
    (batch,) = pack(rows, weights, 10_000, order=order)
    values = unpack(log_probs(model, [batch]), [batch], order)
    (at,) = pack([replace(r, old_logprobs=v) for r, v in zip(rows, values, strict=True)], weights, 10_000, order=order)
    loss, told = policy_loss(model, batch, objective, on_policy=True)
    loss.backward()
    got = gradients(model)
    assert told.ratio_max.item() == 1.0
    policy_loss(model, at, objective)[0].backward()
    for name, wanted in gradients(model).items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-7)


def test_without_a_kl_term_the_reference_stream_is_not_read(model, rows):
    objective = ObjectiveConfig(kl_coef=0.0)
    (batch,) = pack(rows, loss_weights(rows, "sequence"), 10_000)
    with_stream, _ = policy_loss(model, batch, objective)
    without, told = policy_loss(model, replace(batch, ref_logprob=None), objective)
    assert with_stream.item() == without.item()
    assert told.kl_sum.item() == 0.0


def test_cross_entropy_is_the_mean_over_completion_tokens(model, rows):
    weights = loss_weights(rows, "token")
    total = 0.0
    for batch in pack(rows, weights, 50):
        loss, told = cross_entropy_loss(model, batch)
        loss.backward()
        total += loss.item()
        assert told is None
    got = gradients(model)
    expected = -torch.cat([unpacked_logps(model, row, 1.0) for row in rows]).mean()
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    for name, wanted in gradients(model).items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_tempered_softmax(model, rows, temperature):
    order = plan(row_lengths(rows), 50)
    batches = pack(rows, None, 50, order=order)
    values = log_probs(model, batches, temperature)
    assert not any(v.requires_grad for v in values)
    for row, found in zip(rows, unpack(values, batches, order), strict=True):
        wanted = unpacked_logps(model, row, temperature).detach().float().numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
