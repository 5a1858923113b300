"""Optimizer steps and whole updates: what is computed, what is not, and that the result is that of the long way."""

import copy
import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from rollouts import sampled_groups, tiny_decoder

from r1fast.config import UserError
from r1fast.learn.advantages import advantages
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss, log_probs, policy_loss
from r1fast.learn.packing import loss_weights, pack, row_from_example, rows_from_groups, supervised_steps
from r1fast.metrics import PhaseTimer
from r1fast.model.decoder import Decoder
from r1fast.schema import ObjectiveConfig, OptimizerConfig
from r1fast.types import Prompt, Rollout, RolloutGroup

FLAT = ObjectiveConfig(kl_coef=0.0)
PENALISED = ObjectiveConfig(kl_coef=0.05)


def learner_of(model: Decoder, **settings) -> Learner:
    return Learner(model, OptimizerConfig(**{"learning_rate": 3e-3, **settings}), 100)


def weights_of(model: Decoder) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def forwards(monkeypatch) -> list[Decoder]:
    """The models whose packed forward was called, one entry a call."""
    calls, original = [], Decoder.forward_packed

    def counted(self, *args, **more):
        calls.append(self)
        return original(self, *args, **more)

    monkeypatch.setattr(Decoder, "forward_packed", counted)
    return calls


# -- one step -------------------------------------------------------------------------------------------------


def example_batches(budget: int = 1000):
    rows = [row_from_example([i % 5, 3], [(i * 7 + k) % 19 for k in range(1 + i % 4)]) for i in range(12)]
    return pack(rows, loss_weights(rows, "token"), budget)


def test_a_step_clips_by_the_global_norm_and_reports_the_norm_before():
    model = tiny_decoder()
    reference = copy.deepcopy(model)
    stats = learner_of(model, max_grad_norm=0.1).step(example_batches(), cross_entropy_loss)
    loss, _ = cross_entropy_loss(reference, *example_batches())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.2
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    assert stats.learning_rate == 3e-3
    assert stats.tokens == sum(b.tokens.shape[0] for b in example_batches())
    torch.optim.AdamW(reference.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0).step()
    torch.testing.assert_close(weights_of(model), weights_of(reference), rtol=0, atol=2e-6)
    assert model.weights_version == 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where):
    model = tiny_decoder()
    learner = learner_of(model)
    learner.step(example_batches(), cross_entropy_loss)
    before, state = weights_of(model).clone(), copy.deepcopy(learner.optimizer.state_dict())

    def broken(model, batch):
        loss, _ = cross_entropy_loss(model, batch)
        if where == "gradient":
            loss.register_hook(lambda g: g * math.inf)
            return loss, None
        return loss * math.nan, None

    stats = learner.step(example_batches(), broken)
    assert not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm))
    assert torch.equal(weights_of(model), before)
    torch.testing.assert_close(learner.optimizer.state_dict(), state, rtol=0, atol=0)
    assert (learner.steps, learner.skipped, model.weights_version) == (2, 1, 1)
    assert math.isfinite(learner.step(example_batches(), cross_entropy_loss).loss)
    assert not torch.equal(weights_of(model), before)


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    settings = {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    whole = tiny_decoder()
    learner = learner_of(whole, **settings)
    for _ in range(3):
        learner.step(example_batches(40), cross_entropy_loss)
    torch.save({"learner": learner.state_dict(), "model": whole.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        learner.step(example_batches(40), cross_entropy_loss)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = tiny_decoder(seed=9)
    resumed.load_state_dict(saved["model"])
    other = learner_of(resumed, **settings)
    other.load_state_dict(saved["learner"])
    stats = [other.step(example_batches(40), cross_entropy_loss) for _ in range(3)]
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert other.steps == learner.steps == 6
    assert stats[-1].learning_rate == learner.schedule(5)


def test_a_state_of_another_schedule_is_refused():
    state = learner_of(tiny_decoder()).state_dict()
    with pytest.raises(ValueError, match="was to run 100 steps, this one 7"):
        Learner(tiny_decoder(), OptimizerConfig(), 7).load_state_dict(state)


# -- groups that are learned from as they arrive ----------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize(("mini_batches", "kl", "old"), [(1, 0.1, "auto"), (1, 0.0, "sampler"), (2, 0.1, "recompute")])
def test_a_gradient_begun_early_is_the_one_that_waited_for_all_bit_for_bit(aggregate, mini_batches, kl, old):
    objective = ObjectiveConfig(aggregate=aggregate, kl_coef=kl)
    order, found, begun = [3, 0, 5, 4, 1, 2, 7, 6], {}, {}
    for now in (False, True):
        model = tiny_decoder()
        groups = sampled_groups(model, prompts=8, noise=0.01, constant=(4,))
        learner = learner_of(model)
        settings = {"random": Random(1), "mini_batches": mini_batches, "epochs": 2, "max_tokens": 9}
        learning = learner.policy_learning(
            [4] * 8, objective, reference=tiny_decoder(2), old_logprobs=old, micro_batch_tokens=40, **settings
        )
        before = weights_of(model).clone()
        for index in order:
            learning.add(index, groups[index], now)
        begun[now] = any(p.grad is not None for p in model.parameters())
        assert torch.equal(weights_of(model), before)  # they move when all is there, and not before
        update = learning.finish()
        found[now] = (weights_of(model), update)
        assert (weights_of(model) - before).abs().max() > 1e-3
    assert begun == {False: False, True: True}
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] == found[False][1]


def test_groups_of_older_weights_wait_for_the_others():
    model = tiny_decoder()
    groups = sampled_groups(model, prompts=2)
    model.bump_version()
    learning = learner_of(model).policy_learning([4, 4], FLAT, random=Random(0))
    with pytest.raises(ValueError, match="older weights"):
        learning.add(0, groups[0], now=True)


def test_an_update_of_groups_that_are_not_there_is_refused():
    model = tiny_decoder()
    learning = learner_of(model).policy_learning([4, 4], FLAT, random=Random(0))
    learning.add(1, sampled_groups(model, prompts=2)[1])
    with pytest.raises(ValueError, match="1 of 2 groups"):
        learning.finish()


# -- updates: what is forwarded -------------------------------------------------------------------------------


def test_without_kl_the_reference_is_never_called(forwards):
    model, reference = tiny_decoder(), tiny_decoder(1)
    groups = sampled_groups(model)
    forwards.clear()
    update = learner_of(model).train_policy(groups, FLAT, random=Random(0), reference=reference)
    assert forwards == [model]
    assert update.kl == 0.0


def test_with_kl_the_reference_is_called_once_a_rollout(forwards):
    model, reference = tiny_decoder(), tiny_decoder(1)
    groups = sampled_groups(model)
    forwards.clear()
    timer = PhaseTimer()
    update = learner_of(model).train_policy(
        groups, PENALISED, random=Random(0), reference=reference, mini_batches=2, epochs=2, timer=timer
    )
    assert forwards == [reference, model, reference, model, model, model]  # each part before it is first learned
    assert len(update.steps) == 4
    assert update.kl > 0.01
    assert set(timer.seconds) == {"logprob", "learn"}


@pytest.mark.parametrize(
    ("old", "noise", "extra", "whose"),
    [
        ("auto", 0.0, 0, "sampler"),
        ("auto", 0.05, 1, "learner"),
        ("sampler", 0.05, 0, "sampler"),
        ("recompute", 0.0, 1, "learner"),
    ],
)
def test_old_log_probs_cost_a_pass_only_where_they_must(forwards, old, noise, extra, whose):
    model = tiny_decoder()
    groups = sampled_groups(model, noise=noise)
    forwards.clear()
    update = learner_of(model).train_policy(
        groups, FLAT, random=Random(0), old_logprobs=old, logprob_bound=1e-3, mini_batches=2
    )
    assert len(forwards) == 2 + extra
    assert update.old_logprobs == whose
    if noise:
        assert 0.5 * noise < update.logprob_difference_mean < 1.5 * noise
        assert 1.5 * noise < update.logprob_difference_max < 5 * noise
    else:
        assert update.logprob_difference_max < 1e-5


def test_one_step_never_costs_a_second_pass(forwards):
    model = tiny_decoder()
    groups = sampled_groups(model, noise=0.5)
    for old in ("auto", "recompute", "sampler"):
        forwards.clear()
        update = learner_of(copy.deepcopy(model)).train_policy(groups, FLAT, random=Random(0), old_logprobs=old)
        assert len(forwards) == 1
        assert (update.steps[0].ratio_max == 1.0) == (old != "sampler")


def test_groups_of_older_weights_keep_the_samplers_log_probs(forwards):
    model = tiny_decoder()
    groups = sampled_groups(model, noise=0.3)
    model.bump_version()
    forwards.clear()
    update = learner_of(model).train_policy(groups, FLAT, random=Random(0), mini_batches=2)
    assert len(forwards) == 2
    assert update.steps[0].ratio_max > 1.1


# -- updates: that they are right -------------------------------------------------------------------------------


def long_way(model: Decoder, groups, objective, old: str, mini_batches: int, epochs: int, reference=None) -> None:
    """The same update at temperature 0.7, with nothing left out or reused: every row forwarded, one at a time."""
    learner = learner_of(model)
    rows = rows_from_groups(groups, advantages(groups, objective.normalize_std))
    for i, row in enumerate(rows):
        batches = pack([row], None, 1)
        if old == "recompute":
            row = replace(row, old_logprobs=log_probs(model, batches, 0.7)[0].tolist())
        if reference is not None:
            row = replace(row, ref_logprobs=log_probs(reference, batches, 0.7)[0].tolist())
        rows[i] = row
    random, size = Random(3), len(groups[0].rollouts)
    for _ in range(epochs):
        order = list(range(len(groups)))
        random.shuffle(order)
        for index in range(mini_batches):
            part = [rows[g * size + k] for g in order[index::mini_batches] for k in range(size)]
            batches = pack(part, loss_weights(part, objective.aggregate, 16), 1)
            learner.step(batches, lambda model, batch: policy_loss(model, batch, objective, 0.7))


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_an_update_is_the_long_ways(aggregate, importance, kl):
    model = tiny_decoder(dtype=torch.float64)
    reference = tiny_decoder(4, dtype=torch.float64)
    groups = sampled_groups(model, prompts=5, noise=0.02, constant=(1, 2))
    objective = ObjectiveConfig(aggregate=aggregate, importance=importance, kl_coef=kl, clip_low=0.1, clip_high=0.1)
    start, slow = weights_of(model).clone(), copy.deepcopy(model)
    long_way(slow, groups, objective, "recompute", 2, 2, reference if kl else None)
    settings = {"mini_batches": 2, "epochs": 2, "max_tokens": 16, "micro_batch_tokens": 30, "temperature": 0.7}
    update = learner_of(model).train_policy(groups, objective, random=Random(3), reference=reference, **settings)
    assert update.groups_trained == (5 if kl else 3)
    assert update.clip_fraction > 0
    # log-probs are handed on in float32: 1e-7 in a ratio, which Adam's division makes larger for tiny gradients
    assert (weights_of(slow) - start).abs().max() > 5e-3
    torch.testing.assert_close(weights_of(model), weights_of(slow), rtol=0, atol=5e-6)


def test_leaving_out_rows_without_gradient_changes_no_gradient():
    model = tiny_decoder(dtype=torch.float64)
    groups = sampled_groups(model, prompts=6, constant=(0, 2, 5))
    rows = rows_from_groups(groups, advantages(groups, True))
    weights = loss_weights(rows, "sequence")
    live = [i for i, row in enumerate(rows) if row.advantage != 0.0]
    assert 0 < len(live) <= 12
    found = []
    for kept in (list(range(len(rows))), live):
        model.zero_grad()
        for batch in pack([rows[i] for i in kept], weights[kept], 1000):
            policy_loss(model, batch, FLAT)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)


def test_micro_batches_do_not_change_an_update():
    found = []
    for budget in (1, 25, 100_000):
        model = tiny_decoder(dtype=torch.float64)
        groups = sampled_groups(model, prompts=6, noise=0.01)
        settings = {"random": Random(1), "mini_batches": 3, "micro_batch_tokens": budget}
        learner_of(model).train_policy(groups, PENALISED, reference=tiny_decoder(2, torch.float64), **settings)
        found.append(weights_of(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-8)


def test_sharing_prompts_changes_no_update_and_is_chosen_where_it_saves():
    found, tokens = {}, {}
    for share in ("never", "always", "auto"):
        model = tiny_decoder(dtype=torch.float64)
        groups = sampled_groups(model, prompts=6, noise=0.01)
        settings = {"random": Random(1), "mini_batches": 2, "micro_batch_tokens": 40, "share_prompts": share}
        update = learner_of(model).train_policy(
            groups, PENALISED, reference=tiny_decoder(2, torch.float64), old_logprobs="recompute", **settings
        )
        found[share], tokens[share] = weights_of(model), sum(step.tokens for step in update.steps)
    torch.testing.assert_close(found["always"], found["never"], rtol=0, atol=1e-8)
    assert tokens["always"] < tokens["never"] and tokens["auto"] == tokens["always"]
    long = [replace(g, rollouts=[replace(r, tokens=r.tokens * 40, logprobs=r.logprobs * 40) for r in g.rollouts])
            for g in sampled_groups(tiny_decoder(), prompts=1, size=2)]  # fmt: skip
    update = learner_of(tiny_decoder()).train_policy(long, PENALISED, random=Random(0), reference=tiny_decoder(1))
    whole = sum(len(long[0].prompt.tokens) + len(r.tokens) - 1 for r in long[0].rollouts)
    assert update.steps[0].tokens == whole


@pytest.mark.parametrize("old", ["auto", "recompute"])
def test_truncated_importance_sampling_weighs_the_policy_term(old):
    model = tiny_decoder(dtype=torch.float64)
    groups = sampled_groups(model, noise=0.4)
    objective = ObjectiveConfig(kl_coef=0.1, truncated_is=1.2, aggregate="token")
    reference, twin = tiny_decoder(2, torch.float64), copy.deepcopy(model)
    update = learner_of(model).train_policy(
        groups, objective, random=Random(0), reference=reference, old_logprobs=old, micro_batch_tokens=50
    )
    assert 0.2 < update.logprob_difference_mean < 0.6
    rows = rows_from_groups(groups, advantages(groups, True))
    (batch,) = pack(rows, loss_weights(rows, "token"), 10_000)
    hidden = twin.forward_packed(batch.tokens, batch.cu_seqlens)[batch.rows]
    logp = torch.log_softmax(twin.logits(hidden).double(), -1).gather(1, batch.targets[:, None])[:, 0]
    (ref,) = log_probs(reference, [batch])
    weight = (logp.detach() - batch.old_logprob).exp().clamp(max=1.2)
    ratio, gap = (logp - logp.detach()).exp(), ref - logp
    loss = (batch.loss_weight * (-weight * ratio * batch.advantage + 0.1 * (gap.exp() - gap - 1))).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert update.steps[0].loss == pytest.approx(loss.item(), rel=1e-5)
    assert update.steps[0].grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_truncated_importance_sampling_is_left_out_where_the_samplers_are_exact(forwards):
    model = tiny_decoder()
    groups = sampled_groups(model)
    forwards.clear()
    learner_of(model).train_policy(groups, ObjectiveConfig(kl_coef=0.0, truncated_is=2.0), random=Random(0))
    assert len(forwards) == 2  # the probe, the step


def test_an_update_without_any_difference_in_reward_moves_no_weight_from_the_start(forwards):
    model = tiny_decoder()
    before = weights_of(model).clone()
    groups = sampled_groups(model, constant=range(4))
    forwards.clear()
    update = learner_of(model).train_policy(groups, FLAT, random=Random(0), mini_batches=2, old_logprobs="recompute")
    assert forwards == []
    assert (update.groups_trained, update.loss, update.grad_norm) == (0, 0.0, 0.0)
    assert update.logprob_difference_mean is None
    assert torch.equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"mini_batches": 5}, "4 prompts cannot be split into 5 mini-batches"),
        ({"objective": PENALISED}, "needs a reference model"),
        ({"objective": ObjectiveConfig(kl_coef=0.0, truncated_is=2.0), "old_logprobs": "sampler"}, "truncated_is"),
    ],
)
def test_settings_that_cannot_be_met_are_one_sentence(settings, words):
    model = tiny_decoder()
    objective = settings.pop("objective", FLAT)
    with pytest.raises(UserError, match=words):
        learner_of(model).train_policy(sampled_groups(model), objective, random=Random(0), **settings)


# -- it learns --------------------------------------------------------------------------------------------------


def test_the_policy_finds_the_optimum_of_a_bandit():
    """Prompt p pays 1 for the one-token answer (3 p + 1) mod 19: from 1/19 each to certainty."""
    model = tiny_decoder()
    learner = Learner(model, OptimizerConfig(learning_rate=1e-2), 80)
    random, noise = Random(0), torch.Generator().manual_seed(0)
    prompts = [(p, (2 * p) % 19) for p in range(6)]
    best = torch.tensor([(3 * p + 1) % 19 for p in range(6)])

    def answer_logprobs() -> torch.Tensor:
        tokens = torch.tensor(prompts).flatten()
        with torch.no_grad():
            hidden = model.forward_packed(tokens, torch.arange(0, 13, 2, dtype=torch.int32))
            return torch.log_softmax(model.logits(hidden[1::2]), -1)

    start = answer_logprobs().exp()[torch.arange(6), best]
    assert start.max() < 0.3
    for _ in range(80):
        logp = answer_logprobs()
        drawn = torch.multinomial(logp.exp(), 16, replacement=True, generator=noise)
        groups = []
        for p, prompt in enumerate(prompts):
            picks = [(t, logp[p, t].item()) for t in drawn[p].tolist()]
            rollouts = [Rollout([t], [v], "stop", reward=float(t == best[p])) for t, v in picks]
            groups.append(RolloutGroup(Prompt(str(p), prompt, "", None, "bandit"), rollouts, model.weights_version))
        learner.train_policy(groups, FLAT, random=random, mini_batches=2)
    assert answer_logprobs().exp()[torch.arange(6), best].min() > 0.95


def test_supervised_steps_learn_by_heart():
    random = np.random.default_rng(0)
    rows = [row_from_example([i], random.integers(0, 19, 4).tolist()) for i in range(8)]
    model = tiny_decoder()
    learner = Learner(model, OptimizerConfig(learning_rate=1e-2), 80)
    batches = supervised_steps(rows, steps=80, batch_examples=8, micro_batch_tokens=20)
    losses = [learner.step(batch, cross_entropy_loss).loss for batch in batches]
    assert losses[0] > 2.0
    assert losses[-1] < 0.1
