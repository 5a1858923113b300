"""pass@1, cons@k and their interval against values counted by hand and by brute force."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1fast.stages.measures import bootstrap_interval, consensus, majority, pass_at_1


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
