"""What a plan counts is what torch keeps; what it chooses, and in which order; and a run that goes on when memory runs
out, with the gradient it would have had."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from micro_run import run_micro_stages
from rollouts import sampled_groups, tiny_decoder
from test_packing import grouped_rows

from r1fast.config import UserError
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss, log_probs, policy_loss
from r1fast.learn.memory import (
    Asked,
    activation_values,
    cache_bytes,
    plan_training,
    training_bytes,
    working_bytes,
)
from r1fast.learn.optimizer import build_optimizer
from r1fast.learn.packing import loss_weights, pack, row_from_example
from r1fast.learn.room import Room, halve, pieces
from r1fast.metrics import read_events
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.paged import PagedKV
from r1fast.schema import ObjectiveConfig, OptimizerConfig

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=160, layers=5, heads=4, kv_heads=2, head_dim=16, max_positions=256
)
OBJECTIVE = ObjectiveConfig(kl_coef=0.1)


# -- what is counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_torch_keeps(architecture, recompute):
    model = Decoder(replace(CONFIG, architecture=architecture)).initialize(0)
    model.recompute = recompute
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, ends = torch.randint(0, 64, (200,)), torch.tensor([0, 200], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.forward_packed(tokens, ends)
    found = sum(size for place, size in kept.items() if place not in weights) / 200 / 4
    counted = activation_values(CONFIG, recompute, recall=True)
    if recompute:  # one layer's are made again, and kept, during the backward pass
        counted -= activation_values(replace(CONFIG, layers=1))
    assert hidden.requires_grad and found == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_training_bytes_are_those_of_a_learner_after_a_step(dtype, states):
    model = tiny_decoder(dtype=dtype)
    learner = Learner(model, OptimizerConfig(states=states), 10)
    rows = [row_from_example([1, 2], [3, 4, 5])]
    learner.step(pack(rows, loss_weights(rows, "token"), 100), cross_entropy_loss)
    held = [p.grad for p in learner.parameters]
    held += [x for state in learner.optimizer.state.values() for x in state.values() if x.numel() > 1]
    held += learner.parameters if dtype == torch.bfloat16 else []
    count = sum(p.numel() for p in model.parameters())
    assert sum(x.nbytes for x in held) == training_bytes(count, dtype.itemsize, states)


def test_cache_bytes_are_those_of_the_samplers_cache():
    blocks = 6 * (32 // 16)
    assert cache_bytes(CONFIG, 6, 32, 4) == blocks * PagedKV.bytes_per_block(CONFIG, 16, torch.float32)


def test_recomputed_activations_give_the_same_bits():
    found = []
    for recompute in (False, True):
        model, rows = tiny_decoder(), grouped_rows(5)
        model.recompute = recompute
        for batch in pack(rows, loss_weights(rows, "token"), 60, shared=True):
            policy_loss(model, batch, OBJECTIVE)[0].backward()
        found.append([p.grad for p in model.parameters()])
    assert max(g.abs().max() for g in found[0]) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- what is chosen -----------------------------------------------------------------------------------------------


def planned(free: float, asked: Asked | None = None, **more):
    settings = {"trained": 1_000_000, "width": 4, "device": "cpu", "longest": 300, "cache": 1e6, "weights": 4e6}
    return plan_training(CONFIG, asked or Asked(), free=free, **settings | more)


def test_a_plan_gives_up_the_cheapest_first():
    per_token = 4 * activation_values(CONFIG)
    fixed, room = training_bytes(1_000_000, 4) + 1e6, 0.9
    everything = planned((fixed + 1280 * per_token) / room + 1)
    assert (everything.micro_batch_tokens, everything.recompute, everything.states) == (1280, False, "float32")
    assert everything.fits and everything.needed == pytest.approx(fixed + 1280 * per_token)
    smaller = planned((fixed + 640 * per_token) / room + 1)
    assert (smaller.micro_batch_tokens, smaller.recompute, smaller.states) == (640, False, "float32")
    again = planned((fixed + 639 * per_token) / room)
    assert again.recompute and again.states == "float32" and again.fits
    less = planned((fixed + 600 * 4 * activation_values(CONFIG, True)) / room)
    assert less.states == "bfloat16" and less.fits
    none = planned(fixed / 2)
    assert not none.fits and (none.micro_batch_tokens, none.recompute, none.states) == (640, True, "bfloat16")
    assert "This may not fit" in none.told() and "activations recomputed" in none.told()


def test_a_plan_leaves_alone_what_is_asked_for():
    asked = Asked(micro_batch_tokens=50_000, recompute=False, states="float32")
    found = planned(1e6, asked)
    assert not found.fits and (found.micro_batch_tokens, found.recompute, found.states) == (50_000, False, "float32")
    assert planned(1e9, Asked(states="bfloat16")).states == "bfloat16"


def test_a_plan_of_shares_counts_what_is_gathered():
    """To sample all of it, beside the cache; to learn what is at work, beside the activations: whichever is more."""
    layer = 2 * 16 + 2 * 4 + 32 * 16 + 16 * 16 + 48 * 16 + 16 * 24
    config = DecoderConfig(100, 16, 24, layers=3, heads=4, kv_heads=2, head_dim=4)
    assert working_bytes(config, 2, trained=False) == (2 * 100 * 16 + 2 * layer) * 2
    assert working_bytes(config, 2) == (2 * 100 * 16 + 2 * layer) * 2 + (2 * 100 * 16 + layer) * 6
    assert training_bytes(8000, 2, shards=8) == 1000 * (4 + 8)  # the shares are the masters
    assert training_bytes(8000, 2) == 8000 * (4 + 8 + 4)
    shares = {"width": 2, "shards": 8, "gathered": 5e8, "working": 1e6, "weights": 5e5}
    found = planned(1e9, **shares)
    assert found.fits and found.gather_fits and found.memory.activations < 5e8 - 1e6
    assert found.memory.total == 5e5 + 1_000_000 / 8 * 12 + 1e6 + 5e8
    assert "gathered once a step to sample, 500 MB" in found.told()
    tight = planned(1e9, **shares | {"gathered": 1e5, "working": 3e8})
    assert tight.memory.total == 5e5 + 1_000_000 / 8 * 12 + 1e6 + 3e8 + tight.memory.activations
    none = planned(4e8, **shares)
    assert not none.fits and not none.gather_fits
    assert "This does not fit: sampling gathers the whole weights on every rank, 500 MB beside" in none.told()
    assert "parallel.tensor=N in place of parallel.shard" in none.told()
    assert planned(1e3).gather_fits  # nothing is gathered


def test_no_micro_batch_is_planned_below_the_longest_row():
    assert planned(1e6, longest=1100).micro_batch_tokens == 1280
    long = planned(1e12, longest=9000)
    assert long.memory.activations == 9000 * 4 * activation_values(CONFIG)


# -- when memory runs out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_halves_of_a_batch_are_batches_of_their_rows(shared):
    """Loss and gradients of all the pieces are the whole's, down to single completions."""
    model, rows = tiny_decoder(dtype=torch.float64), grouped_rows(7)
    (batch,) = pack(rows, loss_weights(rows, "sequence"), 10_000, shared=shared)
    found = []
    for parts in ([batch], list(halve(batch)), list(pieces(batch, 30)), list(pieces(batch, 1))):
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss, told = policy_loss(model, part, OBJECTIVE)
            loss.backward()
            total += loss.item()
            assert int(told.count) == part.targets.shape[0]
        assert sum(part.targets.shape[0] for part in parts) == batch.targets.shape[0]
        found.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for limit in (1, 30):
        assert all(p.tokens.shape[0] <= limit or int(p.sequence[-1]) == 0 for p in pieces(batch, limit))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], abs=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=0, atol=1e-10)


def short_of_memory(limit: int, error=torch.OutOfMemoryError):
    """policy_loss on a machine that holds `limit` tokens; it fails after half of the gradient is there."""
    tried = []

    def loss(model, batch):
        tried.append(batch.tokens.shape[0])
        value, told = policy_loss(model, batch, OBJECTIVE)
        if tried[-1] > limit:
            value.backward()
            raise error("out of memory, as asked: can't allocate memory")
        return value, told

    return loss, tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_micro_batch_and_goes_on(error):
    rows, said = grouped_rows(7), []
    batches = pack(rows, loss_weights(rows, "sequence"), 100, shared=True)
    whole = Learner(tiny_decoder(dtype=torch.float64), OptimizerConfig(), 10)
    expected = whole.accumulate(batches, lambda model, batch: policy_loss(model, batch, OBJECTIVE))
    learner = Learner(tiny_decoder(dtype=torch.float64), OptimizerConfig(), 10, warn=said.append)
    loss, tried = short_of_memory(60, error)
    found = learner.accumulate(batches, loss)
    largest = max(batch.tokens.shape[0] for batch in batches)
    assert said == [f"out of memory with {largest:,} tokens at once: micro-batches of {largest // 2:,} from here on"]
    assert max(tried[1:]) <= 60 and tried[0] == largest  # the longest comes first
    for a, b in zip(found.stats, expected.stats, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, msg=name)
    for p, q in zip(learner.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10)
    loss, tried = short_of_memory(60)
    learner.accumulate(batches, loss)
    assert max(tried) <= 60 and len(said) == 1  # it is known now


def test_one_sequence_that_does_not_fit_is_recomputed_and_then_an_error():
    said = []
    learner = Learner(tiny_decoder(), OptimizerConfig(), 10, warn=said.append)
    batches = pack([replace(row_from_example([1, 2, 3], [4, 5, 6]), ref_logprobs=[0.0] * 3)], None, 100)
    loss, _ = short_of_memory(0)
    with pytest.raises(UserError, match="a single micro-batch of 5 tokens that cannot be halved"):
        learner.accumulate(batches, loss)
    assert learner.model.recompute and said == [
        "out of memory with one sequence of 5 tokens: activations are recomputed from here on"
    ]


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"):
        learner = Learner(tiny_decoder(), OptimizerConfig(), 10)
        learner.accumulate(
            pack(grouped_rows(), None, 100), short_of_memory(0, lambda _: RuntimeError("something else"))[0]
        )


def test_log_probs_in_a_small_room_are_the_same(monkeypatch):
    model, rows, said = tiny_decoder(dtype=torch.float64), grouped_rows(2), []
    batches = pack(rows, None, 100, shared=True)
    expected = log_probs(model, batches)
    forward = Decoder.forward_packed

    def small(self, tokens, *rest):
        if tokens.shape[0] > 40:
            raise torch.OutOfMemoryError("as asked")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "forward_packed", small)
    room = Room(model, said.append)
    for a, b in zip(log_probs(model, batches, room=room), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert said and room.limit <= 50


def test_an_update_goes_on_where_memory_runs_out(monkeypatch):
    """The whole of it, reference and old log-probs included, with the weights of a machine that has enough."""
    found, forward = [], Decoder.forward_packed
    for short in (False, True):
        model, said = tiny_decoder(dtype=torch.float64), []
        groups = sampled_groups(model, prompts=6, noise=0.01)

        def small(self, tokens, *rest, short=short):
            if short and tokens.shape[0] > 50:
                raise torch.OutOfMemoryError("as asked")
            return forward(self, tokens, *rest)

        monkeypatch.setattr(Decoder, "forward_packed", small)
        learner = Learner(model, OptimizerConfig(learning_rate=3e-3), 10, warn=said.append)
        settings = {"random": Random(1), "mini_batches": 2, "old_logprobs": "recompute"}
        learner.train_policy(groups, OBJECTIVE, reference=tiny_decoder(2, torch.float64), **settings)
        assert bool(said) == short
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-8)


def test_a_rehearsal_runs_the_largest_micro_batch_and_leaves_no_trace():
    learner = Learner(tiny_decoder(), OptimizerConfig(), 10, micro_batch_tokens=90)
    before = [p.detach().clone() for p in learner.parameters]
    loss, tried = short_of_memory(60)
    learner.rehearse(19, loss)
    assert tried[0] == 90 and learner.room.limit == 45
    assert all(p.grad is None for p in learner.parameters) and learner.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


def test_what_was_found_out_is_kept_with_the_state():
    learner = Learner(tiny_decoder(), OptimizerConfig(), 10, micro_batch_tokens=90)
    learner.room.limit = 45
    other = Learner(tiny_decoder(), OptimizerConfig(), 10)
    other.load_state_dict(learner.state_dict())
    assert (other.micro_batch_tokens, other.room.limit) == (90, 45)


def test_a_stage_says_what_it_takes_and_rehearses_where_memory_is_scarce(micro, tmp_path, monkeypatch):
    stage = {"kind": "grpo", "steps": 1, "prompts_per_step": 4, "group_size": 2, "mix": [{"task": "totals"}]}
    stage |= {"sampling": {"max_tokens": 24}, "evaluate": False}
    rehearsed = []
    monkeypatch.setattr(Learner, "rehearse", lambda self, longest, loss: rehearsed.append(longest))
    for free, name in ((1 << 40, "rich"), (12 << 20, "poor")):
        monkeypatch.setattr("r1fast.stages.fitting.free_memory", lambda device, free=free: free)
        run_micro_stages(tmp_path / name, micro, {"rl": stage})
    told = [next(e for e in read_events(tmp_path / name) if e["event"] == "memory") for name in ("rich", "poor")]
    assert [e["fits"] for e in told] == [True, True] and rehearsed == [96]
    assert told[0]["micro_batch_tokens"] == 1280 and told[0]["recompute"] is False
    assert told[1]["activations_bytes"] + told[1]["training_bytes"] + told[1]["cache_bytes"] <= 0.9 * (12 << 20)
    assert json.loads(json.dumps(told[0]))["free"] == 1 << 40


def test_the_optimizer_of_a_plan_is_built_as_it_says():
    p = torch.nn.Parameter(torch.ones(2, 2))
    assert type(build_optimizer([p], OptimizerConfig(states="bfloat16"))).__name__ == "HalfStateAdamW"
    assert type(build_optimizer([p], OptimizerConfig(states="auto"))).__name__ == "AdamW"


def test_holes_are_given_back_now_and_then(monkeypatch):
    from r1fast import heap

    monkeypatch.setattr(heap, "_returned", -heap.SECONDS)
    assert [heap.give_back_holes() for _ in range(3)][1:] == [False, False]
    assert heap._returned > 0
