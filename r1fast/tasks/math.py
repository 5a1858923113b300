"""Competition mathematics in the layout of MATH: rows of `problem` and `answer` (LaTeX), and perhaps a `solution`."""

from __future__ import annotations

from typing import Any

from r1fast.tasks.base import register
from r1fast.tasks.rows import Row, RowTask, text_of


@register("math")
class Math(RowTask):
    verifier = "math"

    def read(self, fields: dict[str, Any], where: str) -> Row:
        meta = {"language": "en", **{key: fields[key] for key in ("subject", "level") if key in fields}}
        worked = text_of(fields, "solution", where) if "solution" in fields else None
        return Row(text_of(fields, "problem", where), text_of(fields, "answer", where), worked, meta)
