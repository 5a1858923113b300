"""Programs judged by running them: standard input and output, calls of a function, or the data set's own test code.

A wrong, endless or hostile program scores 0; only where the sandbox or the test itself fails is there an error. How
programs are confined is sandbox.py's affair, and what is compared where, programs.py's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1fast.config import UserError
from r1fast.rewards.base import Reference, Reward, register, settings
from r1fast.rewards.layout import ANSWER, THINK_END, tagged_answer
from r1fast.rewards.sandbox import Limits, why_not

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]*([\w+-]*)[^\n`]*\n", re.MULTILINE)
_CLOSE = re.compile(r"^[ \t]{0,3}```", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")
LONGEST_PROGRAM = 200_000  # characters; no solution of a contest comes near
LEAST_MEMORY = 128 << 20  # bytes; contests give compiled programs less than Python needs to start
_USUAL = Limits()
ENDLESS = 2  # tests that may run into a limit before the rest count as failed, where they count apart
MOST_TESTS = 500  # of one problem: more are an accident of the data


@dataclass(frozen=True, slots=True)
class Tests:
    """A reference, read: exactly one of the three kinds of test is there."""

    limits: Limits
    partial: bool
    pairs: tuple[tuple[str, str], ...] = ()  # standard input, standard output
    checker: str | None = None  # a program that says whether an output is right, where several are
    function: str | None = None
    calls: tuple[tuple[list, Any], ...] = ()  # arguments, what must come back
    check: Any = None  # programs.Check
    preamble: str = ""  # a HumanEval prompt, which the program goes on from, or whose imports and helpers it may use


def program_of(completion: str, function: str | None = None) -> str:
    """The program that a completion offers: of its final answer, the last Python block that defines `function` (or the
    last block); without any fence, the final answer itself, spaces and all."""
    text = tagged_answer(completion)
    if text is None:
        after = completion.rpartition(THINK_END)[2]
        text = after if after.strip() else completion
        text = text.rpartition(ANSWER)[2]
    blocks, at = [], 0
    while (fence := _FENCE.search(text, at)) is not None:
        close = _CLOSE.search(text, fence.end())
        if fence.group(1).lower() in _PYTHON:
            blocks.append(text[fence.end() : close.start() if close else len(text)])
        at = close.end() if close else len(text)
    if function is not None:
        blocks = [block for block in blocks if re.search(rf"\bdef\s+{re.escape(function)}\b", block)] or blocks
    return blocks[-1] if blocks else text


# -- references -----------------------------------------------------------------------------------------------------


def read_tests(reference: Reference) -> Tests:
    """The tests of a reference, in one of the forms that docs/rewards.md lists; ValueError says what is wrong."""
    if not isinstance(reference, Mapping):
        raise ValueError(f"the reference of a program is a mapping with its tests, not {type(reference).__name__}")
    limits = Limits(
        seconds=float(reference.get("seconds", _USUAL.seconds)),
        memory=max(LEAST_MEMORY, int(reference.get("memory_mb", _USUAL.memory >> 20)) << 20),
    )
    if not 0 < limits.seconds <= 600:
        raise ValueError(f"a program needs more than 0 and at most 600 `seconds`, not {limits.seconds}")
    common = {"limits": limits, "partial": bool(reference.get("partial", False))}
    if "entry_point" in reference:
        return _humaneval(reference, common)
    if "test_list" in reference:
        return _mbpp(reference, common)
    if "inputs" in reference:  # APPS, TACO
        inputs, outputs = reference["inputs"], reference.get("outputs", ())
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
        tests = [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
        return _listed(tests, reference.get("fn_name"), common)
    if "tests" in reference:
        return _listed(reference["tests"], reference.get("function"), common, reference.get("checker"))
    raise ValueError("the reference has no tests: none of `tests`, `inputs`, `entry_point` and `test_list`")


def _listed(tests: Any, function: str | None, common: dict[str, Any], checker: Any = None) -> Tests:
    tests = list(tests)[:MOST_TESTS]
    if not tests:
        raise ValueError("the reference has no tests: the list is empty")
    if function is not None and checker is not None:
        raise ValueError(f"a `checker` reads what a program writes: it cannot check calls of {function!r}")
    pairs, calls = [], []
    for test in tests:
        if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
            raise ValueError("a test is a mapping with `input` and `output`")
        if function is None:
            pairs.append((_text(test["input"]), _text(test["output"])))
        elif isinstance(test["input"], list):
            calls.append((test["input"], test["output"]))
        else:
            raise ValueError(f"the `input` of a call of {function!r} is the list of its arguments")
    checker = None if checker is None else str(checker)
    return Tests(**common, function=function, pairs=tuple(pairs), calls=tuple(calls), checker=checker)


def _text(value: Any) -> str:
    """Data sets give standard input as text or as lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _humaneval(reference: Mapping, common: dict[str, Any]) -> Tests:
    from r1fast.rewards.programs import Check

    if not reference.get("test"):
        raise ValueError("the reference has an `entry_point` but no `test`")
    name, prompt = str(reference["entry_point"]), str(reference.get("prompt", ""))
    check = Check((name,), str(reference["test"]), prelude=_whole(prompt, name), call_check=True)
    return Tests(**common, function=name, check=check, preamble=prompt)


def _whole(prompt: str, function: str) -> str:
    """The part of a prompt that is a program by itself: all of it where the function has a docstring for a body, else
    what stands before the function."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return prompt[: max(0, prompt.rfind(f"def {function}"))]
    return prompt


def source_of(program: str, tests: Tests) -> str:
    """What is run: the program, after what the prompt has before it; or as the prompt's continuation."""
    if not tests.preamble:
        return program
    defined = re.search(rf"\bdef\s+{re.escape(tests.function)}\b", program)
    return f"{_whole(tests.preamble, tests.function) if defined else tests.preamble}\n{program}"


def _mbpp(reference: Mapping, common: dict[str, Any]) -> Tests:
    from r1fast.rewards.programs import Check

    setup = str(reference.get("test_setup_code", "") or "")
    test = "\n".join(map(str, reference["test_list"]))
    names = _called(test) - _defined(setup)
    if not names:
        raise ValueError("the `test_list` calls no function of the program")
    return Tests(**common, function=sorted(names)[0], check=Check(tuple(sorted(names)), test, prelude=setup))


def _called(test: str) -> set[str]:
    """Names that a test calls and that Python does not have itself."""
    import builtins

    calls = (node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call))
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    return {name for name in names if not hasattr(builtins, name)} - _defined(test)


def _defined(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return found


# -- the reward -----------------------------------------------------------------------------------------------------


@register("code")
class Code(Reward):
    """1 where the completion's program passes every test of the reference (or, with `partial`, the share it passes)."""

    cheap, makes_way = False, True

    def why_not(self) -> str | None:
        return why_not(settings().sandbox)

    def prepare(self) -> None:
        if (why := self.why_not()) is not None:
            raise UserError(why)

    def deadline(self, reference: Reference) -> float | None:
        """Each test may take its seconds; queueing on a busy machine several times as much."""
        from r1fast.rewards.programs import CHECKING
        from r1fast.rewards.watch import PATIENCE, STARTUP

        try:
            tests = read_tests(reference)
        except Exception:  # told by `judge`
            return None
        rounds = max(1, len(tests.pairs) or len(tests.calls))
        seconds = tests.limits.seconds + (CHECKING.seconds if tests.checker is not None else 0.0)
        return STARTUP + min(600.0, (PATIENCE + 1) * seconds * rounds)  # far beyond what happens

    def judge(self, completion: str, reference: Reference) -> float:
        from r1fast.rewards.programs import run_calls, run_check, run_stdio

        tests = read_tests(reference)
        program = program_of(completion, tests.function)
        if not program.strip() or len(program) > LONGEST_PROGRAM:
            return 0.0
        source, kind = source_of(program, tests), settings().sandbox
        if tests.check is not None:
            return float(run_check(source, tests.check, tests.limits, kind).passed)
        if tests.function is not None:
            outcomes = run_calls(source, tests.function, tests.calls, tests.limits, kind)
        else:
            outcomes = (run_stdio(source, *pair, tests.limits, kind, tests.checker) for pair in tests.pairs)
        of = len(tests.calls) or len(tests.pairs)
        passed = endless = 0
        for outcome in outcomes:
            passed += outcome.passed
            endless += outcome.exceeded
            if not outcome.passed and (not tests.partial or endless == ENDLESS):
                break
        return passed / of if tests.partial else float(passed == of)
