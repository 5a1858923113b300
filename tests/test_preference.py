"""Reward models: the two losses by their formulas, any split the same, and a preference that is learned."""

import copy
import math
from random import Random

import pytest
import torch
from rollouts import VOCAB, tiny_decoder

from r1fast.learn.learner import Learner
from r1fast.learn.preference import (
    pack_pairs,
    pack_responses,
    pairwise_loss,
    pairwise_steps,
    pointwise_loss,
    pointwise_steps,
    preference_step,
    score,
)
from r1fast.model.reward_model import RewardModel
from r1fast.schema import OptimizerConfig


def made_up(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Pairs of random sequences; the chosen one ends with an even token, the rejected with an odd one."""
    random = Random(seed)

    def sequence(parity: int) -> list[int]:
        head = [random.randrange(VOCAB) for _ in range(random.randint(1, 7))]
        return [*head, 2 * random.randrange(VOCAB // 2) + parity]

    return [(sequence(0), sequence(1)) for _ in range(count)]


def alone(model: RewardModel, tokens: list[int]) -> torch.Tensor:
    return model.forward_packed(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))[0]


@pytest.fixture
def model() -> RewardModel:
    return RewardModel.from_decoder(tiny_decoder(), seed=0)


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_bradley_terry(model, budget):
    pairs = made_up(9)
    expected = sum(-math.log(1 / (1 + math.exp((alone(model, r) - alone(model, c)).item()))) for c, r in pairs) / 9
    right = sum(alone(model, c) > alone(model, r) for c, r in pairs)
    batches = pack_pairs(pairs, budget)
    told = [pairwise_loss(model, batch) for batch in batches]
    assert sum(loss.item() for loss, _ in told) == pytest.approx(expected, rel=1e-4)
    assert sum(int(r) for _, r in told) == right
    assert (len(batches) == 1) == (budget == 1000)


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_logistic(model, budget):
    sequences = [s for pair in made_up(5) for s in pair]
    labels = [1.0, 0.0] * 5
    chances = [torch.sigmoid(alone(model, s)).item() for s in sequences]
    expected = -sum(math.log(c if y else 1 - c) for c, y in zip(chances, labels, strict=True)) / 10
    told = [pointwise_loss(model, batch) for batch in pack_responses(sequences, labels, budget)]
    assert sum(loss.item() for loss, _ in told) == pytest.approx(expected, rel=1e-4)
    assert sum(int(r) for _, r in told) == sum((c > 0.5) == (y == 1) for c, y in zip(chances, labels, strict=True))


def test_a_split_step_is_the_whole_step(model):
    pairs, found = made_up(16), []
    for budget in (20, 10_000):
        twin = copy.deepcopy(model)
        stats, _ = preference_step(Learner(twin, OptimizerConfig(), 1), pack_pairs(pairs, budget), pairwise_loss)
        found.append((stats.loss, stats.grad_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_scores_come_back_in_order(model):
    sequences = [s for pair in made_up(8) for s in pair]
    expected = [alone(model, s).item() for s in sequences]
    assert score(model, sequences, 24) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="empty sequence"):
        score(model, [[]])


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_a_preference_is_learned(model, kind):
    pairs = made_up(200)
    learner = Learner(model, OptimizerConfig(learning_rate=5e-3), 60)
    if kind == "pairwise":
        steps, loss = pairwise_steps(pairs, steps=60, batch_pairs=32, micro_batch_tokens=400), pairwise_loss
    else:
        sequences, labels = [s for pair in pairs for s in pair], [1.0, 0.0] * len(pairs)
        steps = pointwise_steps(sequences, labels, steps=60, batch_responses=64, micro_batch_tokens=400)
        loss = pointwise_loss
    accuracy = [preference_step(learner, batches, loss)[1] for batches in steps]
    assert accuracy[0] < 0.8
    held_out = made_up(100, seed=1)
    chosen, rejected = score(model, [c for c, _ in held_out]), score(model, [r for _, r in held_out])
    assert sum(c > r for c, r in zip(chosen, rejected, strict=True)) >= 97
