"""Multiple choice, repetition and length: what counts as a choice, and the papers' formulas."""

import time

import pytest

from r1fast import rewards
from r1fast.rewards.length import length_reward, overlong_penalty
from r1fast.rewards.multiple_choice import chosen
from r1fast.rewards.repetition import repeated_share

OPTIONS = ["Paris", "a red cat", "\\frac{1}{2}", "None of these."]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("<answer> B </answer>", "B"),
        ("<answer>(b)</answer>", "B"),
        ("<answer> **C.** because </answer>", "C"),
        ("<answer> B) a red cat </answer>", "B"),
        ("<answer> a red cat </answer>", "B"),
        ("<answer> A cat </answer>", None),
        ("<answer> The answer is D </answer>", "D"),
        ("<answer> option c </answer>", "C"),
        ("<answer> $\\boxed{\\text{B}}$ </answer>", "B"),
        ("<answer> A or B </answer>", None),
        ("<answer> A, B </answer>", None),
        ("<answer> </answer> Answer: B", None),
        ("so \\boxed{D}", "D"),
        ("so \\boxed{\\textbf{(C)}}", "C"),
        ("so \\boxed{\\frac{1}{2}}", "C"),
        ("Answer: B", "B"),
        ("Answer: A ... no, Answer: $C$", "C"),
        ("The correct answer is (D).", "D"),
        ("the answer is A cat", "A"),
        ("The answer is a cat", None),
        ("I choose option B.", "B"),
        ("答案：C", "C"),
        ("所以选B。", "B"),
        ("答案是 **D**", "D"),
        ("<think> Answer: A </think> Answer: B", "B"),
        ("<think> Answer: A </think> B", "B"),
        ("B", "B"),
        ("Paris", "A"),
        ("Answer: A or B", None),
        ("Answer: A? or maybe B", None),
        ('Answer: "B"', "B"),
        ("Answer: <B>", "B"),
        ("Answer: Paris", "A"),
        ("It melts.\nTherefore, B.", "B"),
        ("(B) is correct", "B"),
        ("I would choose C", "C"),
        ("So A cat is right", None),
        ("Answer: K", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_choice(completion, letter):
    assert chosen(completion, OPTIONS) == letter


def test_multiple_choice_and_its_references():
    reward = rewards.get("multiple_choice")
    assert reward("Answer: B", "B").value == 1.0 == reward("Answer: B", {"answer": 1, "options": OPTIONS}).value
    assert reward("Answer: B", "(C)").value == 0.0 == reward("nothing", {"answer": "B"}).value
    assert reward.extract("<answer> d </answer>") == "D"
    for broken in (None, "", "K", "AB", 12, True, {"answer": "E", "options": OPTIONS}, {"options": OPTIONS}):
        assert "one of its letters" in reward("Answer: B", broken).error


def test_repetition_is_the_share_of_repeated_sequences():
    assert repeated_share("a b c d e f", 2) == 0.0
    assert repeated_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert repeated_share("等等等等等", 2) == pytest.approx(1 - 1 / 4)
    assert repeated_share("one two", 4) == 0.0 == repeated_share("", 1)
    looping = rewards.get("repetition")("and so on and on " * 200)
    assert looping.error is None and -1.0 < looping.value < -0.95


def test_overlong_is_dapo_and_length_is_kimi():
    assert [overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]
    assert [length_reward(n, 10, 30, True) for n in (10, 20, 30)] == [0.5, 0.0, -0.5]
    assert [length_reward(n, 10, 30, False) for n in (10, 20, 30)] == [0.0, 0.0, -0.5]
    assert length_reward(10, 10, 10, True) == 0.0
    assert rewards.get("length")("x", {"tokens": 10, "shortest": 10, "longest": 30, "right": True}).value == 0.5
    assert "needs right" in rewards.get("length")("x", {"tokens": 1, "shortest": 1, "longest": 2}).error
    assert "rewards.overlong.max_tokens" in rewards.get("overlong")("x", {"tokens": 1}).error


@pytest.mark.parametrize("name", ["multiple_choice", "repetition"])
def test_floods_are_judged_in_linear_time(name):
    began = time.process_time()
    for flood in (
        "answer is ",
        "A",
        "(A) or ",
        "选项",
        "\\boxed{",
        "<answer>",
        " ",
        "*",
        "\x00",
        "\ud800",
        "answer: A or ",
    ):
        score = rewards.get(name)(flood * (300_000 // len(flood)), "A")
        assert score.error is None and -1.0 <= score.value <= 1.0
    assert time.process_time() - began < 20
