"""The `exact` mode: every bit of a request's log-probabilities, whatever is around it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sampling import assert_pool_empty, make_prompts, tiny_model, tokens_of

from r1fast.config import UserError
from r1fast.rollout.engine import StepEngine
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast_kernels import native, use_backend

PROMPTS = make_prompts(14, seed=2)
PARAMS = [SamplingParams(n=1 + i % 4, max_tokens=5 + i, temperature=i / 10, top_k=i % 3 * 9, seed=i) for i in range(14)]
SURROUNDINGS = [
    dict(), dict(max_seqs=5, block_size=4), dict(prefill_tokens=7), dict(prefill_tokens=1, block_size=32),
    dict(kv_blocks=26, block_size=4, max_seqs=60),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def bits(groups):
    return [[(rollout.tokens, rollout.logprobs, rollout.logprobs_full) for rollout in g.rollouts] for g in groups]


def sampled(model, exact=True, surroundings=SURROUNDINGS):
    """The same requests alone, and in other surroundings; the last preempts."""
    found = [[Sampler(model, 4, exact=exact).sample([p], q)[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]]
    for options in surroundings:
        sampler = Sampler(model, 4, exact=exact, **options)
        found.append(sampler.sample(PROMPTS, PARAMS))
        assert (sampler.preemptions > 0) == ("kv_blocks" in options)
        found.append(sampler.sample(PROMPTS[::-1], PARAMS[::-1])[::-1])  # the other way round, prompts in the cache
        assert sampler.found_tokens > 0 or options.get("block_size") == 32  # longer than most of the prompts
        assert_pool_empty(sampler)
    assert all(tokens_of(groups) == tokens_of(found[0]) for groups in found)
    return [bits(groups) for groups in found]


@pytest.mark.parametrize("threads", [1, 2])
def test_alone_crowded_chunked_cached_or_preempted(model, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = sampled(model, surroundings=SURROUNDINGS if threads == 1 else SURROUNDINGS[:1])
    finally:
        torch.set_num_threads(before)
    assert all(other == first for other in others)


def halves(x, weight):
    """A product whose sums are split in two."""
    middle = x.shape[-1] // 2
    return F.linear(x[..., :middle], weight[:, :middle]) + F.linear(x[..., middle:], weight[:, middle:])


def by_size(x, weight, bias=None):
    """A product whose rounding depends on the number of rows, as in libraries that choose a kernel by it."""
    return halves(x, weight) if len(x) > 16 else F.linear(x, weight)


def by_place(x, weight, bias=None):
    """A product whose rounding depends on the place of a row."""
    return torch.where((torch.arange(len(x)) % 2 == 0)[:, None], halves(x, weight), F.linear(x, weight))


def with_product(monkeypatch, product):
    """A model whose decoder multiplies with `product`, op by op."""
    from r1fast.model import decoder

    monkeypatch.setattr(decoder, "linear", product)
    monkeypatch.setattr(decoder.native_forward, "takes", lambda *_: False)
    return tiny_model()


@pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
def test_our_own_products_need_nothing_and_a_librarys_are_filled_up(model):
    """With the native products the usual mode is exact as well, but for prompts that go several queries a sequence."""
    sampler = Sampler(model, exact=True)
    sampler.sample([[1]], SamplingParams(max_tokens=1))
    assert sampler.engine.way == "plain"
    with use_backend("reference"):
        sampler = Sampler(model, exact=True)
        sampler.sample([[1]], SamplingParams(max_tokens=1))
    assert sampler.engine.way in ("plain", "padded", "cut")  # the library's, whatever it is


def test_products_that_depend_on_the_number_of_rows_are_cut(monkeypatch):
    model = with_product(monkeypatch, by_size)
    first, *others = sampled(model)
    assert all(other == first for other in others)
    sampler = Sampler(model, exact=True)
    sampler.sample([[1]], SamplingParams(max_tokens=1))
    assert sampler.engine.way == "cut"
    loose, *others = sampled(model, exact=False)
    assert any(other != loose for other in others)  # what the mode is for


def test_where_it_cannot_be_it_is_refused(monkeypatch, model):
    bad = with_product(monkeypatch, by_place)
    with pytest.raises(UserError, match=r"exact: on cpu the bits of a row in torch\.float32 depend on its place"):
        Sampler(bad, exact=True).sample([[1]], SamplingParams(max_tokens=1))
    with pytest.raises(UserError, match="exact comes with an engine of its own"):
        Sampler(model, exact=True, engine=StepEngine(model))


def test_the_benchmark_times_both_and_counts_other_tokens(monkeypatch, capsys):
    from benchmarks import exact

    small = replace(tiny_model().config, max_positions=64)
    monkeypatch.setattr(exact, "MODELS", {"3M": small})
    monkeypatch.setattr(exact, "CASES", ((2, 20, 2, 3),))
    (case,) = exact.measure("3M", turns=2)
    assert case["draws"] == 3 * 2 * 2 * 3 and case["other"] == 0
    assert 0 < case["low"] <= case["ratio"] <= case["high"]
    about = {"machine": "a machine", "threads": 1, "torch": "2", "commit": "abc"}
    assert "| 3M | 2 x 20 | 2 x 3 | " in exact.table({**about, "cases": [case]})
    assert exact.differing([[[[1, 2, 3], [4, 5]]], [[[1, 9, 8], [4, 5]]]]) == (1, 4)
