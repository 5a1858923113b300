"""Takes a stage's snapshots: at once where that is quick, and beside the next steps where it is not.

In the background the state is copied first, on the step's own thread, and written from the copy. One snapshot is under
way at a time: the next waits for it. What fails there is raised at the next step. A snapshot has its name only when it
is whole (snapshot.py), so a kill before that leaves the one before it, and `saved` says which one that is.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r1fast import snapshot
from r1fast.parallel import World, world
from r1fast.stages.saved import STATE, copied, leaves, split, write_shards

if TYPE_CHECKING:
    from r1fast.schema import CheckpointConfig

PAYS = 64 << 20  # bytes of state from which `auto` writes in the background; a smaller one takes less than 0.2 s


class Saver:
    """Snapshots of one stage in `directory`. A context: left without an error, all is on disk."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory, self._config = directory, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._apart: World | None = None
        self.saved = 0  # step of the newest whole snapshot that this rank helped to write

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:  # asked twice to stop: at once
            self._thread.join()
        if kind is None:
            self.wait()

    def save(
        self, step: int, state: Mapping[str, Any], notes: Mapping[str, Any], spare: Collection[int], last: bool
    ) -> None:
        """Every rank calls it with its own state; where that is not sharded the first one writes. spare: steps whose
        snapshots are not to be removed. last: nothing follows that it could be written beside."""
        self.wait()
        plain, shards = split(state)
        if not shards and not world().first:  # every rank holds the same
            return
        beside = not last and self._pays(plain, shards)
        place = self._place_apart() if shards else World()
        draft = place.on_first(lambda: snapshot.Draft.begin(self._directory, step))
        with draft.refusals():
            written = write_shards(draft.folder, shards, place, beside) if shards else list
        if beside:
            plain = copied(plain)

        def own() -> dict[str, Any]:
            with draft.refusals():
                names = written()
                if place.first:
                    torch.save(plain, draft.folder / STATE)
                    names = [*names, STATE]
            return draft.sums(names)

        def finish() -> None:
            sums = {name: entry for part in place.everywhere(own) for name, entry in part.items()}
            place.on_first(lambda: draft.finish(sums, notes, self._config.keep, spare) and None)
            self.saved = step

        if beside:
            self._start(finish)
        else:
            finish()

    def look(self) -> None:
        """Raises what failed in the background."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._error is not None and self._thread is None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until nothing is under way; raises what failed."""
        if self._thread is not None:
            self._thread.join()
        self.look()

    def _start(self, finish: Any) -> None:
        def run() -> None:
            try:
                finish()
            except BaseException as error:  # raised where the run will see it
                self._error = error

        self._thread = threading.Thread(target=run, name="snapshot", daemon=True)
        self._thread.start()

    def _pays(self, plain: Any, shards: Mapping[str, torch.Tensor]) -> bool:
        if self._config.background != "auto":
            return self._config.background == "always"
        own = sum(t.nbytes for t in leaves(plain)) + sum(t.nbytes // world().everyone.size for t in shards.values())
        return own >= PAYS

    def _place_apart(self) -> World:
        """These ranks, with a process group that the step's own collectives do not share."""
        if self._apart is None:
            self._apart = world().apart()
        return self._apart
