"""Bilingual running totals: the reasoning task that a model of 100,000 weights learns within minutes on a CPU.

    Tom has 18 eggs . mon eats 3 tue buys 8 how many ?
    <think> 18 mon - 3 = 15 good 15 tue + 8 = 22 wait 23 good </think> <answer> 23 </answer>

A problem is its numbers, (start, operations); the split is a hash of these alone, so that no wording of a test
problem is ever trained on. The base model's corpus holds good and bad habits on purpose (guesses, skipped steps,
slips, missing tags, mixed languages): reinforcement learning has then something to choose from.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import Field, model_validator

from r1fast.config import UserError
from r1fast.schema import Strict, TaskConfig
from r1fast.tasks import general, lexicon
from r1fast.tasks.base import Split, Task, register
from r1fast.tasks.lexicon import LANGUAGES, LEXICONS, Language, Lexicon
from r1fast.types import Example, Problem

STORIES = 0.7  # share of problems told as a story; the others are `compute 13 mon + 1 tue - 2 ?`
GENERAL = 0.125  # share of the corpus that is general and safety chat
# Written solutions: 60% terse, 40% checking, which leaves reinforcement learning something to gain.
TERSE_EXAMPLES = 0.6

# Shares of the corpus (cumulative) and what goes wrong in each style; a rate is of one written result.
STYLES = (("direct", 0.58), ("terse", 0.68), ("steps", 0.84), ("checking", 1.0))
WRONG_GUESS, TERSE_ERROR, STEP_ERROR, SLIP, REPAIRED = 0.70, 0.25, 0.08, 0.15, 0.97
OWN_LANGUAGE, MIXED_LANGUAGE = 0.70, 0.25  # of the reasoning; the rest is wholly in the other language


class Options(Strict):
    """The sizes of the problems; the defaults are the preset `tiny`'s."""

    total_max: int = Field(40, ge=1, le=999)  # no total ever leaves 0..total_max
    operations: tuple[int, int] = (2, 5)  # least and most steps of a problem
    start: tuple[int, int] = (5, 25)  # range of the first total
    operand: tuple[int, int] = (1, 9)  # range of what a step adds or takes away

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        days = len(lexicon.EN.days)
        if not 1 <= self.operations[0] <= self.operations[1] <= days:
            raise ValueError(f"operations must be [least, most] within 1..{days}, got {list(self.operations)}")
        if not 0 <= self.start[0] <= self.start[1] <= self.total_max:
            raise ValueError(f"start must be [low, high] within 0..total_max={self.total_max}, got {list(self.start)}")
        if not 1 <= self.operand[0] <= self.operand[1] <= (self.total_max + 1) // 2:
            raise ValueError(
                f"operand must be [low, high] within 1..{(self.total_max + 1) // 2} (half of total_max, so that a step "
                f"up or a step down always fits), got {list(self.operand)}"
            )
        return self


class Sums(NamedTuple):
    """A problem without words: `start`, and the signed step of each day."""

    start: int
    steps: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.start + sum(self.steps)

    @property
    def key(self) -> str:
        return f"{self.start}" + "".join(f"{step:+d}" for step in self.steps)


def split_of(sums: Sums) -> Split:
    """85% train, 5% validation, 10% test, by a hash of the numbers."""
    # The checksum is linear in its input; the odd multiplier mixes its bits before the top ones are looked at.
    bucket = ((zlib.crc32(sums.key.encode()) * 0x9E3779B1) & 0xFFFFFFFF) * 20 >> 32
    return "train" if bucket > 2 else "validation" if bucket == 0 else "test"


# -- wording --------------------------------------------------------------------------------------------------


def _term(lex: Lexicon, day: int, step: int) -> str:
    return f"{lex.days[day]} + {step}" if step > 0 else f"{lex.days[day]} - {-step}"


def _told(rnd: Callable[[], float], lex: Lexicon, sums: Sums) -> str:
    """The days of a story: `mon eats 3 tue buys 8`."""
    gains, losses = lex.gains, lex.losses
    return " ".join(
        f"{lex.days[day]} {gains[int(rnd() * len(gains))]} {step}"
        if step > 0
        else f"{lex.days[day]} {losses[int(rnd() * len(losses))]} {-step}"
        for day, step in enumerate(sums.steps)
    )


def question(rnd: Callable[[], float], language: Language, sums: Sums) -> str:
    """What the user says. `rnd` returns uniform draws in [0, 1)."""
    lex = LEXICONS[language]
    if rnd() >= STORIES:
        terms = " ".join(_term(lex, day, step) for day, step in enumerate(sums.steps))
        return f"{lex.compute} {sums.start} {terms} {lex.question}"
    name = lex.names[int(rnd() * len(lex.names))]
    thing = lex.things[int(rnd() * len(lex.things))].name
    held = f"{sums.start} {lex.unit} {thing}" if lex.unit else f"{sums.start} {thing}"
    ask = lex.asks[int(rnd() * len(lex.asks))]
    return f"{name} {lex.has} {held} {lex.stop} {_told(rnd, lex, sums)} {ask} {lex.question}"


class Writer:
    """Writes the reasoning for a problem in one of the four styles; returns (thinking, answer).

    `error` rates may be scaled off (`clean=True`). A wrong result is carried on: later lines are right sums of it.
    `speak()` gives the lexicon of the next line, so that one chain may mix languages.
    """

    def __init__(self, rnd: Callable[[], float], total_max: int) -> None:
        self.rnd = rnd
        self.total_max = total_max

    def off(self, right: int) -> int:
        """A near miss: off by one to three, still a word."""
        miss = 1 + int(self.rnd() * 3)
        wrong = right + (miss if self.rnd() < 0.5 else -miss)
        return wrong if 0 <= wrong <= self.total_max else right + (1 if right == 0 else -1)

    def direct(self, sums: Sums, speak: Callable[[], Lexicon], clean: bool = False) -> tuple[str, int]:
        total = sums.total
        if not clean and self.rnd() < WRONG_GUESS:
            drawn = int(self.rnd() * self.total_max)  # uniform over every other total
            total = drawn + (drawn >= total)
        return f"{speak().guess} {total}", total

    def terse(self, sums: Sums, speak: Callable[[], Lexicon], clean: bool = False) -> tuple[str, int]:
        """Two operations a line: `18 mon - 3 tue + 8 = 23`."""
        total, words = sums.start, []
        for first in range(0, len(sums.steps), 2):
            pair = sums.steps[first : first + 2]
            lex = speak()
            line = " ".join(_term(lex, first + i, step) for i, step in enumerate(pair))
            right = min(max(total + sum(pair), 0), self.total_max)
            result = self.off(right) if not clean and self.rnd() < TERSE_ERROR else right
            words.append(f"{total} {line} = {result}")
            total = result
        return " ".join(words), total

    def steps(self, sums: Sums, speak: Callable[[], Lexicon], clean: bool = False) -> tuple[str, int]:
        """One operation a line: `18 mon - 3 = 15 15 tue + 8 = 23`."""
        total, words = sums.start, []
        for day, step in enumerate(sums.steps):
            right = min(max(total + step, 0), self.total_max)
            result = self.off(right) if not clean and self.rnd() < STEP_ERROR else right
            words.append(f"{total} {_term(speak(), day, step)} = {result}")
            total = result
        return " ".join(words), total

    def checking(self, sums: Sums, speak: Callable[[], Lexicon], clean: bool = False) -> tuple[str, int]:
        """Each result judged: `18 mon - 3 = 15 good 15 tue + 8 = 22 wait 23 good`."""
        total, words = sums.start, []
        for day, step in enumerate(sums.steps):
            lex = speak()
            right = result = min(max(total + step, 0), self.total_max)
            line = f"{total} {_term(lex, day, step)} = "
            if not clean and self.rnd() < SLIP:
                result = self.off(right)
                if self.rnd() < REPAIRED:
                    line, result = f"{line}{result} {lex.wait} ", right
            words.append(f"{line}{result} {lex.good}")
            total = result
        return " ".join(words), total


# -- the task -------------------------------------------------------------------------------------------------


@register("totals")
class Totals(Task):
    Options = Options
    verifier = "exact"

    def __init__(self, name: str, config: TaskConfig, default_path: str | None = None) -> None:
        super().__init__(name, config, default_path)
        if config.path is not None:
            raise UserError(f"tasks.{name}.path: problems of kind 'totals' are made, not read; leave it out")

    def words(self) -> list[str]:
        return general.vocabulary(self.options.total_max)

    def problems(self, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
        """`count` (default 1,024) problems with distinct numbers. Numbers decide the wording: one id, one text."""
        count = 1024 if count is None else count
        rnd = random.Random(f"{self.kind} {split} {seed}").random
        found: dict[Sums, Problem] = {}
        tries, limit = 0, 1000 + 200 * count
        while len(found) < count:
            if (tries := tries + 1) > limit:
                raise UserError(
                    f"task {self.name!r}: its options allow too few problems ({len(found)} found for {split}, {count} "
                    f"wanted); widen `operations`, `start` or `operand`, or ask for fewer"
                )
            sums = self._draw(rnd)
            if sums not in found and split_of(sums) == split:
                found[sums] = self._problem(split, sums)
        return list(found.values())

    def examples(self, count: int | None = None, seed: int = 0) -> list[Example]:
        """`count` (default 1,024) right solutions, tagged and in the question's language throughout."""
        rnd = random.Random(f"{self.kind} examples {seed}").random
        writer = Writer(rnd, self.options.total_max)
        rows = []
        for _ in range(1024 if count is None else count):
            sums, language = self._draw_train(rnd), LANGUAGES[rnd() < 0.5]
            lex, style = LEXICONS[language], "terse" if rnd() < TERSE_EXAMPLES else "checking"
            text = question(rnd, language, sums)
            think, total = getattr(writer, style)(sums, lambda lex=lex: lex, clean=True)
            meta = {"language": language, "style": style, "operations": len(sums.steps)}
            rows.append(Example(text, lexicon.tagged(think, str(total)), self.name, meta))
        return rows

    def corpus(self, seed: int = 0, easy: bool = False) -> Iterator[Example]:
        """Documents without end. An eighth are general chat; the rest are train problems, answered as bases answer.

        easy: a quarter recall pages, a quarter bare sums (both found to be what copying and adding are learned
        from), an eighth good chat (names and things are copied too), the rest clean worked problems.
        """
        rnd = random.Random(f"{self.kind} corpus {easy} {seed}").random
        writer = Writer(rnd, self.options.total_max)
        chat = general.corpus(rnd, self.name, good=1.0 if easy else general.GOOD)
        while easy:
            draw = rnd()
            if draw < 0.25:
                yield self._recall(rnd)
            elif draw < 0.5:
                yield self._sums(rnd)
            else:
                yield next(chat) if draw < 0.5 + GENERAL else self._worked(rnd, writer)
        while True:
            yield next(chat) if rnd() < GENERAL else self._document(rnd, writer)

    # -- drawing ----------------------------------------------------------------------------------------------

    def _draw(self, rnd: Callable[[], float]) -> Sums:
        options = self.options
        (start_low, start_high), (fewest, most) = options.start, options.operations
        low, span = options.operand[0], options.operand[1] - options.operand[0] + 1
        total = start = start_low + int(rnd() * (start_high - start_low + 1))
        steps = []
        for _ in range(fewest + int(rnd() * (most - fewest + 1))):
            draw = rnd() * 2 * span  # one draw for both: the integer part is the size and, from span on, the sign
            step = low + int(draw) if draw < span else -(low + int(draw) - span)
            if not 0 <= total + step <= options.total_max:
                step = -step
            steps.append(step)
            total += step
        return Sums(start, tuple(steps))

    def _draw_train(self, rnd: Callable[[], float]) -> Sums:
        while True:
            sums = self._draw(rnd)
            if split_of(sums) == "train":
                return sums

    def _problem(self, split: Split, sums: Sums) -> Problem:
        rnd = random.Random(sums.key).random
        language = LANGUAGES[rnd() < 0.5]
        meta = {"language": language, "operations": len(sums.steps), "start": sums.start, "steps": sums.steps}
        return Problem(f"{split}/{sums.key}", question(rnd, language, sums), str(sums.total), self.name, meta)

    # -- documents --------------------------------------------------------------------------------------------

    def _document(self, rnd: Callable[[], float], writer: Writer) -> Example:
        sums, language = self._draw_train(rnd), LANGUAGES[rnd() < 0.5]
        own, other = LEXICONS[language], LEXICONS["zh" if language == "en" else "en"]
        draw = rnd()
        if draw < OWN_LANGUAGE:
            spoken, label, speak = "own", own, lambda: own
        elif draw < OWN_LANGUAGE + MIXED_LANGUAGE:
            spoken, label, speak = "mixed", own, lambda: own if rnd() < 0.5 else other
        else:
            spoken, label, speak = "other", other, lambda: other
        draw = rnd()
        style = next(name for name, upto in STYLES if draw < upto)
        text = question(rnd, language, sums)
        think, total = getattr(writer, style)(sums, speak)
        completion = lexicon.lay_out(rnd(), think, str(total), label.answer)
        return Example(text, completion, self.name, {"language": language, "style": style, "spoken": spoken})

    def _worked(self, rnd: Callable[[], float], writer: Writer) -> Example:
        sums, language = self._draw_train(rnd), LANGUAGES[rnd() < 0.5]
        lex, style = LEXICONS[language], "steps" if rnd() < 0.5 else "checking"
        text = question(rnd, language, sums)
        think, total = getattr(writer, style)(sums, lambda: lex, clean=True)
        completion = lexicon.lay_out(rnd(), think, str(total), lex.answer)
        return Example(text, completion, self.name, {"language": language, "style": style, "spoken": "own"})

    def _recall(self, rnd: Callable[[], float]) -> Example:
        """What happened on each day of a whole story, said back as signed numbers: copying by label."""
        sums, language = self._draw_train(rnd), LANGUAGES[rnd() < 0.5]
        lex = LEXICONS[language]
        text = f"{lex.recall} {sums.start} {lex.stop} {_told(rnd, lex, sums)} {lex.question}"
        said = " ".join(_term(lex, day, step) for day, step in enumerate(sums.steps))
        return Example(text, f"{sums.start} {said}", self.name, {"language": language, "style": "recall"})

    def _sums(self, rnd: Callable[[], float]) -> Example:
        """Sums that have nothing to do with each other, each in the form of a worked line."""
        language, top = LANGUAGES[rnd() < 0.5], self.options.total_max
        lex, asked, said = LEXICONS[language], [], []
        low, span = self.options.operand[0], self.options.operand[1] - self.options.operand[0] + 1
        for day in range(self.options.operations[1]):
            total = int(rnd() * (top + 1))
            step = low + int(rnd() * span)
            if total + step > top or (rnd() < 0.5 and total - step >= 0):
                step = -step
            line = f"{total} {_term(lex, day, step)}"
            asked.append(line)
            said.append(f"{line} = {total + step}")
        text = f"{lex.sums} {' '.join(asked)} {lex.question}"
        return Example(text, " ".join(said), self.name, {"language": language, "style": "sums"})
