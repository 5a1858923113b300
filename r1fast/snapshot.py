"""The state of a running stage on disk: whole, checked, or not there at all.

A snapshot is a folder `step-00000120` of files and a manifest with each file's size and SHA-256. It is written under a
temporary name, synced file by file and renamed last, so a kill or a full disk leaves the one before it as it was. A
snapshot whose bytes are not those that were written is named, passed over, and the one before it is used.

No torch here: what the files hold is the writer's affair (stages/saving.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1fast.config import UserError
from r1fast.parallel import World

MANIFEST = "manifest.json"
FORMAT = 1
_NEARLY_FULL = 1 << 20  # bytes
_NAME = re.compile(r"step-(\d{8,})")

Writer = Callable[[Path], None]  # writes one file at the path it is given


class SnapshotError(UserError):
    """A snapshot cannot be written; the ones before it are as they were."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole snapshot: its folder, the step that it was taken after, and what its writer noted."""

    path: Path
    step: int
    notes: Mapping[str, Any]

    def file(self, name: str) -> Path:
        return self.path / name


@dataclass(frozen=True, slots=True)
class Draft:
    """A snapshot on its way, in a folder that is none yet. One rank begins and finishes it; all may write into it."""

    path: Path
    folder: Path  # where its files are written
    step: int

    @classmethod
    def begin(cls, directory: Path, step: int) -> Draft:
        """An empty one in `directory`, where nothing unfinished is left then. Raises SnapshotError, as all methods."""
        path = directory / f"step-{step:08d}"
        draft = cls(path, directory / f".{path.name}.writing-{os.getpid()}", step)
        with draft.refusals():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(directory)
            draft.folder.mkdir()
        return draft

    def sums(self, names: Iterable[str]) -> dict[str, Any]:
        """Syncs files that this process has written; their entries in the manifest."""
        with self.refusals():
            return {name: _sync_and_sum(self.folder / name) for name in names}

    def finish(
        self, sums: Mapping[str, Any], notes: Mapping[str, Any], keep: int = 2, spare: Collection[int] = ()
    ) -> Snapshot:
        """Gives it its manifest and its name, and removes all but the newest `keep` and those of the steps `spare`.

        sums: of all files. notes: plain JSON values."""
        directory = self.path.parent
        with self.refusals():
            manifest = {"format": FORMAT, "step": self.step, "files": dict(sums), "notes": dict(notes)}
            (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            _sync(self.folder / MANIFEST)
            _sync(self.folder)
            shutil.rmtree(self.path, ignore_errors=True)  # of an earlier try at the same step, which was found damaged
            os.rename(self.folder, self.path)
            _sync(directory)
        _prune(directory, keep, {self.path.name, *(f"step-{kept:08d}" for kept in spare)})
        return Snapshot(self.path, self.step, dict(notes))

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Where the system refuses (a full disk, a read-only folder): SnapshotError, and nothing of it is left."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            if isinstance(error, RuntimeError) and not _is_about_writing(error):
                raise
            directory = self.path.parent
            why = _why(error, directory)
            shutil.rmtree(self.folder, ignore_errors=True)
            last = next((found.name for found in _folders(directory)), None) if directory.is_dir() else None
            kept = f"the last whole snapshot is {last}" if last else "there is no earlier snapshot"
            raise SnapshotError(
                f"{self.path}: the snapshot cannot be written ({why}); {kept}: make room, then go on with --resume"
            ) from error


def write(
    directory: Path,
    step: int,
    files: Mapping[str, Writer],
    notes: Mapping[str, Any],
    keep: int = 2,
    spare: Collection[int] = (),
) -> Snapshot:
    """Writes `directory/step-<step>` alone and at once; the rest as of Draft. files: name -> what writes it."""
    draft = Draft.begin(directory, step)
    for name, writer in files.items():
        with draft.refusals():
            writer(draft.folder / name)
    return draft.finish(draft.sums(files), notes, keep, spare)


def _prune(directory: Path, keep: int, spared: Collection[str]) -> None:
    """Removes all but the newest `keep` and the spared ones, each by another name first: what a kill leaves half
    removed is no snapshot any more."""
    for old in list(_folders(directory))[keep:]:
        if old.name not in spared:
            going = old.with_name(f".{old.name}.writing-{os.getpid()}")
            shutil.rmtree(going, ignore_errors=True)
            os.rename(old, going)
            shutil.rmtree(going, ignore_errors=True)


def newest(
    directory: Path,
    usable: Callable[[Mapping[str, Any]], bool],
    tell: Callable[[str], None],
    place: World = World(),  # noqa: B008 (frozen)
) -> Snapshot | None:
    """The newest whole snapshot whose notes are `usable`; `tell` hears of each damaged one that is passed over.

    place: ranks that look together, each at a share of the files; all must call, only the first is asked and told."""
    for found in place.on_first(lambda: [_opened(path, usable) for path in _folders(directory)]):
        if found.why is None and found.usable:
            found = replace(found, why=_wrong(found, place))
        if found.why is not None:
            if place.first:
                tell(f"{found.path} is damaged and not used: {found.why}")
        elif found.usable:
            return Snapshot(found.path, found.step, found.notes)
    return None


def of_step(
    directory: Path,
    step: int,
    tell: Callable[[str], None],
    place: World = World(),  # noqa: B008
) -> Snapshot | None:
    """The snapshot of this very step, if it is whole; the rest as of `newest`."""
    path = directory / f"step-{step:08d}"
    found = place.on_first(lambda: _opened(path, lambda notes: True))
    why = found.why or _wrong(found, place)
    if why is None:
        return Snapshot(path, step, found.notes)
    if place.first:
        tell(f"{path} is damaged and not used: {why}")
    return None


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a folder's manifest says; its files have not been looked at."""

    path: Path
    why: str | None = None  # it cannot be used
    step: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # name -> bytes, SHA-256
    usable: bool = False


def _opened(path: Path, usable: Callable[[Mapping[str, Any]], bool]) -> _Opened:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, step, notes = manifest["files"], manifest["step"], manifest["notes"]
        if manifest["format"] != FORMAT:
            return _Opened(path, f"its format is {manifest['format']}, this version reads {FORMAT}")
        if not isinstance(step, int) or not isinstance(notes, dict) or not isinstance(files, dict):
            raise TypeError
        expected = {str(name): (entry["bytes"], str(entry["sha256"])) for name, entry in files.items()}
        if not all(isinstance(size, int) for size, _ in expected.values()):
            raise TypeError
    except FileNotFoundError:
        return _Opened(path, f"there is no {MANIFEST} in it")
    except (OSError, KeyError, TypeError, ValueError) as error:
        return _Opened(path, f"its {MANIFEST} cannot be read ({type(error).__name__})")
    return _Opened(path, None, step, notes, expected, usable(notes))


def _wrong(found: _Opened, place: World) -> str | None:
    """What is wrong with the files of a snapshot; None: they are as they were written."""
    names = list(found.files)
    costs = [float(size) for size, _ in found.files.values()]
    wrongs = place.everyone.map(names, lambda own: [_wrong_file(found.path / n, *found.files[n]) for n in own], costs)
    return next((wrong for wrong in wrongs if wrong is not None), None)


def _wrong_file(file: Path, size: int, digest: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size:,} bytes, {size:,} were written"
    if _sum(file) != digest:
        return f"{file.name} does not have the checksum that it was written with"
    return None


def _folders(directory: Path) -> Iterator[Path]:
    """Snapshot folders, newest first."""
    if not directory.is_dir():
        return
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    yield from (path for _, path in sorted(found, reverse=True))


def _remove_unfinished(directory: Path) -> None:
    """What a killed process left half-written; only one process writes here."""
    for path in directory.glob(".step-*.writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_about_writing(error: RuntimeError) -> bool:
    text = str(error)
    return "PytorchStreamWriter" in text or "file write failed" in text or "unexpected pos" in text


def _why(error: Exception, directory: Path) -> str:
    """The system's word for it; torch's own speaks of positions in a file where the disk is full."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    free = shutil.disk_usage(directory).free if directory.is_dir() else None
    return os.strerror(errno.ENOSPC) if free is not None and free < _NEARLY_FULL else str(error).splitlines()[0]


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync_and_sum(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sum(file)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
