"""Where a completion holds its reasoning and its answer: the one reading of the tags that every reward shares.

Completions are hostile in length as much as in shape, so nothing here is worse than linear: `find` and `rfind`,
no pattern that can backtrack over a megabyte.
"""

from __future__ import annotations

import re

THINK, THINK_END, ANSWER, ANSWER_END = TAGS = ("<think>", "</think>", "<answer>", "</answer>")

LONGEST_ANSWER = 500  # characters; a longer answer is not read (the longest of MATH-500 has 53)
_BOXES = 8  # boxes from the end that are looked at; 140,000 open ones fit in a megabyte

_BRACE = re.compile(r"(?<!\\)[{}]")
# The colon may be full-width; spaces around it are few, so that the pattern cannot run over a long blank stretch.
_LABEL = re.compile(r"(?:answer|答案)[ \t]{0,8}[:：]", re.IGNORECASE)


def thinking(completion: str) -> str:
    """The chain of thought: between the first `<think>` and the last `</think>`.

    A tag that is missing is read as leniently as it can be (the format reward is the strict one): without the
    closing tag, up to `<answer>` or the end; without the opening one, from the start; without both, everything.
    """
    start = completion.find(THINK)
    end = completion.rfind(THINK_END)
    if start < 0:
        return completion[:end] if end >= 0 else completion
    start += len(THINK)
    if end < start:
        end = completion.find(ANSWER, start)
    return completion[start:end] if end >= 0 else completion[start:]


def tagged_answer(completion: str) -> str | None:
    """The inside of the last closed `<answer>`, stripped; None where there is none. The last one is what counts."""
    end = completion.rfind(ANSWER_END)
    if end < 0:
        return None
    start = completion.rfind(ANSWER, 0, end)
    return completion[start + len(ANSWER) : end].strip() if start >= 0 else None


def final_answer(completion: str) -> str:
    """What a reader is shown: the tagged answer, or what follows the reasoning, or everything, stripped."""
    tagged = tagged_answer(completion)
    if tagged is not None:
        return tagged
    return completion.rpartition(THINK_END)[2].strip() or completion.strip()


def labelled_answer(completion: str) -> str | None:
    """What follows the last `answer :` (or `答案 :`), to the end of its line or the next tag; None without one."""
    ends = [label.end() for label in _LABEL.finditer(completion)]
    return re.split(r"[\n<]", completion[ends[-1] :], maxsplit=1)[0].strip() if ends else None


def well_formed(completion: str) -> bool:
    """`<think>...</think>`, white space, `<answer>...</answer>`, nothing around it, each tag exactly once."""
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    between = text[text.find(THINK_END) + len(THINK_END) : text.find(ANSWER)]
    in_order = text.startswith(THINK) and text.endswith(ANSWER_END) and text.find(THINK_END) < text.find(ANSWER)
    return in_order and not between.strip()


def boxed(text: str) -> str | None:
    """The inside of the last closed `\\boxed{...}`, braces matched; None where none of the last few is closed."""
    end = len(text)
    for _ in range(_BOXES):
        if (start := text.rfind(r"\boxed{", 0, end)) < 0:
            break
        opened = start + len(r"\boxed{")
        depth = 1
        for brace in _BRACE.finditer(text, opened, min(len(text), opened + LONGEST_ANSWER)):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return text[opened : brace.start()].strip()
        end = start
    return None
