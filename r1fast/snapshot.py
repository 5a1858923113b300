"""The state of a running stage on disk: whole, checked, or not there at all.

A snapshot is a folder `step-00000120` of files and a manifest with each file's size and SHA-256. It is written under a
temporary name, synced file by file and renamed last, so a kill or a full disk leaves the one before it as it was. A
snapshot whose bytes are not those that were written is named, passed over, and the one before it is used.

No torch here: what the files hold is the writer's affair (stages/steps.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1fast.config import UserError

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


def write(
    directory: Path,
    step: int,
    files: Mapping[str, Writer],
    notes: Mapping[str, Any],
    keep: int = 2,
    spare: Collection[int] = (),
) -> Snapshot:
    """Writes `directory/step-<step>` and removes all but the newest `keep` snapshots and those of the steps `spare`.

    files: name -> what writes it. notes: plain JSON values. Raises SnapshotError, with nothing of the new snapshot
    left, where the system refuses (a full disk, a read-only folder).
    """
    path, temporary = directory / f"step-{step:08d}", directory / f".step-{step:08d}.writing-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(directory)
        temporary.mkdir()
        sums = {}
        for name, writer in files.items():
            writer(temporary / name)
            sums[name] = _sync_and_sum(temporary / name)
        manifest = {"format": FORMAT, "step": step, "files": sums, "notes": dict(notes)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        shutil.rmtree(path, ignore_errors=True)  # of an earlier try at the same step, which was found damaged
        os.rename(temporary, path)
        _sync(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if isinstance(error, RuntimeError) and not _is_about_writing(error):
            raise
        why = _why(error, directory)
        shutil.rmtree(temporary, ignore_errors=True)
        last = next((found.name for found in _folders(directory)), None) if directory.is_dir() else None
        kept = f"the last whole snapshot is {last}" if last else "there is no earlier snapshot"
        raise SnapshotError(
            f"{path}: the snapshot cannot be written ({why}); {kept}: make room, then go on with --resume"
        ) from error
    _prune(directory, keep, {path.name, *(f"step-{kept:08d}" for kept in spare)})
    return Snapshot(path, step, dict(notes))


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
    directory: Path, usable: Callable[[Mapping[str, Any]], bool], tell: Callable[[str], None]
) -> Snapshot | None:
    """The newest whole snapshot whose notes are `usable`; `tell` hears of each damaged one that is passed over."""
    for path in _folders(directory):
        try:
            manifest = _read(path)
        except ValueError as error:
            tell(f"{path} is damaged and not used: {error}")
            continue
        if usable(manifest["notes"]):
            return Snapshot(path, manifest["step"], manifest["notes"])
    return None


def of_step(directory: Path, step: int, tell: Callable[[str], None]) -> Snapshot | None:
    """The snapshot of this very step, if it is whole; else `tell` hears what is wrong with it."""
    path = directory / f"step-{step:08d}"
    try:
        return Snapshot(path, step, _read(path)["notes"])
    except ValueError as error:
        tell(f"{path} is damaged and not used: {error}")
        return None


def _read(path: Path) -> dict[str, Any]:
    """The manifest of a whole snapshot. ValueError says what is wrong with one that is not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, step, notes = manifest["files"], manifest["step"], manifest["notes"]
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
        if not isinstance(step, int) or not isinstance(notes, dict) or not isinstance(files, dict):
            raise TypeError
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"there is no {MANIFEST} in it") from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from None
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size:,} bytes, {size:,} were written")
        if _sum(file) != digest:
            raise ValueError(f"{name} does not have the checksum that it was written with")
    return manifest


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
