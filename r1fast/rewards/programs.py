"""A program against its tests: what is fed to the sandbox, and what is compared, out here, with what came back.

Three kinds of test: standard input against standard output; calls of a function against what they return; and a piece
of test code that calls the function itself (HumanEval, MBPP). In each, what is right stays outside: the program's
sandbox is given inputs and nothing else. Test code knows what is right, so it runs in a second sandbox, where the
function is a stand-in that asks the first one over a pipe.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from r1fast.rewards import lane
from r1fast.rewards.inside import plain
from r1fast.rewards.sandbox import Kind, Limits, SandboxError, Started, memory_file, start
from r1fast.rewards.watch import POLL, Exceeded, Watch, pump

CHECKING = Limits(seconds=10.0)  # of a problem's own checker
TOLERANCE = 1e-6  # relative, or absolute below 1; only where the expected number is written as a fraction


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended; `why` says what was wrong."""

    passed: bool
    why: str = ""
    exceeded: bool = False  # a limit ended it


class Pipes:
    """Descriptors of pipes, each closed once."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def pipe(self) -> tuple[int, int]:
        """(where to read, where to write)"""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def close(self, *descriptors: int) -> None:
        """Closes these, or all that are left."""
        for descriptor in descriptors or tuple(self._open):
            self._open.discard(descriptor)
            os.close(descriptor)


# -- standard input and output --------------------------------------------------------------------------------------


def run_stdio(
    source: str, given: str, expected: str, limits: Limits, kind: Kind, checker: str | None = None
) -> Outcome:
    """Runs the program on `given`; it passes where it ends with exit code 0 and has written `expected`, or what the
    problem's own `checker` takes."""
    try:
        code, output = execute(source, given, limits, kind)
    except Exceeded as error:
        return Outcome(False, str(error), exceeded=True)
    if code != 0:
        return Outcome(False, f"exit code {code}")
    if checker is not None:
        return _checked(checker, given, expected, output, kind)
    same = same_output(output.decode("utf-8", "replace"), expected)
    return Outcome(same, "" if same else "other output than expected")


# What a checker finds beside it, in the order of its arguments (open-r1/codeforces: `generated_checker`).
_CHECKED = ("input.txt", "correct_output.txt", "solution_output.txt")


def _checked(checker: str, given: str, expected: str, output: bytes, kind: Kind) -> Outcome:
    """What a problem's own checker says of an output, where several are right: it prints 1 and ends with exit code 0.
    One that fails on what it reads has read no answer; one that does not end says nothing (ValueError).

    It knows what is right, so it runs in a sandbox of its own, after that of the program is gone.
    """
    files = dict(zip(_CHECKED, (_bytes(given), _bytes(expected), output), strict=True))
    try:
        code, said = execute(checker, "", CHECKING, kind, files)
    except Exceeded as error:
        raise ValueError(f"the problem's checker: {error}") from None
    passed = code == 0 and said.split()[:1] in ([b"1"], [b"1.0"])
    return Outcome(passed, "" if passed else "the problem's checker does not take it")


def execute(
    source: str, given: str, limits: Limits, kind: Kind, files: dict[str, bytes] | None = None
) -> tuple[int, bytes]:
    """(exit code, standard output) of a program, its arguments the paths of `files`, which lie beside it. Exceeded
    where a limit ended it; SandboxError where it never began."""
    lane.hold()
    with contextlib.ExitStack() as stack:
        ends = Pipes()
        stack.callback(ends.close)
        reader, writer = ends.pipe()
        stdin = memory_file(given.encode("utf-8", "surrogatepass"))
        stack.callback(os.close, stdin)
        beside = {"solution.py": _bytes(source), **(files or {})}
        program = start("stdio", beside, limits, kind, stdin=stdin, stdout=writer, arguments=tuple(files or ()))
        stack.callback(program.close)
        ends.close(writer)
        watch = Watch([program], limits)
        watch.wait_ready()
        output, _ = pump(watch, reader, limits.output)
        while True:  # its output may have ended before it
            try:
                return program.process.wait(POLL), output
            except subprocess.TimeoutExpired:
                watch.check()


def same_output(output: str, expected: str) -> bool:
    """Line by line, without blank ends; words of a line are equal as text or as numbers (fractions within 1e-6)."""
    ours, right = output.rstrip().splitlines(), expected.rstrip().splitlines()
    if len(ours) != len(right):
        return False
    for one, two in zip(ours, right, strict=True):
        if one.strip() == two.strip():
            continue
        words, wanted = one.split(), two.split()
        if len(words) != len(wanted) or not all(map(_same_word, words, wanted)):
            return False
    return True


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if len(word) > 400 or len(wanted) > 400 or "_" in word:
        return False
    try:
        one, two = Decimal(word), Decimal(wanted)
    except InvalidOperation:
        return False
    if not (one.is_finite() and two.is_finite()):
        return False
    if not set(".eE") & set(wanted):
        return one == two
    return math.isclose(float(one), float(two), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


# -- calls of a function --------------------------------------------------------------------------------------------


class Calls:
    """One loaded program whose functions can be called, again and again, each call with a budget of its own."""

    def __init__(self, source: str, limits: Limits, kind: Kind) -> None:
        lane.hold()
        self.limits = limits
        self._ends = Pipes()
        requests, self._requests = self._ends.pipe()
        self._replies, replies = self._ends.pipe()
        self._program: Started | None = None
        try:
            pipes = {"requests": requests, "replies": replies}
            self._program = start("serve", {"solution.py": _bytes(source)}, limits, kind, pipes=pipes)
            self._ends.close(requests, replies)
            os.set_blocking(self._requests, False)
            self._watch = Watch([self._program], limits)
            self._watch.wait_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._program is not None:
            self._program.close()
        self._ends.close()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """The reply: {"result": packed} or {"raised": type's name}. Exceeded; NotPlain where nothing usable came."""
        request = plain.dump(
            {"function": function, "arguments": [plain.pack(value) for value in arguments], "keywords": {}}
        )
        self._watch.restart()
        line, ended = pump(self._watch, self._replies, plain.LONGEST, (self._requests, request), line=True)
        if ended:
            raise plain.NotPlain("the program ended")
        return plain.load(line)


def run_calls(
    source: str, function: str, tests: Sequence[tuple[list, Any]], limits: Limits, kind: Kind
) -> Iterator[Outcome]:
    """The outcome of each (arguments, what must come back), in order, as they are asked for."""
    calls: Calls | None = None
    try:
        for arguments, expected in tests:
            if calls is None:
                calls = Calls(source, limits, kind)
            outcome, alive = _one_call(calls, function, arguments, expected)
            if not alive:
                calls.close()
                calls = None
            yield outcome
    finally:
        if calls is not None:
            calls.close()


def _one_call(calls: Calls, function: str, arguments: list, expected: Any) -> tuple[Outcome, bool]:
    """The outcome, and whether the program can be asked again."""
    try:
        reply = calls.call(function, arguments)
        if "result" in reply:
            same = same_value(plain.unpack(reply["result"]), expected)
            return Outcome(same, "" if same else "returns something else"), True
    except (Exceeded, plain.NotPlain, BrokenPipeError) as error:
        return Outcome(False, str(error), exceeded=isinstance(error, Exceeded)), False
    said = reply.get("raised") or reply.get("refused") or "a malformed message"
    return Outcome(False, f"raised {said}"[:200]), "raised" in reply or "refused" in reply


def same_value(ours: Any, right: Any) -> bool:
    """Equal as data: a tuple is a list (the tests are JSON), floats within 1e-6, and true is not 1."""
    if isinstance(ours, list | tuple) and isinstance(right, list | tuple):
        return len(ours) == len(right) and all(map(same_value, ours, right))
    if isinstance(ours, dict) and isinstance(right, dict):
        ours, right = ({str(key): value for key, value in side.items()} for side in (ours, right))
        return ours.keys() == right.keys() and all(same_value(ours[key], right[key]) for key in right)
    if isinstance(ours, bool) or isinstance(right, bool):
        return ours is right
    if isinstance(ours, int | float) and isinstance(right, int | float):
        if isinstance(ours, int) and isinstance(right, int):
            return ours == right
        try:
            return math.isclose(ours, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        except OverflowError:
            return False
    return type(ours) is type(right) and ours == right


# -- test code ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """Test code, and the functions of the program that it calls. `prelude` is run before it: what helpers it needs."""

    functions: tuple[str, ...]
    test: str
    prelude: str = ""
    call_check: bool = False  # HumanEval: the test defines `check(candidate)`


def run_check(source: str, check: Check, limits: Limits, kind: Kind) -> Outcome:
    """Runs the test code in one sandbox against the program in another. ValueError where the test itself is broken."""
    job = {"functions": check.functions, "test": check.test, "prelude": check.prelude, "call_check": check.call_check}
    with contextlib.ExitStack() as stack:
        ends = Pipes()
        stack.callback(ends.close)
        (requests, ask), (answers, replies), (verdict, tell) = ends.pipe(), ends.pipe(), ends.pipe()
        # Handed over open, not as a file: under `rlimits` the program could read it.
        job = memory_file(json.dumps(job).encode())
        stack.callback(os.close, job)
        own = {"job": job, "requests": ask, "replies": answers, "verdict": tell}
        tester = start("check", {}, limits, kind, pipes=own)
        stack.callback(tester.close)
        pipes = {"requests": requests, "replies": replies}
        candidate = start("serve", {"solution.py": _bytes(source)}, limits, kind, pipes=pipes)
        stack.callback(candidate.close)
        ends.close(requests, ask, answers, replies, tell)
        watch = Watch([tester, candidate], limits)
        watch.wait_ready()
        try:
            said, _ = pump(watch, verdict, limits.output)
        except Exceeded as error:
            return Outcome(False, str(error), exceeded=True)
        if not said:
            return Outcome(False, "the test was ended by what it was given")
        found = plain.load(said)
        if "error" in found:
            raise ValueError(found["error"])
        return Outcome(found["passed"] is True, str(found.get("why", "")))


def _bytes(source: str) -> bytes:
    return source.encode("utf-8", "surrogatepass")  # what is no text fails inside, as a syntax error


__all__ = ["Calls", "Check", "Limits", "Outcome", "SandboxError", "execute", "run_calls", "run_check", "run_stdio"]
