"""A step in one native call: equal to the layers' own methods, passed over where it is not; weights as they are now."""

from itertools import pairwise

import pytest
import torch
from checkpoints import LAYOUTS, VOCAB, assert_equal, make
from sampling import make_prompts, tiny_model

from r1fast.model import native_forward
from r1fast.model.decoder import PagedKV, PagedStep
from r1fast.model.lora import add_adapters, merged
from r1fast.model.weights import load
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.schema import LoRAConfig
from r1fast_kernels import native, use_backend

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
BLOCK, COLUMNS = 4, 6


def steps(vocabulary: int) -> list[PagedStep]:
    """A prefill of three prompts, of which one goes on, and a decode step of all; the first block is common to two."""
    generator = torch.Generator().manual_seed(3)
    tables = torch.randperm(3 * COLUMNS, generator=generator).view(3, COLUMNS).int()
    tables[1, 0] = tables[0, 0]

    def step(first: list[int], last: list[int], decode: bool) -> PagedStep:
        positions = torch.cat([torch.arange(a, b) for a, b in zip(first, last, strict=True)])
        counts = torch.tensor(last) - torch.tensor(first)
        blocks = tables.long().repeat_interleave(counts, 0)[torch.arange(len(positions)), positions // BLOCK]
        tokens = torch.randint(vocabulary, positions.shape, generator=generator)
        tokens[positions < BLOCK] = positions[positions < BLOCK]
        ends = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
        lens = torch.tensor(last, dtype=torch.int32)
        return PagedStep(tokens, positions, blocks * BLOCK + positions % BLOCK, tables, lens, None if decode else ends)

    return [
        step([0, 0, 0], [17, 6, 2], False),
        step([17, 6, 2], [19, 10, 3], False),
        step([19, 10, 3], [20, 11, 4], True),
    ]


def run(model, how: str, monkeypatch) -> list[torch.Tensor]:
    """Hidden states and log-probabilities of every step, then the cache. how: native, ops (one by one) or reference."""
    kv = PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", model.dtype)
    found, calls = [], []
    forward = native_forward.forward
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(native_forward, "forward", lambda *args: calls.append(1) or forward(*args))
        if how == "ops":
            patch.setattr(native_forward, "takes", lambda *_: False)
        for step in steps(model.config.vocab_size):
            with use_backend("reference" if how == "reference" else "cpu"):
                hidden = model.forward_paged(step, kv)
                found += [hidden, model.logits(hidden).log_softmax(-1)]
    assert len(calls) == (len(steps(9)) if how == "native" else 0)
    return [*found, kv.keys, kv.values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_begins_at_a_line_and_holds_zeros(dtype):
    kv = PagedKV.allocate(tiny_model().config, 5, BLOCK, "cpu", dtype)
    for array in (kv.keys, kv.values):
        assert array.data_ptr() % 64 == 0 and array.is_contiguous() and array.dtype is dtype
        assert array.shape[1:3] == (6, BLOCK) and not array.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_ops_bit_for_bit_and_the_reference_within_rounding(tmp_path, layout, monkeypatch):
    make(tmp_path, *LAYOUTS[layout])
    model, _ = load(tmp_path)
    with torch.no_grad():
        model.head_weight.mul_(0.3)  # logits of a few units, as a trained model has, not of 20
    found, ops, reference = (run(model, how, monkeypatch) for how in ("native", "ops", "reference"))
    for a, b, c in zip(found, ops, reference, strict=True):
        assert torch.equal(a, b)
        assert_equal(a, c)
    for logprobs, expected in zip(found[1:6:2], reference[1:6:2], strict=True):
        assert logprobs.shape[1] == VOCAB
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_weights_are_read_anew_after_every_update(monkeypatch):
    """In place, as the learner's optimizer writes them, and where a parameter is another tensor."""
    model = tiny_model()
    seen = [run(model, "native", monkeypatch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    hidden = model.forward_packed(torch.arange(9), torch.tensor([0, 9], dtype=torch.int32))
    model.logits(hidden).square().mean().backward()
    optimizer.step()
    seen.append(run(model, "native", monkeypatch))
    model.layers[1].o_proj = torch.nn.Parameter(model.layers[1].o_proj.detach() * 1.5)
    seen.append(run(model, "native", monkeypatch))
    model.layers[0].down_proj.data = model.layers[0].down_proj.data.roll(1, 0)
    seen.append(run(model, "native", monkeypatch))
    for before, after in pairwise(seen):
        assert (before[0] - after[0]).abs().max() > 1e-3
    for a, b in zip(seen[-1], run(model, "ops", monkeypatch), strict=True):
        assert torch.equal(a, b)


def test_what_it_does_not_compute_goes_op_by_op(monkeypatch):
    model, step = tiny_model(), steps(50)[0]
    kv = PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", model.dtype)

    def reason(model=model, kv=kv) -> str | None:
        found = native_forward.refusal(model, step, kv)
        assert native_forward.takes(model, step, kv) == (found is None)
        return found

    assert reason() is None
    with use_backend("reference"):
        assert reason() == "backend reference was asked for"
    with use_backend("cpu"):
        assert reason() is None
    half = PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", torch.bfloat16)
    assert "torch.bfloat16" in reason(tiny_model().to(torch.bfloat16), half)
    assert "embedding" in reason(tiny_model().to(torch.bfloat16))
    transposed = tiny_model()
    square = transposed.layers[1].o_proj
    square.data = square.data.T
    assert "o_proj" in reason(transposed)
    model.forward_paged(step, kv)
    expected = transposed.forward_paged(step, kv)
    square.data = square.data.contiguous()
    assert reason(transposed) is None and torch.equal(transposed.forward_paged(step, kv), expected)
    monkeypatch.setattr(native, "cpu_unavailable", lambda: "it was not built")
    assert reason() == "it was not built"


def test_adapters_are_seen_whether_merged_or_not():
    model = tiny_model()
    add_adapters(model, LoRAConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.normal_(0, 0.5)
    step, kv = steps(50)[0], PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", model.dtype)
    assert native_forward.refusal(model, step, kv) == "adapters are not merged into the weights"
    apart = model.forward_paged(step, kv)
    with merged(model):
        assert native_forward.refusal(model, step, kv) is None
        together = model.forward_paged(step, kv)
    assert_equal(together, apart)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 53, "a token lies outside the vocabulary, which has 53 words"),
        ("tokens", -1, "a token lies outside the vocabulary"),
        ("positions", 32, "a position lies outside the tables"),
        ("slots", 1_000_000, "a slot lies outside the cache"),
        ("block_tables", 1_000_000, "block_tables names a block outside the cache"),
        ("context_lens", 25, "context_lens must lie in"),
        ("cu_seqlens_q", 30, "cu_seqlens_q must ascend"),
    ],
)
def test_what_lies_outside_is_refused_before_it_is_read(field, value, message):
    model, step = tiny_model(), steps(50)[0]
    kv = PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", model.dtype)
    getattr(step, field).view(-1)[1 if field != "context_lens" else 0] = value
    with pytest.raises(ValueError, match=message):
        model.forward_paged(step, kv)


def test_a_row_without_a_sequence_writes_into_the_last_block():
    model, step = tiny_model(), steps(50)[2]
    kv = PagedKV.allocate(model.config, 3 * COLUMNS, BLOCK, "cpu", model.dtype)
    step.slots[1] = kv.scratch_slot
    model.forward_paged(step, kv)
    assert kv.keys[:, -1, 0].abs().min() > 0 and not kv.keys[:, -1, 1:].any()


def test_the_sampler_takes_it_for_prompts_and_for_decoding(monkeypatch):
    model, kinds = tiny_model(), set()
    for name in ("forward", "decode"):
        run = getattr(native_forward, name)

        def watched(model, step, *rest, name=name, run=run):
            kinds.add((name, step.cu_seqlens_q is None))
            return run(model, step, *rest)

        monkeypatch.setattr(native_forward, name, watched)
    params = SamplingParams(n=3, max_tokens=9, seed=1)
    found = Sampler(model).sample(make_prompts(5), params)
    assert kinds == {("forward", False), ("decode", True)}
    monkeypatch.setattr(native_forward, "takes", lambda *_: False)
    expected = Sampler(model).sample(make_prompts(5), params)
    for group, other in zip(found, expected, strict=True):
        for a, b in zip(group.rollouts, other.rollouts, strict=True):
            assert (a.tokens, a.logprobs, a.logprobs_full) == (b.tokens, b.logprobs, b.logprobs_full)
