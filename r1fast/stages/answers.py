"""What a model answered in an evaluation: samples with their scores, in memory and on disk as they come.

An evaluation takes hours of sampling, and of asking judges who want money; so every problem's samples are appended to
a file when they are drawn and again when they are judged, and an interrupted evaluation goes on behind the last whole
line. The file begins with a key, which says what it is an evaluation of: of anything else it is not gone on with.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1fast.config import UserError
from r1fast.metrics import drop_torn_line, read_rows
from r1fast.types import Finish, Prompt, RolloutGroup

_TOGETHER = 8  # problems judged by one call; whoever interrupts an evaluation waits for one call


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion and what was said of it."""

    text: str
    tokens: int
    finish: Finish
    rewards: Mapping[str, float] = field(default_factory=dict)  # by kind; "accuracy" is the task's own verifier
    errors: Mapping[str, str] = field(default_factory=dict)  # kind -> why its verifier failed
    answer: str | None = None  # what votes compare

    @property
    def correct(self) -> float | None:
        """The verdict; None where the verifier failed."""
        return self.rewards.get("accuracy")


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem and the model's samples of it."""

    prompt: Prompt
    samples: list[Sample]


def unscored(group: RolloutGroup) -> list[Sample]:
    return [Sample(r.text, len(r.tokens), r.finish) for r in group.rollouts]


class AnswerFile:
    """Samples by (part, problem id); a part is one set of sampling settings. Without a path it is only memory."""

    def __init__(
        self, path: Path | None, key: Mapping[str, Any], on_scored: Callable[[list[Sample]], None] | None = None
    ) -> None:
        """Reads what is there. UserError where the file is of another key, naming what differs. on_scored is told of
        every problem that is judged from now on, in the thread that judges."""
        self.path = path
        self._on_scored = on_scored
        self._drawn: dict[tuple[str, str], list[Sample]] = {}
        self._scored: dict[tuple[str, str], list[Sample]] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is None:
            return
        if path.exists():
            drop_torn_line(path)
        rows = list(read_rows(path))
        if len(rows) == 1 and rows[0].get("key") != json.loads(json.dumps(key)):  # ended before its first answer
            path.unlink()
            rows = []
        if rows:
            self._compare(rows[0].get("key", {}), json.loads(json.dumps(key)))
        self._file = path.open("a", encoding="utf-8")
        if not rows:
            self._write({"key": dict(key)})
        for row in rows[1:]:
            place = row["part"], row["id"]
            samples = [Sample(**sample) for sample in row["samples"]]
            if row["scored"] and not any(sample.errors for sample in samples):
                self._scored[place] = samples
            else:  # what a verifier failed at is judged again: the judge may have been out of reach
                self._drawn[place] = [Sample(s.text, s.tokens, s.finish) for s in samples]
                self._scored.pop(place, None)

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.path} holds an interrupted evaluation with another {name} (there {found.get(name)}, now "
                    f"{wanted.get(name)}); remove it to begin again, or give another --out"
                )

    def drawn(self, part: str, problem: str) -> list[Sample] | None:
        return self._drawn.get((part, problem))

    def scored(self, part: str, problem: str) -> list[Sample] | None:
        return self._scored.get((part, problem))

    @property
    def finished(self) -> int:
        """Problems that are drawn and judged, each part counted."""
        return len(self._scored)

    def keep(self, part: str, problem: str, samples: list[Sample], scored: bool) -> None:
        """Remembers the samples of a problem; on disk when this returns."""
        with self._lock:
            (self._scored if scored else self._drawn)[part, problem] = samples
            if self._file is not None:
                lines = [asdict(sample) for sample in samples]
                self._write({"part": part, "id": problem, "scored": scored, "samples": lines})
        if scored and self._on_scored is not None:
            self._on_scored(samples)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tally:
    """Tells whoever waits how far an evaluation is: problems judged, the share of right samples among them, and their
    length in tokens. update: of a Progress."""

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update
        self.done = 0  # problems judged, before and now
        self._right = self._judged = self._samples = self._tokens = 0.0

    def __call__(self, samples: list[Sample]) -> None:
        verdicts = [sample.correct for sample in samples if sample.correct is not None]
        self.done += 1
        self._right += sum(verdicts)
        self._judged += len(verdicts)
        self._samples += len(samples)
        self._tokens += sum(sample.tokens for sample in samples)
        self._update(self.done, accuracy=self._right / max(1, self._judged), length=self._tokens / self._samples)


class Judging:
    """Judges problems in a thread of its own while the sampler goes on drawing: a verifier may take seconds.

    `judge` is handed all problems that wait, so that its worker processes always have several; what it raises is
    raised again by the next `add`, or at the end of the block. Leaving the block waits for all that was added; leaving
    it by an exception, for no more than is under way.
    """

    def __init__(self, judge: Callable[[Sequence[Answered]], None]) -> None:
        self._judge = judge
        self._waiting: queue.SimpleQueue[Answered | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="judging", daemon=True)

    def add(self, answered: Answered) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiting.put(answered)

    def __enter__(self) -> Judging:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._failure = self._failure or RuntimeError("not judged: the evaluation was interrupted")
        self._waiting.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        more = True
        while more:
            batch = [self._waiting.get()]
            while len(batch) < _TOGETHER and batch[-1] is not None and not self._waiting.empty():
                batch.append(self._waiting.get())
            more = batch[-1] is not None
            batch = [answered for answered in batch if answered is not None]
            if not batch or self._failure is not None:
                continue
            try:
                self._judge(batch)
            except BaseException as error:  # it is raised where somebody can hear it
                self._failure = error
