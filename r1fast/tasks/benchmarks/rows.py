"""How each data set's own row becomes an item: what is asked, what is right, under which heading.

A reader is handed a row as published, where it stands, and the task's options; it returns an `Item`, or None for a row
that the benchmark leaves out (a question whose annotators found it broken). Field names are the data sets' own.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1fast.config import UserError
from r1fast.tasks.rows import text_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One question, before it is put in words for a model."""

    question: str  # as published: what decontamination looks for
    answer: Any  # the verifier's reference
    category: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)  # what the prompt names besides `question`
    worked: str | None = None  # a written solution
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None  # where rows are numbered otherwise


def maybe(row: Row, *keys: str) -> str:
    """The first of the fields that is there and not empty, as text; else nothing."""
    return next((str(row[key]).strip() for key in keys if row.get(key) not in (None, "")), "")


def first_text(row: Row, where: str, *keys: str) -> str:
    """The first of the fields that is there; the last one's absence is the error."""
    return text_of(row, next((key for key in keys if key in row), keys[-1]), where)


def texts_of(row: Row, key: str, where: str) -> list[str]:
    value = row.get(key)
    if isinstance(value, str):  # a CSV cell holds the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: field {key!r} is neither a list nor JSON") from None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str | int | float) for v in value):
        raise UserError(f"{where}: field {key!r} must be a list of texts")
    return [str(v).strip() for v in value]


# -- mathematics ----------------------------------------------------------------------------------------------------


def math(row: Row, where: str, options: Any) -> Item:
    """MATH-500, AIME (also with capitals), CNMO: a problem and its answer, perhaps with a solution and a subject."""
    question = first_text(row, where, "Problem", "question", "problem")
    answer = first_text(row, where, "Answer", "answer")
    return Item(question, answer, maybe(row, "subject"), worked=maybe(row, "solution", "Solution") or None)


def gsm8k(row: Row, where: str, options: Any) -> Item:
    answer = text_of(row, "answer", where)
    worked, mark, number = answer.rpartition("####")
    if not mark:
        raise UserError(f"{where}: the answer does not end with '#### N'")
    return Item(text_of(row, "question", where), number.strip(), worked=worked.strip())


# -- multiple choice ------------------------------------------------------------------------------------------------


def choice(question: str, choices: Sequence[str], right: int, category: str, where: str, **more: Any) -> Item:
    if not 0 <= right < len(choices) <= len(LETTERS):
        raise UserError(f"{where}: the right option is number {right}, but there are {len(choices)} options")
    lines = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    parts = {"options": lines, "letters": ", ".join(LETTERS[: len(choices)])}
    return Item(question, {"answer": LETTERS[right], "options": list(choices)}, category, parts, **more)


def letter(row: Row, key: str, where: str) -> int:
    """The index that a field's letter, or number from 0, means."""
    value = text_of(row, key, where)
    if value.isdecimal():
        return int(value)
    index = LETTERS.find(value.upper())
    if len(value) != 1 or index < 0:
        raise UserError(f"{where}: field {key!r} must be the letter or the index of an option, not {value!r}")
    return index


def gpqa(row: Row, where: str, options: Any) -> Item:
    """The right option comes first in the data; the order is drawn from the seed and the question."""
    question = text_of(row, "Question", where)
    given = [text_of(row, key, where) for key in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    order = list(range(4))
    random.Random(f"{options.seed} {zlib.crc32(question.encode())}").shuffle(order)
    category, worked = maybe(row, "High-level domain"), maybe(row, "Explanation")
    return choice(question, [given[i] for i in order], order.index(0), category, where, worked=worked)


def mmlu(row: Row, where: str, options: Any) -> Item:
    """cais/mmlu: a list of choices and an index. The authors' CSV files: columns A to D and a letter."""
    choices = texts_of(row, "choices", where) if "choices" in row else [text_of(row, key, where) for key in "ABCD"]
    return choice(text_of(row, "question", where), choices, letter(row, "answer", where), maybe(row, "subject"), where)


def mmlu_redux(row: Row, where: str, options: Any) -> Item | None:
    """MMLU as annotated anew: questions with nothing wrong with them, and those whose key alone was wrong, corrected.
    Others (unclear, several right options, none right) have no answer. Also ZeroEval's form, which is filtered so."""
    kind = maybe(row, "error_type") or "ok"
    if kind not in ("ok", "wrong_groundtruth"):
        return None
    choices = texts_of(row, "choices", where)
    if kind == "ok" and "answer" in row:
        right = letter(row, "answer", where)
    else:
        said = maybe(row, "correct_answer").removesuffix(".0")
        if not said:
            return None
        right = choices.index(said) if said in choices else letter({"correct_answer": said}, "correct_answer", where)
    return choice(text_of(row, "question", where), choices, right, maybe(row, "subject", "config"), where)


def mmlu_pro(row: Row, where: str, options: Any) -> Item:
    choices = [text for text in texts_of(row, "options", where) if text != "N/A"]
    right = letter(row, "answer_index" if "answer_index" in row else "answer", where)
    return choice(text_of(row, "question", where), choices, right, maybe(row, "category"), where)


def lettered(row: Row, where: str, options: Any) -> Item:
    """C-Eval (small names) and CMMLU (capital ones)."""
    question = first_text(row, where, "Question", "question")
    right = letter(row, "Answer" if "Answer" in row else "answer", where)
    choices = [text_of(row, key, where) for key in "ABCD"]
    return choice(question, choices, right, maybe(row, "subject"), where, worked=maybe(row, "explanation"))


# -- reading, instructions, facts ----------------------------------------------------------------------------------


def drop(row: Row, where: str, options: Any) -> Item:
    """The authors' form, with `answer` and `validated_answers`; or `answers_spans`, each span right by itself."""
    if "answers_spans" in row:
        accepted = [[text] for text in row["answers_spans"]["spans"]]
    else:
        validated = row.get("validated_answers") or []
        if isinstance(validated, Mapping):  # columns instead of rows, as Parquet keeps them
            validated = [dict(zip(validated, values, strict=True)) for values in zip(*validated.values(), strict=True)]
        accepted = [_drop_answer(answer) for answer in (row.get("answer") or {}, *validated)]
    accepted = [answer for answer in accepted if answer and any(text.strip() for text in answer)]
    if not accepted:
        raise UserError(f"{where}: the row has no answer (`answer`, `validated_answers` or `answers_spans`)")
    kind = "number" if accepted[0][0].replace(".", "", 1).isdecimal() else "spans" if len(accepted[0]) > 1 else "span"
    return Item(
        text_of(row, "question", where), {"answers": accepted}, kind, {"passage": text_of(row, "passage", where)},
        id=maybe(row, "query_id") or None,
    )  # fmt: skip


def _drop_answer(answer: Row) -> list[str]:
    if str(answer.get("number") or "").strip():
        return [str(answer["number"])]
    if answer.get("spans"):
        return list(answer["spans"])
    date = answer.get("date") or {}
    return [" ".join(str(date.get(part) or "") for part in ("day", "month", "year")).strip()]


def ifeval(row: Row, where: str, options: Any) -> Item:
    """Instructions by id, each with its arguments; the hub's form fills those of the other kinds with null."""
    ids = row.get("instruction_id_list")
    given = row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(given, list) or not ids or len(ids) != len(given):
        raise UserError(f"{where}: `instruction_id_list` and `kwargs` must be lists of one length")
    prompt = text_of(row, "prompt", where)
    kwargs = [{key: value for key, value in (one or {}).items() if value is not None} for one in given]
    reference = {"prompt": prompt, "instruction_id_list": list(ids), "kwargs": kwargs}
    category = ids[0].partition(":")[0] if len(ids) == 1 else "several"
    return Item(prompt, reference, category, meta={"instructions": len(ids)}, id=maybe(row, "key") or None)


def frames(row: Row, where: str, options: Any) -> Item:
    question, answer = text_of(row, "Prompt", where), text_of(row, "Answer", where)
    return Item(question, {"question": question, "answer": answer}, maybe(row, "reasoning_types"))


def simpleqa(row: Row, where: str, options: Any) -> Item:
    """SimpleQA calls the question `problem` and has its topic in a cell of Python; Chinese SimpleQA has `question`."""
    question, answer = first_text(row, where, "problem", "question"), text_of(row, "answer", where)
    topic = maybe(row, "primary_category") or maybe(row, "metadata").partition("'topic': '")[2].partition("'")[0]
    return Item(question, {"question": question, "answer": answer}, topic, id=maybe(row, "id") or None)


# -- conversation ---------------------------------------------------------------------------------------------------


def alpaca_eval(row: Row, where: str, options: Any) -> Item:
    """`output` is the baseline's (GPT-4 Turbo's in AlpacaEval 2.0)."""
    question, other = text_of(row, "instruction", where), text_of(row, "output", where)
    reference = {"question": question, "other": other}
    return Item(question, reference, maybe(row, "dataset"), meta={"baseline": len(other)})


def arena_hard(row: Row, where: str, options: Any) -> Item:
    """A question of one turn, joined with the baseline's answer of the same id (the task reads that file)."""
    turns = row.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        question = text_of(turns[0], "content", where)
    else:
        question = text_of(row, "prompt", where)  # v2.0
    other, name = text_of(row, "baseline", where), first_text(row, where, "uid", "question_id")
    return Item(question, {"question": question, "other": other}, maybe(row, "category", "cluster"), id=name)


def arena_answer(row: Row, where: str) -> tuple[str, str]:
    """(question's id, text) of a row of Arena-Hard's model_answer files, both versions."""
    name = first_text(row, where, "uid", "question_id")
    if "messages" in row:
        said = row["messages"][-1]["content"]
        return name, said["answer"] if isinstance(said, Mapping) else said
    return name, row["choices"][0]["turns"][0]["content"]
