"""What a stage is given and what it hands back. It depends on nothing that runs, so stages and the recipe can both
import it, and a test can build one by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from r1fast.stop import StopRequest

if TYPE_CHECKING:
    import torch

    from r1fast.metrics import RunLog
    from r1fast.rewards.pool import WorkerPool
    from r1fast.schema import RecipeConfig, Stage
    from r1fast.snapshot import Snapshot
    from r1fast.tasks import Task


SNAPSHOTS = "snapshots"  # of a stage that is not done yet, in its directory


class Progress(Protocol):
    """What a stage tells the person who waits. All calls are cheap: drawing happens elsewhere, a few times a second."""

    def stage(self, name: str, kind: str, steps: int) -> None:
        """A stage of `steps` steps begins."""

    def update(self, step: int, **numbers: float) -> None:
        """`step` steps are done; the first number is the stage's main one, whose curve is drawn."""

    def note(self, text: str) -> None:
        """What is going on where no steps are counted: loading, evaluating, saving."""

    def tell(self, text: str) -> None:
        """Something worth a line of its own that asks for nothing: what memory a stage will take."""

    def warn(self, text: str) -> None:
        """Something that the person should know and that must not be drawn over: a line of its own."""

    def finish(self, summary: str) -> None:
        """The stage is done; one line of what it reached."""


@dataclass(frozen=True, slots=True)
class StageContext:
    """Everything a stage may know of the run it is part of."""

    name: str  # as the recipe calls the stage
    stage: Stage  # its block of the recipe
    recipe: RecipeConfig
    directory: Path  # RUN_DIR/stages/<name>: the stage writes `checkpoint/` or `rows.jsonl` there
    seed: int  # of this stage: a hash of the recipe's seed and the stage's name
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16"
    tasks: Mapping[str, Task]
    log: RunLog
    progress: Progress
    artifacts: Mapping[str, Path]  # directories of the stages done so far, by name
    pool: WorkerPool | None = None  # worker processes for rewards that are not cheap
    stop: StopRequest = field(default_factory=StopRequest)  # whether the run has been asked to end
    resume: Snapshot | None = None  # where an interrupted run of this stage goes on
    snapshot_key: Mapping[str, Any] = field(default_factory=dict)  # what a snapshot must be of to be gone on with
    began: float = field(default_factory=perf_counter)

    @property
    def snapshots(self) -> Path:
        """Where the stage's snapshots are, until it is done."""
        return self.directory / SNAPSHOTS

    def seconds(self) -> float:
        """That the stage has taken so far, those before an interruption included."""
        return perf_counter() - self.began + (self.resume.notes["seconds"] if self.resume else 0.0)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What a stage reached; the recipe writes it to stage.json, with the seconds it measured itself."""

    stats: Mapping[str, Any] = field(default_factory=dict)  # numbers of this kind of stage
    evaluation: Mapping[str, Any] | None = None  # see r1fast.stages.evaluate; None where the stage was not evaluated
    note: str = ""  # half a line for the stage table
