"""Programming problems for training: rows with a question and its tests, in the forms that the reward `code` reads."""

from __future__ import annotations

import json
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from r1fast.config import UserError
from r1fast.rewards.code import read_tests
from r1fast.tasks.base import register
from r1fast.tasks.lexicon import tagged
from r1fast.tasks.rows import Row, RowOptions, RowTask, text_of
from r1fast.types import Example

# What a row's tests may be called: the reward's own form, MBPP, HumanEval; APPS and TACO keep theirs in one JSON text.
_TESTS = ("tests", "function", "inputs", "outputs", "fn_name", "test_list", "test_setup_code", "entry_point", "test")
_STDIO = "Write a Python program that reads standard input and writes standard output.\n\n"


class Options(RowOptions):
    question: str = "question"  # field names
    tests: str = "input_output"  # a field with inputs and outputs as JSON, where a row has it
    solution: str | None = None  # a field with a right program, for stages that learn from it
    seconds: PositiveFloat | None = None  # of each test; default: the row's own, or 5
    memory_mb: PositiveInt | None = None
    partial: bool = False  # the share of passed tests is the reward, instead of all or nothing


@register("code")
class CodeTask(RowTask):
    """`question`, and beside it `tests` (with `function`), `input_output`, `test_list`, or HumanEval's `test`."""

    Options = Options
    verifier = "code"

    def read(self, fields: dict[str, Any], where: str) -> Row:
        options = self.options
        reference = {key: fields[key] for key in (*_TESTS, "seconds", "memory_mb") if fields.get(key) is not None}
        if fields.get(options.tests) is not None:
            reference |= _json(fields[options.tests], f"{where}: field {options.tests!r}")
        if "entry_point" in reference:
            reference["prompt"] = fields.get("prompt", "")
        reference |= {k: v for k in ("seconds", "memory_mb") if (v := getattr(options, k)) is not None}
        reference["partial"] = options.partial
        try:
            tests = read_tests(reference)
        except (ValueError, TypeError, SyntaxError) as error:
            raise UserError(f"{where}: {error}") from None
        question = text_of(fields, options.question, where)
        worked = text_of(fields, options.solution, where) if options.solution else None
        return Row(_STDIO + question if tests.pairs else question, reference, worked, {"language": "en"})

    def examples(self, count: int | None = None, seed: int = 0) -> list[Example]:
        """The train rows' programs, tagged, in a fence."""
        rows = [row for _, row in self._worked(seed)[:count]]
        answer = "```python\n{}\n```"
        return [Example(r.question, tagged("", answer.format(r.worked)), self.name, r.meta) for r in rows]

    def document(self, row: Row) -> str:
        return f"```python\n{row.worked}\n```"


def _json(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with inputs and outputs")
    return {key: value[key] for key in ("inputs", "outputs", "fn_name") if value.get(key) is not None}
