"""What a benchmark tells besides a mean of verdicts: ratings, win rates, instructions, facts, DROP's two scores."""

import json
import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.config import UserError
from r1fast.rewards import drop
from r1fast.tasks.benchmarks.ratings import (
    chance,
    codeforces_summary,
    contest_interval,
    elo,
    percentile,
    read_ratings,
)
from r1fast.tasks.benchmarks.shares import facts_summary, ifeval_summary
from r1fast.tasks.benchmarks.win_rates import alpaca_summary, arena_summary, fit_logistic, length_controlled

OPTIONS = SimpleNamespace(ratings=None, difficulty=None)


def sample(text="", **rewards):
    return SimpleNamespace(text=text, rewards=rewards, correct=rewards.get("accuracy"))


# -- Codeforces -----------------------------------------------------------------------------------------------------


def log_likelihood(rating, problems, solved):
    p = chance(rating, np.array(problems, float))
    return float(np.sum(np.array(solved) * np.log(p) + (1 - np.array(solved)) * np.log(1 - p)))


def test_the_rating_is_where_the_likelihood_is_highest():
    random = np.random.default_rng(3)
    problems = random.integers(8, 35, 60) * 100
    solved = (random.random(60) < chance(1900, problems)).astype(float)
    found = elo(problems, solved)
    grid = np.arange(0, 4000, 1.0)
    best = grid[np.argmax([log_likelihood(r, problems, solved) for r in grid])]
    assert abs(found - best) <= 1 and abs(found - 1900) < 200
    assert elo([1500] * 10, [1.0] * 5 + [0.0] * 5) == pytest.approx(1500)
    assert elo([1500] * 11, [1.0] * 10 + [0.0]) == pytest.approx(1500 + 400)  # odds of ten to one are 400 points
    assert elo([1200, 1500], [1, 1]) == pytest.approx(4000) and elo([1200], [0]) == pytest.approx(0, abs=1e-6)
    assert math.isnan(elo([], []))


def test_the_interval_is_over_contests_and_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(5)
    held = 0
    for _ in range(40):
        contests = np.repeat(np.arange(12), 6)
        problems = np.tile([900, 1200, 1500, 1800, 2200, 2600], 12)
        solved = (random.random(72) < chance(1700, problems)).astype(float)
        low, high = contest_interval(contests, problems, solved)
        held += low <= 1700 <= high
    assert held >= 34


def test_the_percentile_and_the_forms_of_peoples_ratings(tmp_path):
    assert percentile(1500, [1000, 1400, 1500, 1600]) == pytest.approx(62.5)
    assert percentile(900, [1000]) == 0 and percentile(1100, [1000]) == 100
    (tmp_path / "a.txt").write_text("1000\n1400\n")
    rated = {"status": "OK", "result": [{"handle": "x", "rating": 1000}, {"handle": "y", "rating": 1400}]}
    changes = {"result": [{"oldRating": 1, "newRating": 1000}, {"oldRating": 1, "newRating": 1400}]}
    (tmp_path / "b.json").write_text(json.dumps(rated))
    (tmp_path / "c.json").write_text(json.dumps(changes))
    assert all(read_ratings(str(tmp_path / name)) == [1000, 1400] for name in ("a.txt", "b.json", "c.json"))
    (tmp_path / "d.txt").write_text("many")
    for name in ("d.txt", "gone.txt"):
        with pytest.raises(UserError, match=rf"options.ratings: .*{name}"):
            read_ratings(str(tmp_path / name))


def test_the_summary_of_codeforces(tmp_path):
    (tmp_path / "people.txt").write_text("\n".join(map(str, range(800, 2800))))
    answered = [
        ({"rating": rating, "contest": str(i % 5)}, [sample(accuracy=1.0), sample(accuracy=float(rating < 1600))])
        for i, rating in enumerate(range(800, 2800, 100))
    ]
    answered.append(({"rating": 9999, "contest": "6"}, [sample()]))  # its verifier failed: no verdict, no contest
    told = codeforces_summary(answered, SimpleNamespace(ratings=str(tmp_path / "people.txt")))
    assert told["contests"] == 5 and told["rating low"] <= told["rating"] <= told["rating high"]
    assert told["percentile"] == pytest.approx((told["rating"] - 800) / 20, abs=0.1)
    assert "percentile" not in codeforces_summary(answered, OPTIONS)


# -- win rates ------------------------------------------------------------------------------------------------------


def test_the_fit_is_the_maximum_of_its_likelihood():
    random = np.random.default_rng(2)
    features = random.normal(size=(300, 3))
    preferences = 1 / (1 + np.exp(-(features @ np.array([0.5, -1.0, 2.0]))))
    assert fit_logistic(features, preferences, ridge=0.0) == pytest.approx([0.5, -1.0, 2.0], abs=1e-6)
    assert np.isfinite(fit_logistic(np.ones((5, 1)), np.ones(5))).all()  # separable: the ridge holds it


def test_length_control_takes_out_what_length_bought():
    """A model that a judge prefers by its length alone is as good as the baseline once length is held equal."""
    random = np.random.default_rng(4)
    longer = random.normal(400, 300, 4000)
    by_length = 1 / (1 + np.exp(-1.5 * np.tanh(longer / longer.std(ddof=1))))
    preferences = (random.random(4000) < by_length).astype(float)
    lengths, baseline = 1000 + longer, np.full(4000, 1000)
    assert preferences.mean() > 0.68
    assert length_controlled(preferences, lengths, baseline) == pytest.approx(0.5, abs=0.04)
    equal = (random.random(500) < 0.7).astype(float)  # of one length: nothing to take out
    assert length_controlled(equal, np.full(500, 10), np.full(500, 10)) == pytest.approx(equal.mean(), abs=1e-3)


def test_difficulties_of_the_authors_are_used(tmp_path):
    random = np.random.default_rng(7)
    difficulty = random.normal(size=200)
    preferences = 1 / (1 + np.exp(-(0.3 + difficulty)))
    file = tmp_path / "instruction_difficulty.csv"
    file.write_text("index,instruction_difficulty\n" + "".join(f"{i},{d}\n" for i, d in enumerate(difficulty)))
    answered = [({"baseline": 5}, [sample("</think>hello", accuracy=p)]) for p in preferences]
    told = alpaca_summary(answered, SimpleNamespace(difficulty=str(file)))
    assert told["characters"] == 5 and told["win rate"] == pytest.approx(preferences.mean())
    assert told["length-controlled win rate"] == pytest.approx(preferences.mean(), abs=1e-3)
    with pytest.raises(UserError, match="has 200 lines"):
        alpaca_summary(answered * 2, SimpleNamespace(difficulty=str(file)))


def test_arena_hard_is_the_mean_preference():
    answered = [({}, [sample(accuracy=1.0), sample(accuracy=0.5)]), ({}, [sample()]), ({}, [sample(accuracy=0.0)])]
    assert arena_summary(answered, OPTIONS) == {"win rate": 0.5}


# -- shares ---------------------------------------------------------------------------------------------------------


def test_ifeval_counts_prompts_and_instructions_apart():
    def followed(strict, instructions):
        return sample(
            accuracy=strict, ifeval_loose=1.0, ifeval_instructions=instructions, ifeval_loose_instructions=1.0
        )

    answered = [({"instructions": 3}, [followed(0.0, 2 / 3)]), ({"instructions": 1}, [followed(1.0, 1.0)])]
    told = ifeval_summary(answered, OPTIONS)
    assert told == {"prompt strict": 0.5, "prompt loose": 1.0, "instruction strict": 0.75, "instruction loose": 1.0}


def test_facts_are_right_wrong_or_not_tried():
    rows = [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)]
    answered = [({}, [sample(accuracy=right, judge_attempted=tried)]) for right, tried in rows]
    told = facts_summary(answered, OPTIONS)
    assert (told["correct"], told["incorrect"], told["not attempted"]) == (0.5, 0.25, 0.25)
    assert told["correct of attempted"] == pytest.approx(2 / 3)
    assert told["F1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))


# -- DROP -----------------------------------------------------------------------------------------------------------

PAIRS = [
    (["Reds"], ["the Reds"], 1.0, 1.0),
    (["Blues", "Reds"], ["Reds", "Blues"], 1.0, 1.0),
    (["Reds"], ["Reds", "Blues"], 0.0, 0.5),
    (["12"], ["12.0"], 1.0, 1.0),
    (["12 yards"], ["13 yards"], 0.0, 0.0),  # the number decides
    (["12 yards"], ["12"], 0.0, 0.67),
    (["$1,000"], ["1000"], 1.0, 1.0),
    (["July 4, 1776"], ["4 July 1776"], 0.0, 1.0),  # bags have no order
    (["a well-known man"], ["well known man"], 1.0, 1.0),
    ([], ["Reds"], 0.0, 0.0),
]


@pytest.mark.parametrize(("given", "right", "em", "f1"), PAIRS)
def test_the_two_scores_of_drop(given, right, em, f1):
    assert drop.exact(given, right) == em and drop.f1(given, right) == f1


WORDS = st.lists(st.sampled_from(["the", "Reds", "blue-green", "3", "10", "3.0", "yards,", "$5", "A.", ""]), max_size=4)
SPANS = st.lists(WORDS.map(" ".join), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(SPANS, SPANS)
def test_the_scores_are_those_of_the_evaluation_harness(given, right):
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils")
    pytest.importorskip("scipy")
    em, f1 = theirs.get_metrics(given, right)
    assert drop.exact(given, right) == pytest.approx(em)
    assert drop.f1(given, right) == pytest.approx(float(f1), abs=0.0101)  # 0.225 is rounded to either side


@given(st.lists(st.lists(st.integers(0, 100), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_alignment_is_the_best_of_all(rows):
    scores = np.array(rows, float) / 100
    wide = scores if scores.shape[0] <= scores.shape[1] else scores.T
    best = max(sum(wide[i, j] for i, j in enumerate(p[: len(wide)])) for p in permutations(range(wide.shape[1])))
    assert drop.best_total(scores) == pytest.approx(best)


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("Thus.\nAnswer: Reds | Blues", ["Reds", "Blues"]),
        ("<think> Answer: no </think> <answer> 12 </answer>", ["12"]),
        ("It is \\boxed{7}", ["7"]),
        ("</think>\n\nSeven", ["Seven"]),
        ("**Answer:** 12", ["12"]),
        ("", []),
    ],
)
def test_the_answer_of_a_completion(completion, said):
    assert drop.spans(drop.said(completion)) == said


def test_drop_rewards_take_the_best_accepted_answer_and_say_what_they_need():
    from r1fast import rewards

    reference = {"answers": [["Reds", "Blues"], ["12"]]}
    assert rewards.get("drop_f1")("Answer: 12", reference).value == 1.0
    assert rewards.get("drop_em")("Answer: Reds", reference).value == 0.0
    assert rewards.get("drop_f1")("Answer: Reds", reference).value == 0.5
    assert "answers" in rewards.get("drop_f1")("x", "12").error
