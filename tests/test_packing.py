"""Packing loses, moves and repeats nothing; the weights are the papers' denominators; the plan is tight."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from rollouts import sampled_groups, tiny_decoder

from r1fast.learn.losses import policy_loss
from r1fast.learn.packing import (
    Filling,
    Row,
    epochs_of,
    late_scale,
    loss_weights,
    pack,
    plan,
    plan_rows,
    row_from_example,
    row_lengths,
    rows_from_groups,
    shared_tokens,
    supervised_steps,
    unpack,
)
from r1fast.schema import ObjectiveConfig


def random_rows(count: int = 40, seed: int = 0) -> list[Row]:
    random, rows = Random(seed), []
    for _ in range(count):
        prompt, answer = random.randint(1, 30), random.randint(1, 40)
        tokens = [random.randrange(1000) for _ in range(prompt + answer)]
        old, ref, weight = ([random.random() for _ in range(answer)] for _ in range(3))
        rows.append(Row(tokens, prompt, random.gauss(0, 1), old, ref, weight))
    return rows


@pytest.mark.parametrize("budget", [1, 90, 400, 100_000])
def test_every_row_is_packed_once_and_whole(budget):
    rows = random_rows()
    weights = np.random.default_rng(0).random(len(rows))
    order = plan(row_lengths(rows), budget)
    batches = pack(rows, weights, budget)
    assert sorted(i for part in order for i in part) == list(range(len(rows)))
    for part, batch in zip(order, batches, strict=True):
        starts = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.max_seqlen == max(len(rows[i].tokens) - 1 for i in part)
        for s, i in enumerate(part):
            row, mine = rows[i], batch.sequence == s
            piece = slice(starts[s], starts[s + 1])
            assert batch.tokens[piece].tolist() == list(row.tokens[:-1])
            assert batch.positions[piece].tolist() == list(range(len(row.tokens) - 1))
            assert batch.targets[mine].tolist() == list(row.tokens[row.prompt_length :])
            first = starts[s] + row.prompt_length - 1
            assert batch.rows[mine].tolist() == list(range(first, first + row.completion_length))
            expected = {
                "loss_weight": [weights[i]] * row.completion_length,
                "old_logprob": row.old_logprobs,
                "ref_logprob": row.ref_logprobs,
                "advantage": [row.advantage * c for c in row.correction],
            }
            for name, values in expected.items():
                torch.testing.assert_close(getattr(batch, name)[mine], torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("budget", [50, 100, 400])
def test_plan_keeps_the_budget_and_wastes_little(budget):
    lengths = row_lengths(random_rows(200))
    parts = plan(lengths, budget)
    totals = [sum(lengths[i] for i in part) for part in parts]
    assert all(total <= budget or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    assert totals == sorted(totals, reverse=True)
    assert all([lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True) for part in parts)
    if budget >= 100:
        assert len(parts) <= np.ceil(sum(lengths) / budget) * 1.05 + 1


def test_a_row_over_the_budget_is_alone():
    assert plan([5, 300, 4], 100) == [[1], [0, 2]]


def test_unpack_returns_each_rows_values():
    rows = random_rows()
    order = plan(row_lengths(rows), 128)
    batches = pack(rows, None, 128, order=order)
    found = unpack([batch.targets * 2.0 for batch in batches], batches, order)
    for row, values in zip(rows, found, strict=True):
        assert values.tolist() == [2.0 * t for t in row.tokens[row.prompt_length :]]


def test_weights_by_the_papers():
    rows = [Row([0] * (3 + n), 3) for n in (1, 4, 10, 5)]
    n = np.array([1, 4, 10, 5])
    np.testing.assert_allclose(loss_weights(rows, "sequence"), 1 / (4 * n))  # DeepSeekMath eq. 3
    np.testing.assert_allclose(loss_weights(rows, "token"), np.full(4, 1 / 20))  # DAPO eq. 8
    np.testing.assert_allclose(loss_weights(rows, "constant", 64), np.full(4, 1 / (64 * 4)))  # Dr. GRPO
    with pytest.raises(ValueError, match="max_tokens"):
        loss_weights(rows, "constant")
    with pytest.raises(ValueError, match="unknown aggregate"):
        loss_weights(rows, "mean")


def test_rows_from_groups_keep_order_and_streams():
    groups = sampled_groups(tiny_decoder())
    values = torch.arange(16.0)
    rows = rows_from_groups(groups, values)
    assert [row.advantage for row in rows] == values.tolist()
    flat = [(g, r) for g in groups for r in g.rollouts]
    for row, (group, rollout) in zip(rows, flat, strict=True):
        assert row.tokens == [*group.prompt.tokens, *rollout.tokens]
        assert row.prompt_length == len(group.prompt.tokens)
        assert row.old_logprobs == rollout.logprobs


@pytest.mark.parametrize("row", [Row([1, 2, 3], 0), Row([1, 2, 3], 3)])
def test_a_row_without_prompt_or_completion_is_refused(row):
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        pack([row], None, 100)


def test_a_supervised_row_trains_its_completion():
    (batch,) = pack([row_from_example([7, 8], [9, 10, 11])], np.array([0.5]), 100)
    assert batch.targets.tolist() == [9, 10, 11]
    assert batch.tokens.tolist() == [7, 8, 9, 10]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.old_logprob is None
    assert batch.ref_logprob is None


def test_supervised_steps_see_every_row_once_an_epoch_and_repeat_by_seed():
    rows = [row_from_example([1], [100 + i]) for i in range(10)]

    def targets(seed: int) -> list[list[int]]:
        made = supervised_steps(rows, steps=5, batch_examples=4, micro_batch_tokens=100, seed=seed)
        return [[t - 100 for batch in step for t in batch.targets.tolist()] for step in made]

    first = targets(3)
    assert first == targets(3)
    assert first != targets(4)
    assert [len(step) for step in first] == [4] * 5
    seen = np.bincount([i for step in first for i in step])
    assert seen.tolist() == [2] * 10  # two epochs
    picks = [i for part in epochs_of(10, 5, 4, 0) for i in part]
    assert sorted(picks[:10]) == sorted(picks[10:]) == list(range(10))
    assert picks[:10] != picks[10:]


# -- prompts that rows share ------------------------------------------------------------------------------------


def grouped_rows(seed: int = 0, sizes=(4, 1, 3, 6, 2)) -> list[Row]:
    """Groups of rows of one prompt each; some completions have a single token, which forwards nothing of its own."""
    random, rows = Random(seed), []
    for number, size in enumerate(sizes):
        prompt = [random.randrange(19) for _ in range(random.randint(1, 9))]
        for _ in range(size):
            answer = random.choice([1, 1, random.randint(2, 12)])
            old, ref, weight = ([random.random() for _ in range(answer)] for _ in range(3))
            tokens = [*prompt, *(random.randrange(19) for _ in range(answer))]
            rows.append(Row(tokens, len(prompt), random.gauss(0, 1), old, ref, weight, group=number))
    return rows


@pytest.mark.parametrize("budget", [1, 20, 60, 1000])
def test_a_shared_plan_holds_every_row_once_and_keeps_the_budget(budget):
    rows = grouped_rows()
    parts = plan_rows(rows, budget, True)
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    costs = [shared_tokens([rows[i] for i in part]) for part in parts]
    longest = max(map(len, (row.tokens for row in rows)))
    assert all(cost <= max(budget, longest) for cost in costs) and costs == sorted(costs, reverse=True)
    assert [b.tokens.shape[0] for b in pack(rows, None, budget, order=parts, shared=True)] == costs
    for part in parts:  # of a group, what is together follows each other
        groups = [rows[i].group for i in part]
        assert sum(a != b for a, b in pairwise(groups)) == len(set(groups)) - 1


@pytest.mark.parametrize("budget", [20, 1000])
def test_a_row_behind_its_prompt_reads_as_before(budget):
    """Each row's tokens, positions, targets and streams, put together from the pack again."""
    rows = grouped_rows()
    weights = np.random.default_rng(0).random(len(rows))
    order = plan_rows(rows, budget, True)
    for part, batch in zip(order, pack(rows, weights, budget, order=order, shared=True), strict=True):
        ends, members = batch.cu_seqlens.tolist(), batch.cu_groups.tolist()
        assert members[0] == 0 and members[-1] == len(ends) - 1 and ends[-1] == len(batch.tokens)
        first = {s: f for f, g in pairwise(members) for s in range(f, g)}
        for at, i in enumerate(part):
            mine, row = batch.sequence == at, rows[i]
            lead = batch.rows[mine].tolist()
            own = next(s for s in first if ends[s] <= lead[-1] < ends[s + 1])
            places = [*range(ends[first[own]], ends[first[own] + 1])]
            places += [p for p in range(ends[own], ends[own + 1]) if own != first[own]]
            assert batch.tokens[places].tolist() == list(row.tokens[:-1])
            assert batch.positions[places].tolist() == list(range(len(row.tokens) - 1))
            assert lead == places[row.prompt_length - 1 :]
            assert batch.targets[mine].tolist() == list(row.tokens[row.prompt_length :])
            assert batch.loss_weight[mine].tolist() == pytest.approx([weights[i]] * row.completion_length)
            assert batch.old_logprob[mine].tolist() == pytest.approx(row.old_logprobs)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_arrive_group_by_group_fill_their_micro_batches(shared):
    budget, rows, given = 150, [], []
    arriving = grouped_rows(1, sizes=(4, 6, 3, 5, 2, 6, 4, 4, 1, 6) * 3)
    filling = Filling(rows, lambda: budget, lambda rows: shared)
    for number in dict.fromkeys(row.group for row in arriving):
        new = [row for row in arriving if row.group == number]
        rows += new
        full = filling.add(range(len(rows) - len(new), len(rows)))
        given += full
        assert all(how == shared for _, how in full)
    early = len(given)
    given += filling.rest()
    assert sorted(i for ids, _ in given for i in ids) == list(range(len(rows)))
    costs = [shared_tokens([rows[i] for i in ids]) if shared else sum(row_lengths([rows[i] for i in ids]))
             for ids, _ in given]  # fmt: skip
    assert max(costs) <= budget
    assert early > len(given) / 2  # most are full long before the last group is there
    assert len(given) <= 1.15 * len(plan_rows(rows, budget, shared)) + 1  # as tight as if all had been known
    assert filling.rest() == []


def test_what_fits_in_one_micro_batch_is_one():
    rows = grouped_rows()
    filling = Filling(rows, lambda: 10_000, lambda rows: True)
    assert [filling.add([i]) for i in range(len(rows))] == [[]] * len(rows)
    assert filling.rest() == [(plan_rows(rows, 10_000, True)[0], True)]


def test_weights_of_a_part_and_the_late_scale_are_the_weights_of_the_whole():
    rows = random_rows(9)
    total = sum(row.completion_length for row in rows)
    for aggregate in ("sequence", "token", "constant"):
        parts = [loss_weights(part, aggregate, 64, of=9) for part in (rows[:4], rows[4:])]
        scaled = np.concatenate(parts) * late_scale(aggregate, 9, total)
        np.testing.assert_allclose(scaled, loss_weights(rows, aggregate, 64), rtol=1e-15)


def test_rows_without_a_group_share_nothing():
    rows = [Row([1, 2, 3], 2), Row([1, 2, 4], 2)]
    assert shared_tokens(rows) == 4
    (batch,) = pack(rows, None, 100, shared=True)
    assert batch.cu_groups.tolist() == [0, 1, 2]


@pytest.mark.parametrize("budget", [18, 40, 100_000])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_shared_prompts_give_the_gradients_of_unshared_ones(budget, importance):
    """In float64, of every parameter, whatever the micro-batches: 1e-10 where a gradient of 1 is an ordinary one."""
    objective = ObjectiveConfig(kl_coef=0.1, importance=importance, clip_low=0.3, clip_high=0.3)
    model, rows = tiny_decoder(dtype=torch.float64), grouped_rows(3)
    weights = loss_weights(rows, "sequence")
    found = []
    for shared, size in ((False, 100_000), (True, budget)):
        model.zero_grad()
        losses = [policy_loss(model, batch, objective)[0] for batch in pack(rows, weights, size, shared=shared)]
        total = torch.stack(losses).sum()
        total.backward()
        found.append((total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][1].abs().max() > 0.1 and (budget > 1000 or len(losses) > 1)
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-10)


def test_packed_gradients_are_those_of_rows_one_at_a_time():
    objective = ObjectiveConfig(kl_coef=0.1)
    model, rows = tiny_decoder(dtype=torch.float64), grouped_rows(4)
    weights = loss_weights(rows, "token")
    found = []
    for budget in (1, 35, 100_000):
        model.zero_grad()
        for batch in pack(rows, weights, budget):
            policy_loss(model, batch, objective)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].abs().max() > 0.1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-10)
