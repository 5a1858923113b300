"""Grade-school word problems (Cobbe et al. 2021): rows of `question` and `answer`, worked and ending `#### N`."""

from __future__ import annotations

import re
from typing import Any

from r1fast.config import UserError
from r1fast.tasks.base import register
from r1fast.tasks.rows import Row, RowTask, text_of

_CALCULATOR = re.compile(r"<<[^<>]*>>")  # `48/2 = <<48/2=24>>24`: marks for a calculator that nothing here calls


@register("gsm8k")
class GSM8K(RowTask):
    verifier = "gsm8k"
    default_config = "main"  # of openai/gsm8k

    def read(self, fields: dict[str, Any], where: str) -> Row:
        question = text_of(fields, "question", where)
        worked, mark, number = text_of(fields, "answer", where).rpartition("####")
        if not mark or not re.search("[0-9]", number):
            raise UserError(
                f"{where}: the answer does not end with '#### N'; for other rows use a task of kind 'jsonl'"
            )
        return Row(question, number.strip(), _CALCULATOR.sub("", worked).strip() or None, {"language": "en"})

    def document(self, row: Row) -> str:
        return f"{row.worked}\n#### {row.answer}"
