"""Any question-and-answer rows: which fields hold what, and which verifier says that an answer is right."""

from __future__ import annotations

from typing import Any

from r1fast import rewards
from r1fast.schema import TaskConfig
from r1fast.tasks.base import register
from r1fast.tasks.rows import Row, RowOptions, RowTask, text_of


class Options(RowOptions):
    question: str = "question"  # field names
    answer: str = "answer"
    solution: str | None = None  # a field with worked solutions, for stages that learn from them
    verifier: str = "exact"  # a reward's name
    language: str = "en"  # of the questions; what the language reward asks of the reasoning


@register("jsonl")
class Jsonl(RowTask):
    Options = Options

    def __init__(self, name: str, config: TaskConfig, default_path: str | None = None) -> None:
        super().__init__(name, config, default_path)
        self.verifier = rewards.get(self.options.verifier).name

    def read(self, fields: dict[str, Any], where: str) -> Row:
        options = self.options
        worked = text_of(fields, options.solution, where) if options.solution else None
        question, answer = text_of(fields, options.question, where), text_of(fields, options.answer, where)
        return Row(question, answer, worked, {"language": options.language})
