"""The reward `code`: what is taken for the program, every form of tests, limits, partial credit; all of HumanEval."""

import json
from pathlib import Path

import pytest

from r1fast import rewards, tasks
from r1fast.config import UserError
from r1fast.rewards import sandbox
from r1fast.rewards.code import program_of, read_tests
from r1fast.rewards.inside import plain
from r1fast.rewards.pool import RewardPool
from r1fast.rewards.programs import same_output, same_value
from r1fast.schema import TaskConfig

HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "humaneval.jsonl"

needs_bubblewrap = pytest.mark.skipif(
    sandbox.why_not("bubblewrap") is not None, reason=str(sandbox.why_not("bubblewrap"))
)


# -- the program of a completion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "function", "program"),
    [
        ("print(1)", None, "print(1)"),
        ("    return 1\n", "f", "    return 1\n"),
        ("Sure:\n```python\nprint(1)\n```\nDone.", None, "print(1)\n"),
        ("```py\na\n```\n```python3\nb\n```", None, "b\n"),
        ("```\na\n```\n```bash\nls\n```", None, "a\n"),
        ("```python\ndef f(x): pass\n```\nUse it:\n```python\nprint(f(1))\n```", "f", "def f(x): pass\n"),
        ("<think>\n```python\nwrong\n```\n</think>\n```python\nright\n```", None, "right\n"),
        ("<think> a </think> <answer>\n```python\nright\n```\n</answer>", None, "right\n"),
        ("<think> a </think> <answer>\n```python\ncut off", None, "cut off"),
        ("<think>\n```python\nall there is\n```\n</think>", None, "all there is\n"),
        ("  ```python title='x'\na\n  ```", None, "a\n"),
        ("```python\ns = '``` not a fence'\n```", None, "s = '``` not a fence'\n"),
        ("", None, ""),
    ],
)
def test_the_program_of_a_completion(completion, function, program):
    assert program_of(completion, function) == program


@pytest.mark.parametrize("flood", ["```\n", "```python\n", "`", "<think>", "<answer>", "\n", "``` "])
def test_the_program_is_found_in_linear_time(flood):
    assert isinstance(program_of(flood * (1_000_000 // len(flood)), "f"), str)


# -- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (None, "mapping"),
        ("x", "mapping"),
        ({}, "no tests"),
        ({"tests": []}, "empty"),
        ({"tests": [{"input": "x"}]}, "`input` and `output`"),
        ({"tests": [{"input": "x", "output": 1}], "function": "f"}, "list of its arguments"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ({"entry_point": "f"}, "no `test`"),
        ({"test_list": ["assert len([1]) == 1"]}, "calls no function"),
        ({"tests": [{"input": "", "output": ""}], "seconds": 0}, "seconds"),
        ({"tests": [{"input": [1], "output": 1}], "function": "f", "checker": "print(1)"}, "cannot check calls"),
    ],
)
def test_a_reference_without_tests_is_a_failure(reference, said):
    score = rewards.get("code").attempt("print(1)", reference)
    assert score.value == 0.0 and said in score.error


def test_the_forms_of_tests():
    apps = read_tests({"inputs": ["1\n", ["2", "3"]], "outputs": ["a", ["b", "c"]], "seconds": 2, "memory_mb": 128})
    assert apps.pairs == (("1\n", "a"), ("2\n3", "b\nc")) and apps.limits.seconds == 2
    assert apps.limits.memory == 128 << 20
    leet = read_tests({"inputs": [[1, [2]]], "outputs": [3], "fn_name": "add"})
    assert leet.function == "add" and leet.calls == (([1, [2]], 3),)
    mbpp = read_tests(
        {"test_list": ["assert sim({1, 2}, set([2])) == {2}", "import math\nassert math.ceil(sim(1)) == 1"]}
    )
    assert mbpp.check.functions == ("sim",)


# -- what is equal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1  2 \n\n", "1 2\n", True),
        ("1\n2", "1 2", False),
        ("1.0", "1", True),
        ("0.3333333", "0.333333333", True),
        ("0.3334", "0.333333333", False),
        ("1000001", "1000000", False),
        ("1000000.5", "1000000", False),
        ("yes", "YES", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("1_0", "10", False),
        ("inf", "1e999", False),
        ("", "", True),
        ("\x00", "", False),
    ],
)
def test_outputs(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    ("ours", "right", "same"),
    [
        ([1, (2, 3)], [1, [2, 3]], True),
        ({1: 2}, {"1": 2}, True),
        (0.1 + 0.2, 0.3, True),
        (10**400, 1.5, False),
        (True, 1, False),
        ("1", 1, False),
        (float("nan"), 1.0, False),
        (None, None, True),
        ({1}, [1], False),
        ([1, 2], [1], False),
    ],
)
def test_values(ours, right, same):
    assert same_value(ours, right) is same


VALUES = [
    None,
    True,
    0,
    -(10**5000),
    1.5,
    float("inf"),
    1j,
    "é\ud800\x00",
    b"\x00",
    [1, [2]],
    (1,),
    {1, 2},
    frozenset("a"),
]


def test_plain_data_goes_over_and_comes_back():
    for value in [*VALUES, {1: "a", (1, 2): [None]}, {"n": VALUES[:6]}]:
        back = plain.unpack(json.loads(plain.dump({"x": plain.pack(value)}))["x"])
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize("message", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000])
def test_a_message_that_is_none_is_refused(message):
    with pytest.raises(plain.NotPlain):
        plain.load(message)


@pytest.mark.parametrize(
    "packed", [["?", 1], ["i"], ["i", "x"], [], {}, 5, ["s", [["l", []]]], ["d", [[1]]], ["q", 1, 0]]
)
def test_a_value_that_is_none_is_refused(packed):
    with pytest.raises(plain.NotPlain):
        plain.unpack(packed)


# -- programs run ---------------------------------------------------------------------------------------------------

SUM = {"tests": [{"input": "1 2", "output": "3"}, {"input": "5 6", "output": "11"}], "seconds": 2}
CALLS = {"tests": [{"input": [1, 2], "output": 3}, {"input": [5, 6], "output": 11}], "function": "add", "seconds": 2}
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]"], "seconds": 2}
LONG = "x" * 3_000_000
DEEP = "import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\nf(9999)"
F = {"function": "f"}
CHECKER = """
import sys
given, right, written = (open(path).read().split() for path in sys.argv[1:])
total, one, two = int(given[0]), *map(int, written)
print(int(one + two == total and right == ["1", str(total - 1)]))
"""
SUMMANDS = {"tests": [{"input": "9", "output": "1 8"}], "checker": CHECKER, "seconds": 2}
DIES_ONCE = "import os\ndef add(a, b): return 11 if a == 5 else os._exit(0)"
RIGHT = "print(sum(map(int, input().split())))"
CASES = {
    "right": (RIGHT, SUM, 1.0),
    "wrong": ("print(3)", SUM, 0.0),
    "another right one": ("n = int(input())\nprint(n - 4, 4)", SUMMANDS, 1.0),
    "right by no checker": ("print(1, 7)", SUMMANDS, 0.0),
    "nothing for the checker": ("print('many')", SUMMANDS, 0.0),
    "no room of the checker's": ("print(*open('/sandbox/correct_output.txt').read().split())", SUMMANDS, 0.0),
    "partly right": ("print(3)", {**SUM, "partial": True}, 0.5),
    "right, but a bad exit": (f"{RIGHT}\nexit(1)", SUM, 0.0),
    "right, with a good exit": (f"{RIGHT}\nquit()", SUM, 1.0),
    "right, and a thread": (f"import threading\nt = threading.Thread(target=lambda: {RIGHT})\nt.start()", SUM, 1.0),
    "main guard": (f"if __name__ == '__main__':\n    {RIGHT}", SUM, 1.0),
    "deep recursion": (f"{DEEP}\n{RIGHT}", SUM, 1.0),
    "no program": ("", SUM, 0.0),
    "no Python": ("Sorry, I cannot.", SUM, 0.0),
    "null bytes": (RIGHT + "\x00", SUM, 0.0),
    "half a pair": (f"{RIGHT}\n\ud800 = 1", SUM, 0.0),
    "huge": ("#" * 1_000_000 + "\n" + RIGHT, SUM, 0.0),
    "function": ("def add(a, b): return a + b", CALLS, 1.0),
    "method": ("class Solution:\n    def add(self, a, b):\n        return a + b", CALLS, 1.0),
    "partly right function": ("def add(a, b): return 3", {**CALLS, "partial": True}, 0.5),
    "function that ends at the first": ("def add(a, b): exit(a)", {**CALLS, "partial": True}, 0.0),
    "function that dies once": (DIES_ONCE, {**CALLS, "partial": True}, 0.5),
    "no such function": ("def sub(a, b): return a - b", CALLS, 0.0),
    "assertions": ("def add(a, b): return a + b", MBPP, 1.0),
    "failed assertions": ("def add(a, b): return 3", MBPP, 0.0),
    "slow": ("import time\ntime.sleep(0.2)\n" + RIGHT, {**SUM, "seconds": 0.1}, 0.0),
    "greedy": ("x = bytearray(300 << 20)\n" + RIGHT, {**SUM, "memory_mb": 128}, 0.0),
    "not so greedy": ("x = bytearray(300 << 20)\n" + RIGHT, {**SUM, "memory_mb": 512}, 1.0),
    "large input": ("print(len(input()))", {"tests": [{"input": LONG, "output": "3000000"}]}, 1.0),
    "large output": ("print('x' * 3_000_000)", {"tests": [{"input": "", "output": LONG}]}, 1.0),
    "large argument": ("def f(x): return len(x)", {**F, "tests": [{"input": [LONG], "output": 3_000_000}]}, 1.0),
}  # fmt: skip


@needs_bubblewrap
def test_programs_are_run_against_their_tests():
    with RewardPool(workers=2) as pool:
        scores = pool.run([("code", completion, reference) for completion, reference, _ in CASES.values()])
    found = {name: (score.value, score.error) for name, score in zip(CASES, scores, strict=True)}
    assert found == {name: (value, None) for name, (_, _, value) in CASES.items()}


@needs_bubblewrap
def test_a_test_that_is_itself_broken_is_a_failure():
    broken = {"prompt": "", "entry_point": "f", "test": "def check(candidate):\n    assert undefined(candidate)"}
    score = rewards.get("code").attempt("def f(): pass", broken)
    assert score.value == 0.0 and "the test is broken: NameError" in score.error
    asks_nothing = {**broken, "test": "def check(candidate):\n    pass"}
    assert "never calls" in rewards.get("code").attempt("def f(): pass", asks_nothing).error


@needs_bubblewrap
def test_a_checker_that_does_not_end_says_nothing(monkeypatch):
    monkeypatch.setattr("r1fast.rewards.programs.CHECKING", sandbox.Limits(seconds=0.2))
    score = rewards.get("code").attempt("print(1, 8)", {**SUMMANDS, "checker": "while True: pass"})
    assert "the problem's checker: no end within 0.2 s" in score.error


def shortened(solution):
    """A canonical solution cut off at half its characters."""
    solution = solution.rstrip()
    return solution[: len(solution) // 2]


@pytest.mark.long(30)
@needs_bubblewrap
def test_all_of_humaneval_passes_and_none_of_it_cut_short():
    if not HUMANEVAL.exists():
        pytest.skip("the shared data file humaneval.jsonl is absent")
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").splitlines()]
    items = [("code", row["canonical_solution"], row) for row in rows]
    items += [("code", f"```python\n{row['prompt']}{row['canonical_solution']}```", row) for row in rows[::4]]
    cut = [("code", shortened(row["canonical_solution"]), {**row, "seconds": 1}) for row in rows]
    with RewardPool() as pool:
        scores = pool.run(items + cut)
    assert len(rows) == 164 and not [score for score in scores if score.error]
    assert [item[2]["task_id"] for item, score in zip(items, scores, strict=False) if score.value != 1.0] == []
    assert [item[2]["task_id"] for item, score in zip(cut, scores[len(items) :], strict=True) if score.value] == []


# -- the task -------------------------------------------------------------------------------------------------------

ROWS = {
    "own": {"question": "Add.", "tests": [{"input": "1 2", "output": "3"}], "seconds": 3},
    "calls": {"question": "Add.", "function": "add", "tests": [{"input": [1, 2], "output": 3}]},
    "apps": {"question": "Add.", "input_output": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})},
    "mbpp": {"question": "Add.", "test_list": ["assert add(1, 2) == 3"]},
    "humaneval": {"question": "Add.", "prompt": "", "entry_point": "add", "test": "def check(c): assert c(1, 2) == 3"},
}


def code_task(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks.build("programs", TaskConfig(kind="code", path=str(path), options=options))


@pytest.mark.parametrize("form", ROWS)
def test_the_task_code_reads_every_form_of_tests(tmp_path, form):
    row = {**ROWS[form], "program": "def add(a, b):\n    return a + b"}
    task = code_task(tmp_path / "rows.jsonl", [row] * 3, solution="program", partial=True, memory_mb=256)
    (problem, *_) = task.problems("train")
    assert task.verifier == "code" and problem.text.endswith("Add.")
    assert ("standard input" in problem.text) == (form in ("own", "apps"))
    tests = read_tests(problem.answer)
    assert tests.partial and tests.limits.memory == 256 << 20 and tests.limits.seconds == (3 if form == "own" else 5)
    (example, *_) = task.examples()
    assert program_of(example.completion) == row["program"] + "\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "x"}, r"rows.jsonl:1: the reference has no tests"),
        ({"question": "x", "input_output": "{"}, r"rows.jsonl:1: field 'input_output' is not JSON"),
        ({"question": "x", "tests": [1]}, r"rows.jsonl:1: a test is a mapping"),
        ({"question": "x", "test_list": ["assert ("]}, r"rows.jsonl:1: "),
    ],
)
def test_a_row_without_tests_stops_the_run_before_it_starts(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        code_task(tmp_path / "rows.jsonl", [row])
