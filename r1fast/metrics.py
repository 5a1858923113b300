"""What a run tells about itself: an append-only log of events and the seconds that each phase took.

One JSON object a line, flushed as written, so that a killed run keeps everything up to its last whole line and the
report reads a run that is still going. No torch here: the log must cost microseconds beside steps of milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from r1fast.config import UserError

FILES = EVENTS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class RunLog:
    """Appends to RUN_DIR/metrics.jsonl and RUN_DIR/samples.jsonl.

    `time` of an event is in seconds since the run began; a resumed run goes on from the last event's time, so that
    times never run backwards. Numbers that JSON has no word for (nan, inf) are written as null.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._files = {name: self._open(name) for name in FILES}
        self._lines = {name: Counter(row.get("stage") for row in read_rows(self.directory / name)) for name in FILES}
        last = max((row.get("time") or 0.0 for row in read_events(self.directory)), default=0.0)
        self._zero = time.perf_counter() - last

    def _open(self, name: str):
        path = self.directory / name
        if path.exists():
            drop_torn_line(path)
        return path.open("a", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Since the run began, interruptions left out."""
        return time.perf_counter() - self._zero

    def event(self, **fields: Any) -> None:
        self._write(EVENTS, {**fields, "time": round(self.seconds, 4)})

    def sample(self, **fields: Any) -> None:
        self._write(SAMPLES, fields)

    def _write(self, name: str, fields: dict) -> None:
        file = self._files[name]
        try:
            file.write(_line(fields))
            file.flush()
        except OSError as error:  # a full disk; the torn line is dropped when the log is opened again
            raise UserError(
                f"{self.directory / name} cannot be written ({error.strerror}): make room, then go on with --resume"
            ) from error
        self._lines[name][fields.get("stage")] += 1

    def lines(self, stage: str) -> dict[str, int]:
        """How many lines of each file are the stage's so far."""
        return {name: self._lines[name][stage] for name in FILES}

    def sync(self) -> None:
        """To the disk itself: what is counted in a snapshot must outlive the machine's power."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def keep_stages(self, names: Iterable[str]) -> None:
        """Forgets the lines of every stage but `names` (before a resumed run does those stages again, so that no step
        is told twice). Written aside and renamed: a crash leaves either the old file or the new one."""
        wanted = set(names)
        for name in FILES:
            self._rewrite(name, [row for row in read_rows(self.directory / name) if row.get("stage") in wanted])

    def rewind(self, stage: str, lines: Mapping[str, int]) -> None:
        """Forgets what was written of `stage` after its first `lines` (of each file): a resumed stage tells it again.

        Raises ValueError, and forgets nothing, where the files hold fewer: they are not those that were counted."""
        if any(self._lines[name][stage] < lines[name] for name in FILES):
            raise ValueError(f"the log holds {self.lines(stage)} lines of stage {stage!r}, {dict(lines)} were written")
        for name in FILES:
            seen, kept = 0, []
            for row in read_rows(self.directory / name):
                if row.get("stage") == stage:
                    seen += 1
                    if seen > lines[name]:
                        continue
                kept.append(row)
            self._rewrite(name, kept)

    def _rewrite(self, name: str, rows: list[dict]) -> None:
        self._files[name].close()
        path = self.directory / name
        write_atomically(path, "".join(map(_line, rows)))
        self._files[name] = path.open("a", encoding="utf-8")
        self._lines[name] = Counter(row.get("stage") for row in rows)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what a full disk did not take was told when it was written
                file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class NoLog:
    """The log of a rank that does not write it: the same calls, and nothing comes of them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._began = Path(directory), time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    event = sample = sync = keep_stages = rewind = close = _nothing

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_events(directory: Path) -> list[dict]:
    """The events of a run so far, oldest first; a line cut short by a crash is left out."""
    return list(read_rows(Path(directory) / EVENTS))


def read_rows(path: Path) -> Iterator[dict]:
    """The JSON objects of a log file; none where there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file beside `path`, syncs it to disk and renames it, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(fields: dict) -> str:
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_number) + "\n"
    except ValueError:  # only then is the walk paid for
        return json.dumps(_finite(fields), ensure_ascii=False, allow_nan=False) + "\n"


def _number(value: Any) -> Any:
    """numpy and torch scalars, paths and mappings that json does not know."""
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "items"):
        return dict(value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value if value is None or isinstance(value, str | int) else _finite(_number(value))


def drop_torn_line(path: Path) -> None:
    """Cuts what follows the last newline: the start of a line that a crash kept from being finished."""
    with path.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


class PhaseTimer:
    """Wall seconds by phase: `with timer("sample"): ...`, then `timer.seconds` or `timer.take()`.

    A phase opened inside another stops the outer one's clock, so phases never overlap and their sum never exceeds the
    wall time. About 1 us for entering and leaving.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.longest: dict[str, float] = {}  # seconds that one stay in a phase has taken at most, for the watchdog
        self._open: list[str] = []
        self._entered: list[float] = []
        self._began = self._mark = time.perf_counter()

    def __call__(self, phase: str) -> PhaseTimer:
        self._charge()
        self._open.append(phase)
        self._entered.append(self._mark)
        return self

    def __enter__(self) -> PhaseTimer:
        return self

    def __exit__(self, *_) -> None:
        self._charge()
        phase, seconds = self._open.pop(), self._mark - self._entered.pop()
        if seconds > self.longest.get(phase, 0.0):
            self.longest[phase] = seconds

    def running(self) -> tuple[str | None, float]:
        """The innermost open phase and how long it has been open; safe from another thread."""
        try:
            return self._open[-1], time.perf_counter() - self._entered[-1]
        except IndexError:  # none, or closed between the two looks
            return None, 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def take(self, other: bool = False) -> dict[str, float]:
        """The seconds since the last take, then starts anew; `other` adds what no phase claimed as one of its own."""
        self._charge()
        taken, self.seconds = self.seconds, {}
        if other:
            taken["other"] = max(0.0, self._mark - self._began - sum(taken.values()))
        self._began = self._mark
        return taken
