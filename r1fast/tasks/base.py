"""What a task is: where problems come from, what says that an answer is right, and what may be learned from it.

A kind of task is a class registered under its name. Each gives problems in three disjoint splits; the rest
(written solutions, pretraining documents, preference pairs, measures) a kind has or has not, and asking for what
it has not is a `UserError` that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError

from r1fast.config import UserError, nearest
from r1fast.schema import Strict, TaskConfig
from r1fast.types import Example, Preference, Problem

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Task:
    """Base of every kind. `name` is the recipe's name for it and goes into every row; `kind` is the class's."""

    kind: ClassVar[str] = ""
    Options: ClassVar[type[Strict]] = Strict  # what `options` may hold for this kind
    reads_rows: ClassVar[bool] = False  # its problems are those of a file: there is an end to them
    verifier: str | None = None  # the reward that means "accuracy" here; None: nothing is right or wrong
    beside: tuple[str, ...] = ()  # rewards that an evaluation measures beside accuracy, format and language

    def __init__(self, name: str, config: TaskConfig, default_path: str | None = None) -> None:
        self.name = name
        self.options = read_options(self.Options, name, config)

    def words(self) -> list[str] | None:
        """The complete vocabulary, for building a word-level tokenizer; None where text is open."""
        return None

    def problems(self, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
        """`count` distinct problems of a split in the order that `seed` gives; fewer where the task holds fewer."""
        raise NotImplementedError

    def examples(self, count: int | None = None, seed: int = 0) -> list[Example]:
        """Written solutions of train problems: right, tagged, readable. None: as many as there are."""
        raise self._lacks("written solutions")

    def corpus(self, seed: int = 0, easy: bool = False) -> Iterator[Example]:
        """Pretraining documents without end, of train problems only; `easy`: those a curriculum begins with."""
        raise self._lacks("pretraining documents")

    def preferences(self, split: Split, count: int, seed: int = 0) -> list[Preference]:
        """Pairs of answers, the better one first."""
        raise self._lacks("preference pairs")

    def measure(self, meta: Mapping[str, Any], completion: str) -> dict[str, float] | None:
        """What can be said of a completion by rule where no answer is right; None where the verifier says it."""
        return None

    def summary(self, answered: Sequence[tuple[Mapping[str, Any], Sequence[Any]]]) -> dict[str, Any]:
        """Numbers of an evaluation that only this task knows (a rating, a win rate), by name.

        answered: a problem's meta and its samples (stages/answers.py: text, tokens, rewards), for every problem."""
        return {}

    def _lacks(self, what: str) -> UserError:
        return UserError(f"task {self.name!r}: a task of kind {self.kind!r} has no {what}; use another task here")


T = TypeVar("T", bound=type[Task])
_KINDS: dict[str, type[Task]] = {}


def register(kind: str) -> Callable[[T], T]:
    """Class decorator: makes a `Task` known under `kind`, the word that recipes use."""

    def add(cls: T) -> T:
        cls.kind = kind
        _KINDS[kind] = cls
        return cls

    return add


def kinds() -> list[str]:
    return sorted(_KINDS)


def build(name: str, config: TaskConfig, default_path: str | None = None) -> Task:
    """The task that a recipe's block describes.

    `default_path` is the recipe's `data`, for kinds that read a file and are given none of their own. Rows are read
    and checked here, so that what is wrong with them is said before any work.
    """
    if config.kind not in _KINDS:
        known = ", ".join(kinds())
        raise UserError(
            f"tasks.{name}.kind: there is no kind {config.kind!r}{nearest(config.kind, kinds())}; kinds are {known}"
        )
    return _KINDS[config.kind](name, config, default_path)


def read_options(options: type[Strict], name: str, config: TaskConfig) -> Any:
    """`config.options` as the kind's own typed options; the first thing wrong with them is a `UserError`."""
    known = sorted(options.model_fields)
    for key in config.options:
        if key not in known:
            have = f"options are {', '.join(known)}" if known else "it takes none"
            raise UserError(
                f"tasks.{name}.options.{key}: no option of kind {config.kind!r}{nearest(key, known)}; {have}"
            )
    try:
        return options(**config.options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["tasks", name, "options", *map(str, first["loc"])])
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
