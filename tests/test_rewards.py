"""Rewards by rule: tables of what is right, wrong and hostile; every reference answer agrees with itself; and a pool
in which a hang or a crash costs one sample."""

import json
import time
from pathlib import Path
from random import Random

import pytest
import rewards_for_tests  # noqa: F401 - registers rewards that misbehave

from r1fast import rewards
from r1fast.config import UserError
from r1fast.rewards import base, pool
from r1fast.rewards.layout import thinking
from r1fast.rewards.numbers import plain_number
from r1fast.rewards.pool import RewardPool
from r1fast.schema import RewardsConfig

DATA = Path(__file__).parents[2] / "shared" / "data"
MEGABYTE = 1_000_000
LARGE = 250_000


@pytest.fixture(scope="module", autouse=True)
def no_pool_left():
    yield
    pool.close_shared()


def tag(answer, thought="hm"):
    return f"<think> {thought} </think> <answer> {answer} </answer>"


# -- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (tag(23), "23"),
        ("guess 23 answer : 23", "23"),
        ("so answer: 23\nbye", "23"),
        ("猜 23 答案 : 23", "23"),
        ("答案：23", "23"),
        ("Answer: 4 then Answer: 23", "23"),
        ("<think> answer : 4 </think> <answer> 23 </answer>", "23"),
        ("<answer> 4 </answer> <answer> 23 </answer>", "23"),
        ("<answer> 4 <answer> 23 </answer>", "23"),
        ("<think> <think> a </think> <answer>  23\n</answer> </answer>", None),
        ("<answer> 23", None),
        ("<answer> </answer> answer : 23", None),
        ("23 </answer>", None),
        ("the answer is 23", None),
        ("answer :", None),
        ("", None),
        ("\x00\x00", None),
        (tag("two  words\n here"), "two words here"),
    ],
)
def test_exact_reads_the_answer(completion, answer):
    exact = rewards.get("exact")
    if answer is None:
        assert exact(completion, "23").value == 0.0
    else:
        assert exact.extract(completion) == answer
        assert exact(completion, f" {answer} ").value == 1.0 and exact(completion, answer + "1").value == 0.0


def test_exact_compares_text_and_says_when_it_cannot():
    exact = rewards.get("exact")
    assert exact(tag(7), 7).value == 1.0
    assert exact(tag("B"), "b").value == 0.0
    assert exact("guess", None).error and exact("guess", {"x": 1}).error


# -- format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think> a </think> <answer> b </answer>", 1),
        ("  <think>a</think>\n\n<answer>b</answer>\n", 1),
        ("<think>\n多行\n</think><answer>是</answer>", 1),
        ("<think> a </think> b <answer> c </answer>", 0),
        ("x <think> a </think> <answer> b </answer>", 0),
        ("<think> a </think> <answer> b </answer> x", 0),
        ("<think> a <answer> b </answer>", 0),
        ("<think> a </think> <answer> b", 0),
        ("<think> a </think> answer : b", 0),
        ("<answer> b </answer> <think> a </think>", 0),
        ("<think> <think> a </think> </think> <answer> b </answer>", 0),
        ("<think> a </think> <answer> b </answer> <answer> c </answer>", 0),
        ("<think> <answer> a </think> b </answer>", 0),
        ("</think> <think> <answer> a </answer>", 0),
        ("<THINK> a </THINK> <answer> b </answer>", 0),
        ("<think>", 0),
        ("", 0),
        ("\x00", 0),
    ],
)
def test_format(completion, value):
    score = rewards.get("format")(completion)
    assert (score.value, score.error) == (value, None)


# -- language -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "code", "value"),
    [
        ("<think> 18 mon - 3 = 15 good </think> <answer> 等等 </answer>", "en", 1.0),
        ("<think> 18 周一 - 3 = 15 good </think>", "en", 0.5),
        ("<think> 18 周一 - 3 = 15 good </think>", "zh", 0.5),
        ("<think> 18 周一 - 3 = 15 对 15 tue </think>", "zh", 2 / 3),
        ("<think> wait what 等等", "en", 2 / 3),  # left open
        ("some words </think> 等等 等等", "en", 1.0),  # never opened
        ("no tags at all 等等", "en", 4 / 5),
        ("<think> $x + \\text{foo bar}$ \\frac{ab}{cd} x1 3cm a b 等等 </think>", "zh", 1 / 3),
        ("<think> \\[ all of this is math \\] 你好 $$ and this $$ </think>", "zh", 1.0),
        ("<think> costs $5 or so 你好 </think>", "en", 3 / 4),
        ("<think> 我们先算出总数再减去三 </think>", "zh", 1.0),
        ("<think> 我们先算出总数 then subtract </think>", "zh", 4 / 6),  # seven characters: four words
        ("<think> これは日本語です </think>", "ja", 1.0),
        ("<think> это по-русски </think>", "ru", 1.0),
        ("<think> это по-русски </think>", "en", 0.0),
        ("<think> hello নমস্কার বিশ্ব </think>", "en", 1 / 3),
        ("<think> hello নমস্কার বিশ্ব </think>", "bn", 2 / 3),
        ("<think> வணக்கம் உலகம் გამარჯობა </think>", "ta", 2 / 3),
        ("<think> hello ᏣᎳᎩ </think>", "en", 1 / 2),  # of a script that no language here has
        ("<think> the angle θ is 3 µm² in ℝ </think>", "en", 1.0),  # signs, not words
        ("<think> 이것은 한국어 ok </think>", "ko", 2 / 3),
        ("<think> هذا نص عربي </think>", "ar", 1.0),
        ("<think> où est le café </think>", "fr", 1.0),
        ("<think> 1 + 2 = 3 </think>", "en", 0.0),
        ("<think> </think> <answer> lots of words </answer>", "en", 0.0),
        ("", "en", 0.0),
    ],
)
def test_language(completion, code, value):
    language = rewards.get("language")
    assert language(completion, {"language": code}).value == pytest.approx(value)
    assert language(completion, code) == language(completion, {"language": code})


def test_language_must_be_known():
    assert "no language 'xx'" in rewards.get("language")("words", {"language": "xx"}).error
    assert rewards.get("language")("words", None).error


def test_the_reading_of_the_reasoning():
    assert thinking("<think> a <think> b </think> c </think> d") == " a <think> b </think> c "
    assert thinking("<think> a <answer> b </answer>") == " a "
    assert thinking("a </think> b") == "a "
    assert thinking("</think> a <think> b") == " b"
    assert thinking("a b") == "a b"


# -- gsm8k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        (tag(18), "18"),
        (tag("$1,080.00"), "1080"),
        (tag("1{,}080 dollars"), "1080"),
        (tag("\\boxed{18}"), "18"),
        (tag("-5"), "-5"),
        (tag("\u22125"), "-5"),
        (tag("50%"), "50"),
        (tag("3/4"), "3/4"),
        (tag("0.75"), "3/4"),
        (tag("9 - 4 = 5"), "5"),
        (tag("16-3"), "3"),
        (tag("no number"), None),
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 7\nor rather\n#### 8", "8"),
        ("#### 1,234 eggs and 5 more", "1234"),
        ("Q: 3?\nA: 12 because of 4 and 5", "12"),
        ("guess 20 answer : 21", "21"),
        ("the answer is $21.", "21"),
        ("The final answer is: \\boxed{42} out of 50", "42"),
        ("5 apples, then 6, so 7 in all", "7"),
        ("<think> 5 then 6 </think> so 7 in all", "7"),
        ("<think> 5 then 6 </think>", "6"),
        ("<answer> 9", "9"),  # an open tag states nothing: the last number is all there is
        ("我有 5 个 答案是 12 个", "12"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{3\\frac{1}{2}}", "7/2"),
        ("The answer is 3 1/2 hours", "7/2"),
        ("The answer is -3 1/2", "-7/2"),
        ("\\boxed{12 \\text{ cm}^2}", "12"),
        ("The answer is 5 + 13 = $18", "18"),
        ("#### 5 \\times 3 = 15 eggs", "15"),
        ("A: 12 because 4 = 4", "12"),
        ("#### 1 080", "1080"),
        ("#### $18 000 000 in all", "18000000"),
        ("\\boxed{1 080}", "1080"),
        (tag("-1 080.50 dollars"), "-2161/2"),
        ("so it is 1\u202f080", "1080"),
        ("that makes 1~080 of 5", "5"),
        ("#### 5 10", "5"),
        ("#### 5 100-gram bags", "5"),
        ("#### 1 0800", "1"),
        (tag("3 100/200"), "7/2"),
        ("we need 5 100 times", "100"),  # two numbers, where nothing is stated
        ("#### Step 2\nThe answer is 18", "18"),
        ("#### 2. Adding up\nIt comes to \\boxed{18}", "18"),
        ("<think> so the answer is 17 </think> She has 18.", "18"),
        ("<think> so the answer is 17 </think> As I said.", "17"),
        ("1/0", None),
        ("9" * 5000, None),
        ("no number", None),
        ("", None),
        ("\x00", None),
    ],
)
def test_gsm8k_reads_the_number(completion, number):
    gsm8k = rewards.get("gsm8k")
    assert gsm8k.extract(completion) == number
    if number is not None:
        assert gsm8k(completion, f"worked\n#### {number}").value == 1.0 == gsm8k(completion, number).value
    assert gsm8k(completion, "987654321").value == 0.0
    assert "no number" in gsm8k(completion, "none").error


# -- math ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        (tag("1/2"), "0.5", 1),
        (tag("\\frac{1}{2}"), "\\frac12", 1),
        (tag("$\\boxed{\\frac{2}{4}}$"), "\\dfrac{1}{2}", 1),
        ("so it is \\boxed{\\{1, 2\\}}", "\\{2,1\\}", 1),
        (tag("(3,4]"), "(3,4]", 1),
        (tag("[3,4]"), "(3,4]", 0),
        (tag("25"), "025", 1),
        (tag("The answer is 7"), "7", 1),
        ("The final answer is 7.", "7", 1),
        ("<think> \\boxed{3} </think> now \\boxed{4}", "4", 1),
        ("<think> \\boxed{3} </think> <answer> 4 </answer>", "3", 0),
        ("\\boxed{3} or \\boxed{4}", "3", 0),
        ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}", 1),  # a box left open: the tail is read without it
        (tag("x^2+2x+1"), "(x+1)^2", 1),
        (tag("8"), "7", 0),
        (tag(""), "7", 0),
        (tag("\x00"), "7", 0),
        (tag("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"), "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", 1),
        (tag("二"), "2", 0),
        (tag("1" * 3000), "1", 0),
        ("", "7", 0),
    ],
)
def test_math(completion, reference, value):
    score = rewards.get("math")(completion, reference)
    assert (score.value, score.error) == (value, None)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("5 \\text{ cm}", "5", 1),
        ("5\\,\\mathrm{cm}^2", "5", 1),
        ("12 apples", "12", 1),
        ("18.90 dollars", "\\$18.90", 1),
        ("90 degrees", "90^\\circ", 1),
        ("10%", "10\\%", 1),
        ("7", "7.", 1),
        ("11,\\! 111", "11111", 1),
        ("1 \\frac{1}{2}", "1.5", 1),
        ("0.333", "\\frac13", 0),
        ("3.14", "\\pi", 0),
        ("2^{10}", "1024", 1),
        ("4:3", "4/3", 1),
        ("x \\in (3,4]", "(3,4]", 1),
        ("3 \\le x < 4", "[3,4)", 1),
        ("x<3", "(-\\infty,3)", 1),
        ("3 \\ge x", "(-\\infty,3)", 0),
        ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)", 1),
        ("5 and 6", "5,6", 1),
        ("1, 2", "\\{1,2\\}", 1),
        ("1,2", "12", 0),
        ("(1,2)", "(2,1)", 0),
        ("\\pm 2", "2,-2", 1),
        ("2516", "2516_8", 1),
        ("40_9", "40", 0),
        ("-5i+6", "6-5i", 1),
        ("y = 2x+3", "2x+3", 1),
        ("x+y=7", "7", 1),
        ("5x - 7y + 11z + 4 = 0", "0", 0),
        ("5x-7y+11z+4=0", "10x-14y+22z+8=0", 1),
        ("\\text{West}", "\\text{east}", 0),
        ("evelyn", "\\text{Evelyn}", 1),
        ("no solution", "\\text{no solution}", 1),
        ("B", "\\text{(B)}", 1),
        ("A)", "A", 1),
        ("C)", "\\text{(B)}", 0),
        ("3 1/2", "7/2", 1),
        ("3 1/2", "31/2", 0),
        ("about 5", "5", 1),
        ("**5**", "5", 1),
        ("\\text{5 cm}", "5", 1),
        ("90°", "90^\\circ", 1),
        ("\\sin 30^\\circ", "\\frac12", 1),
        ("\\frac{\\sqrt{3}}{2}", "\\cos 30^\\circ", 1),
        ("0.1\\overline{3}", "\\frac{2}{15}", 1),
        ("0.\\overline{12}", "0.\\overline{21}", 0),
        ("1.5e3", "1500", 1),
        ("1.6\\times10^{-19}", "1.6 \\times 10^{-19}", 1),
        ("1.6\\times10^{-18}", "1.6 \\times 10^{-19}", 0),
        ("\\sqrt{2}\\sqrt{3}-\\sqrt{6}", "0", 1),
        ("x<2\\text{ or }x>3", "(-\\infty,2)\\cup(3,\\infty)", 1),
        ("(-\\infty,2)\\cup(3,\\infty)", "x<2\\text{ or }x>3", 1),
        ("(-\\infty,2)\\cup[3,\\infty)", "x<2\\text{ or }x>3", 0),
        ("-\\infty < x < 3", "(-\\infty,3)", 1),
        ("\\{x \\mid x > 3\\}", "(3,\\infty)", 1),
        ("\\{x : x \\ge 3\\}", "(3,\\infty)", 0),
        ("5,", "5", 1),
        ("x \\neq 2", "(-\\infty,2)\\cup(2,\\infty)", 1),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)", 1),
        ("\\langle 2,1\\rangle", "(1,2)", 0),
        ("\\langle 1,2\\rangle", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1),
        ("\\varnothing", "\\text{no real solutions}", 1),
        ("0", "no solution", 0),
        ("an ellipse", "\\text{ellipse}", 1),
        ("a circle", "\\text{ellipse}", 0),
        ("\\text{all real numbers}", "(-\\infty, \\infty)", 1),
        ("3:30 PM", "3{:}30\\text{ p.m.}", 1),
        ("3:30 AM", "3{:}30\\text{ p.m.}", 0),
        ("6:00", "5:00", 0),
        ("12 hours", "12 \\text{ minutes}", 0),
        ("60 \\text{ minutes}", "1 \\text{ hour}", 1),
        ("50 cents", "\\$0.50", 1),
        ("5\\text{ cm}^2", "5\\text{ cm}", 0),
        ("5\\text{ cm}", "5\\text{ cm}^{2}", 0),
        ("5 cm^2", "5\\text{ cm}^3", 0),
        ("5 square feet", "5\\text{ ft}^2", 1),
        ("5 square feet", "5\\text{ feet}", 0),
        ("12 \\text{ cubic inches}", "12\\,\\text{in}^3", 1),
        ("\\frac{1}{2} \\text{ m}^2", "5000 \\text{ cm}^2", 1),
        ("5 cm squared", "5 \\mathrm{cm}^2", 1),
        ("5 cm^2", "5", 1),
        ("5 cm^2", "25", 0),
        ("5 m", "5 \\text{ km}", 0),
        ("i", "\\sqrt{-1}", 1),
        ("\\sqrt{-4}", "2i", 1),
        ("-2i", "\\sqrt{-4}", 0),
        ("3+\\sqrt{-4}", "3+2i", 1),
        ("i^2", "-1", 1),
        ("i", "-i", 0),
        ("i", "1", 0),
        ("\\{i,-i\\}", "\\pm\\sqrt{-1}", 1),
        ("ix", "\\sqrt{-1}", 0),
    ],
)
def test_math_reads_what_people_write(answer, reference, value):
    for form in (tag(answer), f"So it is $\\boxed{{{answer}}}$."):
        score = rewards.get("math")(form, reference)
        assert (score.value, score.error) == (value, None)


def test_math_votes_agree_on_form():
    extract = rewards.get("math").extract
    assert extract(tag("\\dfrac{1}{2}")) == extract("\\boxed{ \\frac{1}{2} }") == extract(tag("0.5")) == "1/2"
    assert extract(tag("1,080")) == extract(tag("$1080.0$")) == "1080"
    assert extract(tag("")) is None


def test_math_runs_away_from_nothing_that_a_model_writes():
    """Towers of powers end at the deadline or before it, as an error or as wrong; and the pool works afterwards."""
    towers = ["9^{9^{9^9}}", "9^9^9^9", "(10^{10})!", "((" * 200, "\\sum_{n=1}^{10^{12}} \\frac{1}{n}"]
    began = time.monotonic()
    with RewardPool(workers=2, deadline=1.0) as workers:
        scores = workers.run([("math", tag(tower), "12") for tower in towers] + [("math", tag("12"), "12")])
        assert scores[-1] == rewards.Score(1.0)
        assert all(score.value == 0.0 for score in scores[:-1])
        assert any("no verdict within 1 s" in (score.error or "") for score in scores)
        assert workers.restarts == sum(score.error is not None for score in scores)
        assert workers.run([("math", tag("\\frac12"), "0.5")])[0].value == 1.0
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("reference", "said"),
    [(None, "TypeError"), ({"a": 1}, "TypeError"), ("", "the reference is empty")],
)
def test_math_blames_the_reference_where_it_should(reference, said):
    assert said in rewards.get("math")(tag(3), reference).error


def test_a_verifier_that_breaks_is_not_a_wrong_answer(monkeypatch):
    """math-verify swallowing its own failures once scored whole runs zero; here that is an error."""
    import math_verify

    def broken(*_, **__):
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(math_verify, "verify", broken)
    assert "signal only works" in rewards.get("math").attempt(tag("x+1"), "1+x").error


# -- hostile to all -------------------------------------------------------------------------------------------------

HUGE = {
    "one word": "x" * MEGABYTE,
    "dollars": "$" * LARGE,
    "open math": "\\[" * (LARGE // 2),
    "open boxes": "\\boxed{" * (LARGE // 7),
    "braces": "\\boxed{" + "{" * LARGE,
    "open answers": "<answer>" * (LARGE // 8),
    "closed answers": "</answer>" * (LARGE // 9),
    "labels": "answer : " * (LARGE // 9),
    "label, blanks": "answer" + " " * LARGE,
    "answers, blanks": ("answer" + " " * 90) * (LARGE // 96),
    "digits": "1" * LARGE,
    "grouped digits": "1,111" * (LARGE // 5),
    "minuses": "-" * LARGE,
    "slashes": "1/" * (LARGE // 2),
    "hashes": "#" * LARGE,
    "thoughts": "<think>" * (LARGE // 14) + "</think>" * (LARGE // 16),
    "chinese": "等" * LARGE,
    "nulls": "\x00" * LARGE,
    "half a pair": "\ud800" * 1000,
    "newlines": "\n" * MEGABYTE,
    "unclosed tags": "<think><answer>" * (MEGABYTE // 15),
    "deep fractions": "\\boxed{" + "\\frac{1}{" * (LARGE // 9),
    "closed deep fractions": "<answer>" + "\\frac{1}{" * 40 + "1" + "}" * 40 + "</answer>",
    "deep roots": "<answer>" + "\\sqrt{" * 60 + "2" + "}" * 60 + "</answer>",
    "brackets within brackets": "<answer>" + "(" * 200 + "1" + ")" * 200 + "</answer>",
    "fences": "```python\n" * (LARGE // 10),
}


@pytest.mark.parametrize("name", ["exact", "format", "language", "gsm8k", "math"])
def test_any_flood_is_judged_in_linear_time(name):
    reference = {"language": "en"} if name == "language" else "1"
    reward = rewards.get(name)
    began = time.process_time()
    for what, completion in HUGE.items():
        score = reward(completion, reference)
        assert 0.0 <= score.value <= 1.0, what
        assert score.error is None, (what, score.error)
    assert time.process_time() - began < 20  # quadratic would be half an hour


# -- the registry ---------------------------------------------------------------------------------------------------


def test_the_registry():
    assert {"math", "gsm8k", "exact", "format", "language"} <= set(rewards.names())
    assert all(rewards.get(name).name == name for name in rewards.names())
    with pytest.raises(UserError, match=r"no reward 'fromat' \(did you mean 'format'\?\); known are "):
        rewards.get("fromat")


# -- the pool -------------------------------------------------------------------------------------------------------


def test_a_hang_and_a_crash_cost_one_sample_each():
    jobs = ["ok", "sleep 60", "a", "die", "b", "raise", "abort", "c", "print", "memory"]
    began = time.monotonic()
    with RewardPool(workers=2, deadline=1.0) as workers:
        scores = workers.run([("misbehaving", job, None) for job in jobs])
        assert workers.restarts == 3
    assert time.monotonic() - began < 30
    by_job = dict(zip(jobs, scores, strict=True))
    assert all(by_job[job] == rewards.Score(0.5) for job in ("ok", "a", "b", "c"))
    assert by_job["print"] == rewards.Score(0.25)  # what a verifier prints is not its verdict
    assert by_job["sleep 60"].error == "misbehaving: no verdict within 1 s"
    assert by_job["die"].error == "misbehaving: the verifier's process died (exit code 3)"
    assert "died (exit code -6)" in by_job["abort"].error
    assert by_job["raise"].error == "RuntimeError: as asked"
    assert "MemoryError" in by_job["memory"].error


def test_verdicts_are_remembered_and_errors_are_not():
    with RewardPool(workers=1, deadline=5.0) as workers:
        first, again = workers.run([("misbehaving", "pid", "a"), ("misbehaving", "pid", "a")])
        assert first == again and workers.run([("misbehaving", "pid", "a")]) == [first]
        assert workers.run([("misbehaving", "die", "a")])[0].error
        assert workers.run([("misbehaving", "pid", "a")]) == [first]  # from memory: that process is gone
        assert workers.run([("misbehaving", "pid", "b")])[0].value != first.value
        assert workers.run([("misbehaving", "die", "a")])[0].error and workers.restarts == 2


def test_a_pool_starts_late_ends_all_and_starts_again():
    workers = RewardPool(workers=2)
    assert workers.run([]) == [] and not workers._workers
    workers.run([("misbehaving", "one", None), ("misbehaving", "two", None)])
    processes = [worker.process for worker in workers._workers]
    assert len(processes) == 2 and all(process.poll() is None for process in processes)
    workers.close()
    assert all(process.poll() is not None for process in processes)
    assert workers.run([("misbehaving", "three", None)])[0].value == 0.5
    workers.close()


def test_large_messages_and_a_reward_that_cannot_be_loaded():
    with RewardPool(workers=1) as workers:
        assert workers.run([("misbehaving", "length", "等" * MEGABYTE)])[0].value == MEGABYTE
        assert "no_such_module_anywhere" in workers.run([("unloadable", "", None)])[0].error
        assert workers.run([("misbehaving", "still here", None)])[0].value == 0.5


def test_rewards_that_may_hang_are_safe_to_call_directly(monkeypatch):
    monkeypatch.setattr(base, "_settings", RewardsConfig(deadline=1.0))
    pool.close_shared()
    assert rewards.get("misbehaving")("die").error
    assert rewards.get("misbehaving")("fine") == rewards.Score(0.5)


def test_a_script_without_a_main_guard_can_call_a_reward(tmp_path):
    """Pools that start workers by importing the main module again would run the script in each of them."""
    import subprocess
    import sys

    script = tmp_path / "script.py"
    script.write_text("import r1fast\nprint('once', r1fast.rewards.get('math')('\\\\boxed{2}', '2').value)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "once 1.0\n", done.stderr


# -- real answers ---------------------------------------------------------------------------------------------------


def rows(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data file {path.name} is absent")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_real_math_answers_equal_themselves_in_every_form():
    answers = [str(row["answer"]) for name in ("math500", "aime24") for row in rows(name)]
    items = []
    for i, answer in enumerate(answers):
        form = (tag(answer), f"Therefore $\\boxed{{{answer}}}$.", tag(f"${answer}$"))[i % 3]
        items.append(("math", form, answer))
    with RewardPool() as workers:
        scores = workers.run(items)
    assert [(item, score) for item, score in zip(items, scores, strict=True) if score != rewards.Score(1.0)] == []


def same_to_a_reader(answer, other):
    """Equal but for a name, a sign of degrees, or leading zeros."""
    one, two = (text.removeprefix("x=").removesuffix("^\\circ").lstrip("0") for text in (answer, other))
    return one == two or plain_number(one) == plain_number(two) is not None


@pytest.mark.long(20)
def test_ten_thousand_pairs_of_real_answers_are_told_apart():
    math500, aime = ([str(row["answer"]) for row in rows(name)] for name in ("math500", "aime24"))
    answers = [*math500, *aime, *(row["answer"].rpartition("####")[2].strip() for row in rows("gsm8k_test"))]
    random, pairs = Random(6), set()
    while len(pairs) < 10_000:
        pairs.add((random.choice(answers), random.choice(answers)))
    pairs = sorted(pairs)
    with RewardPool() as workers:
        scores = workers.run([("math", tag(other), answer) for answer, other in pairs])
    accepted = [pair for pair, score in zip(pairs, scores, strict=True) if score.value]
    assert [pair for pair in accepted if not same_to_a_reader(*pair)] == []
    assert 0 < len(accepted) < 200
    assert not [score for score in scores if score.error]


def test_real_solutions_are_right_by_their_own_answers():
    math = rewards.get("math")
    math.prepare()
    for row in rows("math500")[::5]:
        assert math.attempt(row["solution"], row["answer"]) == rewards.Score(1.0), row["answer"]


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_real_gsm8k_answers_equal_themselves(name):
    gsm8k = rewards.get("gsm8k")
    for row in rows(name):
        number = row["answer"].rpartition("####")[2].strip()
        for completion in (row["answer"], tag(f"${number}"), f"so the answer is {number}.", f"That makes {number}."):
            assert gsm8k(completion, row["answer"]) == rewards.Score(1.0)
        assert gsm8k(tag(f"{number}1"), row["answer"]) == rewards.Score(0.0)
