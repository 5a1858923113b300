"""Several tokens between two looks of the sampler: the same tokens to the last bit as one by one, and fewer looks."""

import pytest
from sampling import assert_pool_empty, make_prompts, tiny_model

from r1fast.rollout import steady
from r1fast.rollout.engine import StepEngine
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.rollout.steady import SteadyEngine

SETTINGS = {
    "full length": (dict(max_tokens=30), {}),
    "greedy": (dict(max_tokens=25, temperature=0), {}),
    "ending at stops": (dict(max_tokens=40, temperature=1.5), dict(eos_token_id=(3, 5, 9, 20))),
    "waiting for min_tokens": (dict(max_tokens=22, min_tokens=9, temperature=1.3), dict(eos_token_id=(3, 5, 9, 20))),
    "preempted": (dict(max_tokens=25, n=6), dict(kv_blocks=30)),
}


class Counted(SteadyEngine):
    """Counts its visits and what they drew for each row."""

    def begin(self, kv, batch):
        super().begin(kv, batch)
        self.visits = []

    def decode(self, ahead):
        drawn = super().decode(ahead)
        self.visits.append(drawn.counts.tolist())
        return drawn


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(steady, "LONGEST", 1e9)  # however busy the machine is


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_draws_what_one_step_after_the_other_draws(model, setting):
    params, how = SETTINGS[setting]
    params, prompts = SamplingParams(**{"n": 3, "seed": 4, **params}), make_prompts(4, seed=5)
    expected = Sampler(model, max_seqs=7, block_size=4, engine=StepEngine(model), **how).sample(prompts, params)
    sampler = Sampler(model, max_seqs=7, block_size=4, engine=Counted(model), **how)
    found = sampler.sample(prompts, params)
    for a, b in zip(found, expected, strict=True):
        assert a.rollouts == b.rollouts
    assert_pool_empty(sampler)
    assert (sampler.preemptions > 0) == ("kv_blocks" in how)
    visits = sampler.engine.visits
    assert all(len(set(counts)) == 1 for counts in visits) and max(counts[0] for counts in visits) > 1


def test_it_looks_once_in_eight_steps_while_nothing_happens(model):
    sampler = Sampler(model, engine=Counted(model))
    sampler.sample(make_prompts(4, seed=5), SamplingParams(n=2, max_tokens=33))
    assert [counts[0] for counts in sampler.engine.visits] == [8, 8, 8, 8]


def test_slow_steps_come_one_by_one(model, monkeypatch):
    monkeypatch.setattr(steady, "LONGEST", -1.0)
    sampler = Sampler(model, engine=Counted(model))
    sampler.sample([[1, 2, 3]], SamplingParams(max_tokens=9))
    assert sampler.engine.visits == [[1]] * 8


def test_it_is_the_engine_of_a_cpu(model):
    assert type(Sampler(model).engine) is SteadyEngine
