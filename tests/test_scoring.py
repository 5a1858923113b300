"""Scoring: weights, mixed tasks, values handed in, and a verifier's failure that never trains as a zero."""

import pytest
import rewards_for_tests  # noqa: F401 - registers rewards that misbehave

from r1fast.config import UserError
from r1fast.rewards import pool
from r1fast.rewards.pool import RewardPool
from r1fast.rewards.scoring import Scorer, count_errors, readable, score, stop_above
from r1fast.types import Prompt, Rollout, RolloutGroup


@pytest.fixture(scope="module", autouse=True)
def no_pool_left():
    yield
    pool.close_shared()


def group(texts, answer="23", task="totals", **meta):
    prompt = Prompt("p", (1, 2), "how many ?", answer, task, meta or {"language": "en"})
    return RolloutGroup(prompt, [Rollout([3, 4], [-0.5, -0.25], "stop", text) for text in texts], weights_version=5)


GOOD = "<think> 18 tue + 5 = 23 good </think> <answer> 23 </answer>"
MIXED = "<think> 18 周二 + 5 = 23 good </think> <answer> 23 </answer>"
WRONG = "<think> guess 20 </think> <answer> 20 </answer>"
PLAIN = "guess 23 answer : 23"


def test_kinds_are_weighted_and_summed():
    weights = {"accuracy": 1.0, "format": 0.2, "language": 0.5}
    given = group([GOOD, MIXED, WRONG, PLAIN])
    (scored,) = score([given], weights, "exact")
    assert [dict(r.rewards) for r in scored.rollouts] == [
        {"accuracy": 1.0, "format": 1.0, "language": 1.0},
        {"accuracy": 1.0, "format": 1.0, "language": 0.5},
        {"accuracy": 0.0, "format": 1.0, "language": 1.0},
        {"accuracy": 1.0, "format": 0.0, "language": 1.0},
    ]
    assert [r.reward for r in scored.rollouts] == pytest.approx([1.7, 1.45, 0.7, 1.5])
    assert all(not r.errors for r in scored.rollouts) and count_errors([scored]) == {}
    assert scored.prompt is given.prompt and scored.weights_version == 5
    assert [r.tokens for r in scored.rollouts] == [[3, 4]] * 4
    assert all(r.rewards == {} and r.reward == 0.0 for r in given.rollouts)  # what came in is as it was


def test_a_weight_of_zero_measures_without_rewarding():
    (scored,) = score([group([GOOD, WRONG])], {"accuracy": 1.0, "format": 0.0}, "exact")
    assert [r.reward for r in scored.rollouts] == [1.0, 0.0]
    assert [r.rewards["format"] for r in scored.rollouts] == [1.0, 1.0]


def test_a_failed_verifier_is_left_out_and_moves_nothing():
    (scored,) = score([group(["1", "?", "0", "0.5"])], {"accuracy": 2.0, "format": 1.0}, "failing")
    rewards = [r.reward for r in scored.rollouts]
    assert rewards == [2.0, 1.0, 0.0, 1.0]  # the failed one gets the mean of the other three
    others = [rewards[0], rewards[2], rewards[3]]
    assert rewards[1] - sum(rewards) / 4 == 0.0 and sum(rewards) / 4 == sum(others) / 3
    failed = scored.rollouts[1]
    assert "accuracy" not in failed.rewards and failed.rewards == {"format": 0.0}
    assert "ValueError" in failed.errors["accuracy"]
    assert count_errors([scored, scored]) == {"accuracy": 2}


def test_a_kind_that_is_only_measured_may_fail_without_harm():
    (scored,) = score([group([GOOD, WRONG], language="xx")], {"accuracy": 1.0, "language": 0.0}, "exact")
    assert [r.reward for r in scored.rollouts] == [1.0, 0.0] and count_errors([scored]) == {"language": 2}


def test_a_group_that_failed_whole_is_dead():
    (scored,) = score([group(["?", "??"])], {"accuracy": 1.0}, "failing")
    assert [r.reward for r in scored.rollouts] == [0.0, 0.0] and count_errors([scored]) == {"accuracy": 2}


def test_values_from_elsewhere_count_like_any_other():
    groups = [group([GOOD, WRONG]), group([PLAIN, PLAIN])]
    given = {"preference": [[0.9, 0.1], [0.4, 0.6]]}
    scored = score(groups, {"preference": 1.0, "format": 0.5}, None, given=given)
    assert [[r.reward for r in g.rollouts] for g in scored] == [pytest.approx([1.4, 0.6]), pytest.approx([0.4, 0.6])]


def test_a_batch_of_several_tasks_keeps_its_order():
    scorer = Scorer(
        weights={"totals": {"accuracy": 1.0}, "chat": {"format": 1.0, "preference": 2.0}},
        verifiers={"totals": "exact", "chat": None},
    )
    groups = [group([GOOD, WRONG]), group([GOOD, PLAIN], answer=None, task="chat"), group([PLAIN])]
    scored = scorer.score(groups, given={"preference": [[9, 9], [0.5, 0.25], [9]]})
    assert [[r.reward for r in g.rollouts] for g in scored] == [[1.0, 0.0], [2.0, 0.5], [1.0]]
    assert [g.prompt.task for g in scored] == ["totals", "chat", "totals"]


def test_rewards_that_may_hang_go_through_the_pool():
    groups = [group(["ok", "die"]), group(["sleep 60", "ok"])]
    with RewardPool(workers=2, deadline=1.0) as workers:
        scored = score(groups, {"accuracy": 1.0}, "misbehaving", pool=workers)
    assert [[r.reward for r in g.rollouts] for g in scored] == [[0.5, 0.5], [0.5, 0.5]]
    assert [[bool(r.errors) for r in g.rollouts] for g in scored] == [[False, True], [True, False]]


def test_math_without_a_pool_of_ones_own():
    (scored,) = score([group(["\\boxed{1/2}", "\\boxed{2}"], answer="0.5")], {"accuracy": 1.0}, "math")
    assert [r.reward for r in scored.rollouts] == [1.0, 0.0] and not count_errors([scored])


def test_what_cannot_be_scored_says_so():
    with pytest.raises(UserError, match="'chat' has no right answers"):
        score([group([GOOD], task="chat")], {"accuracy": 1.0}, None)
    with pytest.raises(UserError, match="'chat' has no right answers"):
        Scorer({"chat": {"accuracy": 1.0}}, {"chat": None})
    with pytest.raises(UserError, match="does not say its language"):
        score([group([GOOD], category="x")], {"language": 1.0}, "exact")
    with pytest.raises(UserError, match=r"did you mean 'format'\?"):
        score([group([GOOD])], {"fromat": 1.0}, "exact")
    assert score([], {"accuracy": 1.0}, "exact") == []


@pytest.mark.parametrize(
    ("completion", "language", "reason"),
    [
        (GOOD, "en", None),
        (MIXED, "en", "mixed language: 50% en"),
        (GOOD, "zh", "mixed language: 0% zh"),
        (MIXED, None, None),
        ("<think> see ```print(1)``` so </think> <answer> 1 </answer>", "en", "code block in the reasoning"),
        ("<think> fine words </think> <answer> ```print(1)``` </answer>", "en", None),
        (f"<think> {'words ' * 40} </think>", "en", "paragraph of 242 characters"),
        ("<think> " + "\n\n".join(["words " * 10] * 8) + " </think>", "en", None),
    ],
)
def test_readability(completion, language, reason):
    assert readable(completion, language, least_share=1.0, max_paragraph=200) == reason


def test_readability_has_its_bounds():
    assert readable(MIXED, "en", least_share=0.5) is None
    assert readable(f"<think> {'words ' * 40} </think>", "en") is None


def test_length_asks_what_is_right_and_the_group():
    texts = [tag_of(23), tag_of(23), tag_of(7), tag_of(7)]
    prompt = Prompt("p", (1,), "how many ?", "23", "totals", {})
    rollouts = [Rollout([1] * n, [0.0] * n, "stop", text) for n, text in zip((10, 30, 10, 30), texts, strict=True)]
    (scored,) = score([RolloutGroup(prompt, rollouts, 0)], {"length": 1.0, "accuracy": 0.0}, "exact")
    assert [r.rewards["length"] for r in scored.rollouts] == [0.5, -0.5, 0.0, -0.5]
    (one_length,) = score([group([GOOD, WRONG])], {"accuracy": 1.0, "length": 1.0}, "exact")
    assert [r.rewards["length"] for r in one_length.rollouts] == [0.0, 0.0]
    (unknown,) = score([group(["1", "?"])], {"accuracy": 0.0, "length": 1.0}, "failing")
    assert [bool(r.errors.get("length")) for r in unknown.rollouts] == [False, True]


def tag_of(answer):
    return f"<think> hm </think> <answer> {answer} </answer>"


def test_too_many_failures_stop_with_the_commonest():
    scored = score([group(["1", "?", "0", "?"])], {"accuracy": 1.0, "format": 1.0}, "failing")
    stop_above(scored, 0.25)  # two of eight
    with pytest.raises(UserError, match=r"2 of 8 scores .*max_failures=0.2 allows: accuracy: ValueError: .*\(2x\)"):
        stop_above(scored, 0.2)
    stop_above([], 0.0)
