"""Several steps in one native call, rows shared out between threads: the same bits as step by step on one thread."""

from dataclasses import replace

import pytest
import torch
from sampling import tiny_model

from r1fast.model import native_forward
from r1fast.model.paged import PagedKV, PagedStep
from r1fast_kernels import native, sample_token

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
BLOCK, COLUMNS, ROWS, STEPS = 4, 8, 53, 6
NOBODY = torch.full((ROWS, 2), -1)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ragged_step(model) -> tuple[PagedStep, PagedKV, list[torch.Tensor]]:
    """A decode step of rows of 9 to 25 tokens that share their first two blocks by fours, a cache, and their noise."""
    generator = torch.Generator().manual_seed(5)
    kv = PagedKV.allocate(model.config, ROWS * COLUMNS, BLOCK, "cpu", torch.float32)
    for array in (kv.keys, kv.values):
        array.normal_(generator=generator)
    tables = torch.randperm(ROWS * COLUMNS, generator=generator).view(ROWS, COLUMNS).int()
    tables[:, :2] = tables[torch.arange(ROWS) // 4 * 4, :2]
    positions = torch.randint(8, 25, (ROWS,), generator=generator)
    tokens = torch.randint(model.config.vocab_size, (ROWS,), generator=generator)
    slots = tables[torch.arange(ROWS), positions // BLOCK].long() * BLOCK + positions % BLOCK
    number = torch.arange(ROWS)
    noise = [number % 5, number * 7, 0.5 + number % 3 / 2, (number % 4).int() * 5, 1 - 0.1 * (number % 2)]
    noise[2][::9] = 0
    return PagedStep(tokens, positions, slots, tables, (positions + 1).int()), kv, noise


@torch.no_grad()
def one_by_one(model, step, kv, noise, steps: int) -> list[torch.Tensor]:
    """On one thread, each op by itself."""
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_forward, "takes", lambda *_: False)
        for _ in range(steps):
            logits = model.logits(model.forward_paged(step, kv))
            found.append(sample_token(logits, *noise[:2], step.positions + 1, *noise[2:], backend="cpu"))
            positions = step.positions + 1
            slots = step.block_tables[torch.arange(len(positions)), (positions // BLOCK).clamp(max=COLUMNS - 1)]
            slots = slots.long() * BLOCK + positions % BLOCK
            step = PagedStep(found[-1].token, positions, slots, step.block_tables, step.context_lens + 1)
    torch.set_num_threads(before)
    return [torch.stack(field) for field in zip(*found, strict=True)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_many_steps_are_the_ops_one_by_one_to_the_last_bit(model, threads):
    step, kv, noise = ragged_step(model)
    found = native_forward.decode(model, step, kv, noise, NOBODY, STEPS, 1e9)
    other_step, other, _ = ragged_step(model)
    expected = one_by_one(model, other_step, other, noise, STEPS)
    assert_same([*found, kv.keys, kv.values], [*expected, other.keys, other.values])
    assert found.token.unique().numel() > 10


def test_it_ends_with_the_step_in_which_a_row_ends(model, threads):
    step, kv, noise = ragged_step(model)
    expected = one_by_one(model, step, kv, noise, STEPS)
    for row in (3, ROWS - 1):  # of the first slice, and of the last
        stops = NOBODY.clone()
        stops[row, 1] = expected[0][2, row]
        last = expected[0][:, row].tolist().index(stops[row, 1].item())
        found = native_forward.decode(model, step, ragged_step(model)[1], noise, stops, STEPS, 1e9)
        assert_same(found, [field[: last + 1] for field in expected])
    assert len(native_forward.decode(model, step, kv, noise, NOBODY, STEPS, -1.0).token) == 1


def test_rows_that_read_what_other_rows_write_wait_for_them(model, threads):
    """Draft tokens: 53 tokens of 3 sequences at once, each a row that sees those before it."""
    step, kv, _ = ragged_step(model)
    sequence, place = torch.arange(ROWS) // 20, torch.arange(ROWS) % 20
    tables = step.block_tables[sequence * 17]
    slots = tables[torch.arange(ROWS), place // BLOCK].long() * BLOCK + place % BLOCK
    step = replace(step, positions=place, slots=slots, block_tables=tables, context_lens=(place + 1).int())
    found = model.forward_paged(step, kv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_forward, "takes", lambda *_: False)
        expected = model.forward_paged(step, ragged_step(model)[1])
    assert torch.equal(found, expected)


def test_weights_are_read_as_they_are_at_each_call():
    model = tiny_model()
    step, kv, noise = ragged_step(model)
    before = native_forward.decode(model, step, kv, noise, NOBODY, 2, 1e9)
    for weight in (model.layers[0].gate_up_proj, model.embedding):
        weight.data.mul_(1.5)  # not counted by torch, not announced
        found = native_forward.decode(model, step, ragged_step(model)[1], noise, NOBODY, 2, 1e9)
        assert not torch.equal(found.logprob_full[0], before.logprob_full[0])
        assert_same(found, one_by_one(model, step, ragged_step(model)[1], noise, 2))
        before = found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step, noise: step.context_lens.__setitem__(5, COLUMNS * BLOCK - 2), "row 5 has no room for 6 tokens"),
        (lambda step, noise: step.context_lens.__setitem__(0, 0), "row 0 has no room"),
        (lambda step, noise: step.block_tables.__setitem__((7, slice(2, None)), -1), "row 7 has no room"),
        (lambda step, noise: step.block_tables.__setitem__((7, 0), 10**6), "names a block outside the cache"),
        (lambda step, noise: noise[2].__setitem__(30, -1), "temperature must be >= 0"),
        (lambda step, noise: noise[3].__setitem__(30, -1), "top_k must be >= 0"),
        (lambda step, noise: noise[4].__setitem__(30, 0), "top_p must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused(model, threads, change, message):
    step, kv, noise = ragged_step(model)
    change(step, noise)
    with pytest.raises(ValueError, match=message):
        native_forward.decode(model, step, kv, noise, NOBODY, STEPS, 1e9)
