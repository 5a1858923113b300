"""The small world of the tiny tasks: its words in two languages, and the ways in which a completion is laid out.

`totals` and `general` speak with these words only, so that one word-level tokenizer of some 260 words serves both.
Every number and every day label is one word: digit-level sums did not learn in the minutes that `tiny` has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SYMBOLS = ("+", "-", "=", ":")


@dataclass(frozen=True, slots=True)
class Thing:
    """Something to have and to eat, with the facts that general questions ask for."""

    name: str
    color: str
    taste: str
    place: str  # where it comes from


@dataclass(frozen=True, slots=True)
class Lexicon:
    """One language's words. The two lexicons run parallel: the same index means the same thing."""

    names: tuple[str, ...]
    things: tuple[Thing, ...]
    days: tuple[str, ...]
    gains: tuple[str, ...]  # verbs that add
    losses: tuple[str, ...]  # verbs that take away
    stop: str
    question: str
    has: str  # "Tom has 18 eggs .": name, has, number, thing
    unit: str  # measure word between number and thing; empty where the language has none
    asks: tuple[str, ...]  # how a story ends, before the question mark
    compute: str
    sums: str
    recall: str
    guess: str
    good: str
    wait: str
    answer: str


EN = Lexicon(
    names=("Tom", "Mia", "Ben", "Amy", "Leo", "Zoe", "Sam", "Eva"),
    things=(
        Thing("eggs", "white", "rich", "farm"),
        Thing("apples", "red", "sweet", "tree"),
        Thing("pears", "green", "sweet", "tree"),
        Thing("lemons", "yellow", "sour", "tree"),
        Thing("nuts", "brown", "rich", "forest"),
        Thing("plums", "purple", "sour", "garden"),
    ),
    days=("mon", "tue", "wed", "thu", "fri", "sat", "sun"),
    gains=("buys", "finds", "gets", "wins"),
    losses=("eats", "sells", "gives", "loses"),
    stop=".",
    question="?",
    has="has",
    unit="",
    asks=("how many", "how many left"),
    compute="compute",
    sums="sums",
    recall="recall",
    guess="guess",
    good="good",
    wait="wait",
    answer="answer",
)

ZH = Lexicon(
    names=("小明", "小红", "小刚", "小美", "小华", "小丽", "小强", "小芳"),
    things=(
        Thing("鸡蛋", "白色", "香", "农场"),
        Thing("苹果", "红色", "甜", "树上"),
        Thing("梨", "绿色", "甜", "树上"),
        Thing("柠檬", "黄色", "酸", "树上"),
        Thing("坚果", "棕色", "香", "森林"),
        Thing("李子", "紫色", "酸", "花园"),
    ),
    days=("周一", "周二", "周三", "周四", "周五", "周六", "周日"),
    gains=("买来", "找到", "得到", "赢得"),
    losses=("吃掉", "卖掉", "送出", "丢失"),
    stop="。",
    question="？",
    has="有",
    unit="个",
    asks=("还有 多少", "一共 多少"),
    compute="计算",
    sums="加减",
    recall="回忆",
    guess="猜",
    good="对",
    wait="等等",
    answer="答案",
)

LEXICONS: dict[Language, Lexicon] = {"en": EN, "zh": ZH}


def vocabulary(total_max: int, chat: Iterable[str]) -> list[str]:
    """Every word of the tiny tasks without duplicates, in a fixed order: tags, symbols, numbers, then words.

    `chat`: what general chat says besides (its own templates are the source).
    """
    words = [*TAGS, *SYMBOLS, *map(str, range(total_max + 1))]
    for lexicon in LEXICONS.values():
        for value in (getattr(lexicon, name) for name in Lexicon.__slots__):
            for item in value if isinstance(value, tuple) else (value,):
                parts = (item.name, item.color, item.taste, item.place) if isinstance(item, Thing) else (item,)
                words += [word for part in parts for word in part.split()]
    return list(dict.fromkeys([*words, *chat]))


def tagged(think: str, answer: str) -> str:
    """The layout that the format reward wants."""
    return f"<think> {think} </think> <answer> {answer} </answer>"


def lay_out(draw: float, think: str, answer: str, label: str) -> str:
    """One of the layouts that a base model has seen, chosen by `draw` in [0, 1).

    Tagged 25%; plain `answer : N` 45%; the thinking untagged, the answer untagged, or a tag left open, 10% each.
    """
    if draw < 0.25:
        return tagged(think, answer)
    if draw < 0.70:
        return f"{think} {label} : {answer}"
    if draw < 0.80:
        return f"{think} <answer> {answer} </answer>"
    if draw < 0.90:
        return f"<think> {think} </think> {label} : {answer}"
    if draw < 0.95:
        return f"<think> {think} <answer> {answer} </answer>"
    return f"<think> {think} </think> <answer> {answer}"
