"""Steps that do not ask the host draw what ordinary steps draw; as CUDA graphs where there is a GPU."""

from types import SimpleNamespace

import pytest
import torch
from sampling import assert_logprobs_close, assert_pool_empty, make_prompts, tiny_model, tokens_of

from r1fast.rollout import graphs
from r1fast.rollout.engine import StepEngine, take_stops
from r1fast.rollout.graphs import GraphEngine, bucket, columns_for
from r1fast.rollout.sampler import Sampler, SamplingParams

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to capture a graph on")
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def numbers(groups, name="logprobs"):
    return [torch.tensor(getattr(rollout, name)) for group in groups for rollout in group.rollouts]


def test_buckets_hold_what_they_are_asked_for():
    for rows in range(1, 900):
        assert rows <= bucket(rows) < max(rows + 64, 2 * rows)
        assert rows <= columns_for(rows) < 2 * rows
    assert [bucket(n) for n in (1, 2, 3, 5, 9, 17, 512, 513)] == [1, 2, 4, 8, 16, 32, 512, 576]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_on_the_device_have_the_bits_of_ordinary_ones(model, steps):
    """Sizes that fit their buckets, so that both make the same products: 8 rows that all end together, twice."""
    params = SamplingParams(n=4, max_tokens=21, temperature=0.9, seed=3)
    for prompts in (make_prompts(2), make_prompts(4)[2:]):
        expected = Sampler(model, block_size=4, engine=StepEngine(model)).sample(prompts, params)
        found = Sampler(model, block_size=4, engine=GraphEngine(model, steps)).sample(prompts, params)
        assert tokens_of(found) == tokens_of(expected)
        for name in ("logprobs", "logprobs_full"):
            assert all(map(torch.equal, numbers(found, name), numbers(expected, name)))


SETTINGS = {
    "stops": (dict(max_tokens=25, temperature=1.1), {}),
    "limits of their own": (dict(max_tokens=25), dict(limits=True)),
    "waiting for min_tokens": (dict(max_tokens=18, min_tokens=9, temperature=1.3, top_k=9, top_p=0.9), {}),
    "greedy": (dict(max_tokens=17, temperature=0), {}),
    "preempted": (dict(max_tokens=25, n=4), dict(kv_blocks=40)),
    "few rows at a time": (dict(max_tokens=12, n=3), dict(max_seqs=5)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [2, 7])
def test_rows_that_end_and_rows_that_only_fill_change_nothing(model, setting, steps, device):
    params, how = SETTINGS[setting]
    how, prompts = dict(how), make_prompts(7)
    params = [SamplingParams(**{"n": 2, "seed": i, **params}) for i in range(len(prompts))]
    if how.pop("limits", False):
        params = [SamplingParams(n=2, max_tokens=1 + 3 * i) for i in range(len(prompts))]
    expected = Sampler(model, 4, block_size=4, engine=StepEngine(model), **how).sample(prompts, params)
    there = tiny_model().to(device)
    sampler = Sampler(there, 4, block_size=4, engine=GraphEngine(there, steps), **how)
    for _ in range(2):  # the second time by what the first has left
        found = sampler.sample(prompts, params)
        assert tokens_of(found) == tokens_of(expected)
        assert_logprobs_close(found, expected, 1e-5)
        assert_pool_empty(sampler)
    assert (sampler.preemptions > 0) == (setting == "preempted")
    if device == "cuda":
        assert sampler.engine._graphs and all(graph is not None for graph in sampler.engine._graphs.values())


def test_a_wrong_slot_of_a_dead_row_would_be_seen(model, monkeypatch):
    """The test above is able to fail: without the scratch slot, rows that fill a step up write over row 0's block."""
    prompts, params = make_prompts(3), SamplingParams(n=1, max_tokens=20, seed=2)
    expected = Sampler(model, block_size=4, engine=StepEngine(model)).sample(prompts, params)
    monkeypatch.setattr("r1fast.model.paged.PagedKV.scratch_slot", property(lambda kv: 0))
    found = Sampler(model, block_size=4, engine=GraphEngine(model, 3)).sample(prompts, params)
    with pytest.raises(AssertionError):
        assert tokens_of(found) == tokens_of(expected)
        assert_logprobs_close(found, expected, 1e-5)


def test_the_host_is_asked_once_in_so_many_steps(model, monkeypatch):
    taken = []
    whole = graphs.DeviceRows.take
    monkeypatch.setattr(
        graphs.DeviceRows, "take", lambda self, steps, rows: taken.append(steps) or whole(self, steps, rows)
    )
    Sampler(model, engine=GraphEngine(model, 8)).sample([[1, 2, 3]], SamplingParams(n=2, max_tokens=21))
    assert taken == [8, 8, 4]  # and one token from the prefill


def test_rows_are_sent_again_only_after_a_change(model, monkeypatch):
    loads = []
    whole = graphs.DeviceRows.load
    monkeypatch.setattr(graphs.DeviceRows, "load", lambda self, *batch: loads.append(1) or whole(self, *batch))
    Sampler(model, block_size=64, engine=GraphEngine(model, 4)).sample([[1, 2]], SamplingParams(max_tokens=41))
    assert len(loads) == 1


def test_forbidden_stops_are_taken_and_the_rest_keeps_its_distribution():
    logits = torch.randn(4, 6)
    before = logits.clone()
    stop_ids = torch.tensor([[2, -1], [-1, -1], [0, 5], [0, -1]])
    waits, temperature = torch.tensor([True, True, True, False]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    correction = take_stops(logits, waits, stop_ids, temperature)
    gone = [(0, 2), (2, 0), (2, 5)]
    assert sorted(map(tuple, (logits == -torch.inf).nonzero().tolist())) == gone
    for row, scale in enumerate((1.0, 0.5, 1.0, 2.0)):
        found = torch.log_softmax(logits[row] / scale, -1) + correction[row]
        kept = logits[row] != -torch.inf
        torch.testing.assert_close(found[kept], torch.log_softmax(before[row] / scale, -1)[kept])


@on_cuda
def test_graphs_are_captured_once_and_see_new_weights(model):
    there = tiny_model().to("cuda")
    sampler = Sampler(there, block_size=4, engine=GraphEngine(there, 4))
    params, prompts = SamplingParams(n=2, max_tokens=15, temperature=0), make_prompts(4)
    first = tokens_of(sampler.sample(prompts, params))
    kept = dict(sampler.engine._graphs)
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.mul_(1.3)
    there.bump_version()
    second = sampler.sample(prompts, params)
    assert sampler.engine._graphs == kept and tokens_of(second) != first
    assert tokens_of(second) == tokens_of(
        Sampler(there, block_size=4, engine=StepEngine(there)).sample(prompts, params)
    )


def test_a_step_that_asks_the_host_is_run_without_a_graph(model, monkeypatch, caplog):
    """As capture would fail, here by a stand-in for a cache on a GPU; the reason is in the log."""
    engine = GraphEngine(model, 4)
    engine._rows = graphs.DeviceRows(2, 2, 1, 4, 4, torch.device("cpu"))
    engine._kv = SimpleNamespace(keys=SimpleNamespace(device=torch.device("cuda")))

    def capture(shape):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine, "_capture", capture)
    assert engine._graph((2, 2, False, False)) is None and "not permitted" in caplog.text
    assert engine._graphs == {(2, 2, False, False): None}
