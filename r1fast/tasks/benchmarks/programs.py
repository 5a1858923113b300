"""Rows of the benchmarks that are programs: HumanEval, LiveCodeBench and Codeforces, as references for `code`."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from r1fast.config import UserError
from r1fast.tasks.benchmarks.rows import Item, Row, maybe
from r1fast.tasks.rows import text_of


def humaneval(row: Row, where: str, options: Any) -> Item:
    """The prompt keeps its spaces: a completion may go on from it."""
    entry, test = text_of(row, "entry_point", where), text_of(row, "test", where)
    text_of(row, "prompt", where)
    reference = {"prompt": row["prompt"], "entry_point": entry, "test": test}
    worked = row.get("canonical_solution") or None
    return Item(row["prompt"], reference, worked=worked, id=maybe(row, "task_id") or None)


def livecodebench(row: Row, where: str, options: Any) -> Item | None:
    """Tests of standard input, or calls of the starter code's method. `since` and `until` bound the contest's date, as
    the paper bounds it to August 2024 to January 2025."""
    date = maybe(row, "contest_date")[:10]
    if (options.since and date < options.since) or (options.until and date > options.until):
        return None
    tests = [*_public(row, where), *_private(row, where)]
    if not tests:
        raise UserError(f"{where}: the row has no tests")
    starter, reference = maybe(row, "starter_code"), {"tests": tests, "seconds": 6}
    if any(test.get("testtype") == "functional" for test in tests):
        function = _metadata(row, where).get("func_name")
        if not function:
            raise UserError(f"{where}: tests of calls, but `metadata` names no func_name")
        reference |= {"function": function, "tests": [_call(test, where) for test in tests]}
    else:
        reference["tests"] = [{"input": test["input"], "output": test["output"]} for test in tests]
    how = f"Begin with this code:\n\n```python\n{starter}\n```" if starter else _STDIO
    return Item(
        text_of(row, "question_content", where), reference, maybe(row, "difficulty"),
        {"title": maybe(row, "question_title"), "how": how}, id=maybe(row, "question_id") or None,
    )  # fmt: skip


_STDIO = "The program reads standard input and writes standard output."


def _public(row: Row, where: str) -> list[dict[str, Any]]:
    value = row.get("public_test_cases") or []
    return _tests(value, where) if isinstance(value, str) else list(value)


def _private(row: Row, where: str) -> list[dict[str, Any]]:
    """JSON; or, in the lite releases, JSON pickled, compressed and in base 64. Only text is ever unpickled."""
    value = row.get("private_test_cases") or []
    if not isinstance(value, str):
        return list(value)
    if value.lstrip()[:1] == "[":
        return _tests(value, where)
    try:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    except Exception as error:  # of base64, zlib and pickle, and what is not text
        raise UserError(f"{where}: `private_test_cases` cannot be read: {error}") from None
    return _tests(text, where)


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object ({module}.{name}) and not text")


def _tests(text: str | bytes, where: str) -> list[dict[str, Any]]:
    try:
        tests = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: the tests are not JSON: {error}") from None
    shaped = isinstance(tests, list) and all(isinstance(t, Mapping) and {"input", "output"} <= t.keys() for t in tests)
    if not shaped:
        raise UserError(f"{where}: the tests are no list of objects with `input` and `output`")
    return tests


def _metadata(row: Row, where: str) -> Mapping[str, Any]:
    value = row.get("metadata") or {}
    return json.loads(value) if isinstance(value, str) else value


def _call(test: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call's arguments are a JSON value a line."""
    try:
        arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
        return {"input": arguments, "output": json.loads(test["output"])}
    except ValueError as error:
        raise UserError(f"{where}: a call's arguments or result are not JSON: {error}") from None


def codeforces(row: Row, where: str, options: Any) -> Item | None:
    """open-r1/codeforces; where several outputs are right the data set's own checker judges. Left out: interactive
    problems, those that read files, and those without tests or rating."""
    if maybe(row, "interaction_format") or maybe(row, "input_mode") == "file":
        return None
    tests = [{"input": t["input"], "output": t["output"]} for t in row.get("official_tests") or ()]
    if not tests or row.get("rating") is None:
        return None
    reference = {
        "tests": tests,
        "seconds": float(row.get("time_limit") or 2.0),
        "memory_mb": int(float(row.get("memory_limit") or 256.0)),
    }
    if checker := maybe(row, "generated_checker"):
        reference["checker"] = checker
    sections = [text_of(row, "description", where)]
    for heading, key in (("Input", "input_format"), ("Output", "output_format")):
        sections.append(f"{heading}\n{maybe(row, key)}")
    for example in row.get("examples") or ():
        sections.append(f"Example input\n{example['input'].strip()}\n\nExample output\n{example['output'].strip()}")
    if maybe(row, "note"):
        sections.append(f"Note\n{maybe(row, 'note')}")
    rating = int(row["rating"])
    return Item(
        "\n\n".join(sections), reference, f"{rating // 400 * 400}-{rating // 400 * 400 + 399}",
        {
            "title": maybe(row, "title"), "seconds": f"{reference['seconds']:g}",
            "megabytes": f"{reference['memory_mb']}",
        },
        meta={"rating": rating, "contest": maybe(row, "contest_id")},
        id=maybe(row, "id") or f"{maybe(row, 'contest_id')}/{maybe(row, 'index')}",
    )  # fmt: skip
