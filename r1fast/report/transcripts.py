"""What the model wrote, the same problems before and after: the part of the page that a reader believes first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from r1fast.report.markup import Html, tag
from r1fast.report.run import Run, StageRecord
from r1fast.report.scale import short

PROBLEMS = 5
GENERAL = 3
LONG = 420  # characters; above it the columns are wide and the text scrolls
HEAD, TAIL = 7000, 3000  # characters shown of a completion that is longer: 40 of R1's length would be megabytes
_TAG = re.compile(r"(</?think>|</?answer>)")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)


def columns(run: Run) -> list[StageRecord]:
    """The start, every RL stage of the main line, the last stage of it, and what was distilled."""
    line = run.main_line()
    sampled = {row["stage"] for row in run.samples}
    chosen = [s for s in line if s is line[0] or s is line[-1] or s.kind == "grpo"]
    return [s for s in [*chosen, *run.of_kind("distill")] if s.name in sampled]


def by_problem(run: Run, stages: list[StageRecord]) -> Iterator[tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]]:
    """(the problem's row, stage -> its first completion), for problems that every stage was asked, in file order."""
    first: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in run.samples:
        first.setdefault(row["prompt"], {}).setdefault(row["stage"], row)
    for rows in first.values():
        if all(stage.name in rows for stage in stages):
            yield rows[stages[0].name], rows


def section(run: Run) -> Html:
    """The side-by-side table of completions, or the sentence that says why there is none."""
    stages = columns(run)
    problems = list(by_problem(run, stages)) if stages else []
    if not problems:
        return tag("p", "No stage has been evaluated yet, so there is nothing to read here.", class_="empty")
    graded = [pair for pair in problems if pair[0].get("answer") is not None][:PROBLEMS]
    general = [pair for pair in problems if pair[0].get("answer") is None][:GENERAL]
    how = (
        "Not chosen: the first problems of the test split, in its order, and the first completion that each stage "
        "sampled for them in its evaluation."
    )
    if general:
        how += " Below them, likewise, the first prompts that have no right answer."
    return tag("div", tag("p", how, class_="how"), [_problem(*pair, stages) for pair in graded + general])


def _problem(problem: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], stages: list[StageRecord]) -> Html:
    longest = max(len(rows[stage.name]["completion"]) for stage in stages)
    answer = problem.get("answer")
    head = tag(
        "header",
        tag("p", problem["prompt"], class_="prompt"),
        tag("p", "right answer ", tag("b", answer), class_="reference") if answer is not None else None,
    )
    cards = [_card(stage, rows[stage.name]) for stage in stages]
    return tag("article", head, tag("div", cards, class_="cards long" if longest > LONG else "cards"), class_="problem")


def _card(stage: StageRecord, row: Mapping[str, Any]) -> Html:
    rewards, cut = row.get("rewards") or {}, row.get("finish") == "length"
    by_kind = [tag("span", kind, " ", tag("b", short(value))) for kind, value in rewards.items()]
    return tag(
        "section",
        tag("header", tag("b", stage.name, class_="stage"), verdict(row)),
        tag(
            "p",
            colored(shorten(row["completion"])),
            tag("span", " …cut off", class_="cut") if cut else None,
            class_="said",
        ),
        tag("footer", tag("span", "reward ", tag("b", short(row["reward"]))) if "reward" in row else None, by_kind),
        class_="card",
        style=stage.paint,
    )


def verdict(row: Mapping[str, Any]) -> Html | None:
    """Right or wrong by the accuracy reward; nothing where no answer is right or wrong."""
    accuracy = (row.get("rewards") or {}).get("accuracy")
    if accuracy is None or row.get("answer") is None:
        return None
    if accuracy >= 1:
        return tag("span", "✓ correct", class_="verdict yes")
    return tag("span", "✗ incorrect", class_="verdict no")


def shorten(completion: str) -> str:
    """The completion, or its beginning and its end with the number of characters left out between them."""
    left_out = len(completion) - HEAD - TAIL
    if left_out <= 0:
        return completion
    return f"{completion[:HEAD]}\n[… {left_out:,} characters left out …]\n{completion[-TAIL:]}"


def colored(completion: str) -> Html:
    """The completion with its tags marked, and what is inside think and answer tags in a tint of its own."""
    parts, inside = [], ""
    for piece in _TAG.split(completion):
        if _TAG.fullmatch(piece):
            name = piece.strip("</>")
            parts.append(tag("span", piece, class_=f"tag {name}"))
            inside = "" if piece.startswith("</") else name
        elif piece:
            before, said, after = _EDGES.fullmatch(
                piece
            ).groups()  # the tint is for words, not for the space at their ends
            parts += [before, tag("span", said, class_=inside or None) if said else None, after]
    return tag("span", parts)
