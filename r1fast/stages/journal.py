"""Rollouts on disk between two snapshots, so that a killed run need not sample them again.

Sampling is most of an RL step, and the draws of a step depend on nothing but its seed and weights: the journal saves
time and changes no bit. Each draw is one .npz file, written aside and renamed; a damaged one is passed over (every
member has a checksum) and its draw is made again.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r1fast.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PER_TOKEN = tuple(f.name for f in fields(Rollout) if str(f.type).startswith("list["))
_REST = tuple(f.name for f in fields(Rollout) if f.name not in _PER_TOKEN)


class Journal:
    """The draws of an RL stage in `directory`, by step and round."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, step: int, round_: int, groups: Sequence[RolloutGroup], order: Sequence[int]) -> None:
        """Scored groups, whole but for their prompts, which their streams give again, and in which order they finished:
        the learner adds up their gradients in it."""
        rollouts = [r for group in groups for r in group.rollouts]
        arrays: dict[str, NDArray] = {"sizes": np.array([len(group.rollouts) for group in groups])}
        arrays["order"] = np.array(order, np.int64)
        for name in _PER_TOKEN:
            values = [getattr(r, name) for r in rollouts]
            arrays[name] = np.array([x for v in values for x in v or ()], np.int64 if name == "tokens" else np.float64)
            arrays[f"{name} lengths"] = np.array([-1 if v is None else len(v) for v in values])
        rest = [{name: _plain(getattr(r, name)) for name in _REST} for r in rollouts]
        told = json.dumps({"rollouts": rest, "versions": [g.weights_version for g in groups]})
        arrays["rest"] = np.frombuffer(told.encode(), np.uint8)
        self.directory.mkdir(exist_ok=True)
        path = self._path(step, round_)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(
        self, step: int, round_: int, prompts: Sequence[Prompt]
    ) -> tuple[list[RolloutGroup], list[int]] | None:
        """The groups of `prompts` as they were drawn, and in which order they finished; None where they were not
        written, or not whole."""
        try:
            with np.load(self._path(step, round_), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
                return _groups(found, prompts), found["order"].tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def forget(self, step: int) -> None:
        """Removes the draws of the first `step` steps (counted from 0): a snapshot holds what came of them."""
        for path in self.directory.glob("step-*.npz"):
            if int(path.name.split("-")[1]) < step:
                path.unlink(missing_ok=True)

    def _path(self, step: int, round_: int) -> Path:
        return self.directory / f"step-{step:08d}-{round_}.npz"


def _groups(arrays: dict[str, NDArray], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
    told = json.loads(arrays["rest"].tobytes())
    sizes = arrays["sizes"].tolist()
    if len(sizes) != len(prompts):
        raise ValueError("another draw's")
    values = {name: iter(_split(arrays[name], arrays[f"{name} lengths"])) for name in _PER_TOKEN}
    rest = iter(told["rollouts"])

    def rollout() -> Rollout:
        return Rollout(**{name: next(each) for name, each in values.items()}, **next(rest))

    return [
        RolloutGroup(prompt, [rollout() for _ in range(size)], version)
        for prompt, size, version in zip(prompts, sizes, told["versions"], strict=True)
    ]


def _split(flat: NDArray, lengths: NDArray) -> list[list | None]:
    ends = np.cumsum(np.maximum(lengths, 0)).tolist()
    flat = flat.tolist()
    return [None if n < 0 else flat[end - n : end] for n, end in zip(lengths.tolist(), ends, strict=True)]


def _plain(value):
    return dict(value) if hasattr(value, "items") else value
