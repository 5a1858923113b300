"""pass@1, cons@k and their interval against values counted by hand and by brute force."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1fast.stages.measures import (
    bootstrap_interval,
    by_category,
    consensus,
    majority,
    means,
    pass_at_1,
    pass_at_k,
    steps_of_k,
)


def test_pass_at_1_is_the_mean_over_samples_then_problems():
    assert pass_at_1([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answers", "index"),
    [
        (["7", "8", "7"], 0),
        (["8", "7", "7"], 1),
        ([None, None, "7"], 2),  # no answer is not a vote
        ([None, None], None),
        (["8", "7", "7", "8"], 0),  # a tie goes to what was given first
        (["7", "8", "8", "7"], 0),
    ],
)
def test_majority(answers, index):
    assert majority(answers) == index


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=12))
def test_majority_is_a_most_common_answer(answers):
    index = majority(answers)
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        assert index is None
    else:
        assert votes[answers[index]] == max(votes.values())


def test_consensus_counts_problems_whose_majority_is_right():
    answers = [["5", "5", "6"], ["1", "2", "2"], [None, None, None]]
    correct = [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert consensus(answers, correct) == pytest.approx(1 / 3)


def test_interval_covers_the_mean_of_new_samples_about_as_often_as_it_says():
    """95% intervals of 60 Bernoulli(0.7) problems should hold 0.7 in about 95 of 100 repetitions."""
    draws = np.random.default_rng(1).random((200, 60)) < 0.7
    held = 0
    for row in draws.astype(float):
        low, high = bootstrap_interval(row, resamples=400)
        assert low <= row.mean() <= high
        held += low <= 0.7 <= high
    assert 0.88 <= held / 200 <= 0.99


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(row, k):
    if k > len(row):
        assert np.isnan(pass_at_k([row], k))
        return
    choices = list(combinations(row, k))
    assert pass_at_k([row], k) == pytest.approx(sum(max(chosen) for chosen in choices) / len(choices))


def test_pass_at_k_over_problems_and_of_many_samples():
    rows = [[1.0] * 20 + [0.0] * 180, [0.0] * 200, [1.0] * 200, [0.5] * 200]
    assert pass_at_k(rows, 1) == pytest.approx((0.1 + 0 + 1 + 0) / 4)
    product = 1.0  # the form of Chen et al.'s code: 1 - prod(1 - k / i) for i from n - c + 1 to n
    for i in range(181, 201):
        product *= 1 - 100 / i
    assert pass_at_k(rows, 100) == pytest.approx((1 - product + 0 + 1 + 0) / 4)


def test_the_k_that_are_told():
    assert [steps_of_k(n) for n in (1, 2, 3, 8, 64)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 16, 32, 64]]


def test_a_failed_verdict_is_left_out():
    rows = [[1.0, None, 0.0], [None, None, None], [1.0, 1.0, 1.0]]
    assert means(rows) == [0.5, 1.0] and pass_at_1(rows) == 0.75
    assert pass_at_k(rows, 2) == 1.0 and pass_at_k(rows, 3) == 1.0
    assert consensus([["a", "a", "b"], ["a", "a", "a"], ["c", "c", None]], rows) == 1.0
    assert np.isnan(pass_at_1([[None]])) and np.isnan(bootstrap_interval([])[0])


def test_categories_are_measured_apart():
    table = by_category(["b", "a", "b"], [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert list(table) == ["a", "b"]
    assert table["a"] == {"problems": 1, "pass@1": 1.0, "low": 1.0, "high": 1.0}
    assert table["b"]["problems"] == 2 and table["b"]["pass@1"] == 0.25 and table["b"]["low"] == 0.0


def test_an_interval_of_another_statistic():
    values = np.arange(100.0)
    low, high = bootstrap_interval(values, statistic=lambda picks: float(np.median(values[picks])))
    assert low < np.median(values) < high and 15 < high - low < 35
