"""Guessed tokens change nothing but the number of steps."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from sampling import VOCABULARY, assert_logprobs_close, assert_pool_empty, make_prompts, tiny_model, tokens_of

from r1fast.rollout.engine import StepEngine
from r1fast.rollout.exact import ExactEngine
from r1fast.rollout.graphs import GraphEngine
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.rollout.speculation import Corpus, Speculation, Trust, accepted


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def repetitive():
    """A model that mostly says a word's successor, the same after the same two words: guesses are often right."""
    model = tiny_model()
    with torch.no_grad():
        model.head.mul_(6)
    return model


def guessing(model, *arguments) -> Sampler:
    return Sampler(model, *arguments, engine=Speculation(StepEngine(model), rows=8))


class Countdown(Corpus):
    """Guesses what a sequence is told to guess: right ones, wrong ones and none, by turns."""

    script: ClassVar[dict] = {}

    def guess(self, sample, depth):
        text = self._texts.get(sample, self._prompt)
        said = self.script[tuple(self._prompt), sample][len(text) - len(self._prompt) :][:depth]
        turn = len(text) % 4
        if turn == 0:
            return []
        return [*said[: turn - 1], *((token + 1) % VOCABULARY for token in said[turn - 1 : turn]), *said[turn:]][:depth]


SETTINGS = {
    "sampled": (dict(max_tokens=25, temperature=1.1), {}),
    "greedy": (dict(max_tokens=25, temperature=0), {}),
    "truncated": (dict(max_tokens=20, top_k=9, top_p=0.9), {}),
    "waiting for min_tokens": (dict(max_tokens=22, min_tokens=9, temperature=1.3), {}),
    "preempted": (dict(max_tokens=25, n=6), dict(kv_blocks=30)),
    "few blocks": (dict(max_tokens=25, n=2), dict(kv_blocks=17)),
}
ENGINES = {"steps": StepEngine, "on the device": lambda model: GraphEngine(model, 3), "exact": ExactEngine}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_right_and_wrong_guesses_give_the_tokens_of_none(model, setting, engine, monkeypatch):
    """Guesses of every kind: the first token wrong, a later one, all right, more than the row may still draw."""
    params, how = SETTINGS[setting]
    prompts = [list(prompt) for prompt in dict.fromkeys(map(tuple, make_prompts(4, seed=5)))]
    params = SamplingParams(**{"n": 3, "seed": 4, **params})
    expected = Sampler(model, 4, block_size=4, engine=ENGINES[engine](model)).sample(prompts, params)
    long = params.__class__(**{**{name: getattr(params, name) for name in params.__slots__}, "max_tokens": 40})
    script = Sampler(model, block_size=4, engine=StepEngine(model)).sample(prompts, long)  # goes on behind stops
    Countdown.script = {
        (tuple(p), i): r.tokens for p, g in zip(prompts, script, strict=True) for i, r in enumerate(g.rollouts)
    }
    monkeypatch.setattr("r1fast.rollout.speculation.Corpus", Countdown)
    monkeypatch.setattr(Trust, "WORTH", 0.0)
    sampler = Sampler(model, 4, block_size=4, engine=Speculation(ENGINES[engine](model), rows=40, depth=6), **how)
    found = sampler.sample(prompts, params)
    assert tokens_of(found) == tokens_of(expected)
    assert_logprobs_close(found, expected, 0 if engine == "exact" else 1e-5)
    assert_pool_empty(sampler)
    told = sampler.acceptance
    assert 0 < told.accepted < told.drafted and told.steps > 5
    assert (sampler.preemptions > 0) == ("kv_blocks" in how)


def test_a_model_that_repeats_itself_takes_fewer_steps(repetitive):
    params, prompts = SamplingParams(n=2, max_tokens=80, temperature=0.5, seed=1), make_prompts(1, 7, 20)
    plain = Sampler(repetitive, engine=StepEngine(repetitive)).sample(prompts, params)
    sampler = guessing(repetitive)
    assert tokens_of(sampler.sample(prompts, params)) == tokens_of(plain)
    told = sampler.acceptance
    assert told.steps + told.plain_steps < 0.6 * 79
    assert told.rate > 0.3 and told.drafted > told.accepted > 50


def test_drafts_rest_where_they_are_wrong(model):
    """A random model at a high temperature says nothing twice: after some steps nothing is guessed for a while."""
    sampler = guessing(model)
    sampler.sample([[1, 2, 3]], SamplingParams(n=4, max_tokens=100, temperature=2.0))
    told = sampler.acceptance
    assert told.plain_steps > 2 * told.steps > 0


def test_no_drafts_while_many_run(model):
    sampler = guessing(model)
    sampler.sample(make_prompts(5), SamplingParams(max_tokens=20))
    assert sampler.acceptance.steps == 0 and sampler.acceptance.plain_steps == 19


def test_siblings_that_have_finished_are_a_source(repetitive):
    """One sample runs longer than the other fifteen, which never ran with drafts: what they said is known."""
    seen = []
    guess = Corpus.guess

    def spy(corpus, sample, depth):
        seen.append(set(corpus._texts))
        return guess(corpus, sample, depth)

    params = SamplingParams(n=16, max_tokens=60, seed=3)
    stop = next(
        token
        for token in range(VOCABULARY)
        if 1
        <= sum(token not in tokens[:40] for tokens in tokens_of(Sampler(repetitive).sample([[5, 6]], params))[0])
        <= 4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corpus, "guess", spy)
        guessing(repetitive, stop).sample([[5, 6]], params)
    assert seen and all(samples == set(range(16)) for samples in seen)


def test_what_is_accepted():
    drawn = np.array([[3, 4, 5, 6], [3, 9, 5, 6], [3, 4, 5, 6], [3, 4, 5, 6], [8, 0, 0, 0]])
    given = np.array([[1, 3, 4, 5], [1, 3, 4, 5], [1, 3, 4, 0], [1, 3, 4, 5], [1, 0, 0, 0]])
    lengths = np.array([3, 3, 2, 3, 0])
    stops = np.array([[-1], [-1], [-1], [4], [-1]])
    assert accepted(drawn, given, lengths, stops).tolist() == [3, 1, 2, 1, 0]


def test_a_corpus_guesses_the_likeliest_and_goes_on_from_its_guess():
    corpus = Corpus((1, 2, 3, 4))
    assert corpus.guess(0, 5) == []
    corpus.extend(0, [1, 2])
    assert corpus.guess(0, 5) == [3, 4, 1, 2, 3]
    corpus.extend(1, [7, 1, 2, 9, 1, 2, 9])
    assert corpus.guess(0, 2) == [9, 1]  # [3, 4, 1, 2] is followed by nothing yet; after [1, 2] come 9, 9 and 3
    corpus.extend(2, [1, 2, 3])
    assert corpus.guess(0, 2) == [3, 4]  # now it is, and four outweigh two


def test_trust_rests_and_tries_again():
    trust = Trust()
    for _ in range(40):
        if not trust.allows():
            break
        trust.learn(2, 0)
    assert trust.resting and sum(trust.allows() for _ in range(Trust.REST)) == 1 and trust.allows()
    for _ in range(40):
        trust.learn(2, 4)
        assert trust.allows()
