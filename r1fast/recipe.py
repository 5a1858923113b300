"""Runs a recipe: its stages in order, each once, each leaving a record that a later run can trust and reuse.

    RUN_DIR/config.yaml                  the recipe as it ran, complete
    RUN_DIR/metrics.jsonl samples.jsonl  the log (metrics.py)
    RUN_DIR/stages/<name>/               checkpoint/ or rows.jsonl, and stage.json, written last
    RUN_DIR/stages/<name>/snapshots/     the state of a stage that is not done yet (stages/steps.py)
    RUN_DIR/summary.json                 all stages and the measured claims (summary.py)

A stage counts as done only when its stage.json is there: it holds the fingerprint of the stage's inputs (graph.py),
which making of the stages it read, and the size of every file it wrote, so a run that was killed anywhere resumes from
the last stage that is whole, and in the stage after it from the newest whole snapshot of these very inputs. What a
stage left is removed when the stage is done again, and not before: a resume with the wrong settings that is stopped in
time costs the stage it stood in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml

from r1fast import snapshot
from r1fast.check import check
from r1fast.config import UserError, dump_recipe
from r1fast.device import choose_device, choose_dtype
from r1fast.graph import dependents, edges, fingerprints, order, stage_seed
from r1fast.heap import keep_freed_memory
from r1fast.metrics import NoLog, RunLog, write_atomically
from r1fast.parallel import world
from r1fast.stages.context import SNAPSHOTS, StageContext
from r1fast.stop import StopRequest
from r1fast.summary import one_line, summarize

if TYPE_CHECKING:
    from r1fast.schema import RecipeConfig
    from r1fast.stages.context import Progress, StageOutcome
    from r1fast.tasks import Task

CONFIG, RECORD, STAGES, SUMMARY = "config.yaml", "stage.json", "stages", "summary.json"
# All that a run writes: what --fresh removes. A user's own files in the directory are left alone.
_WRITTEN = (CONFIG, "metrics.jsonl", "samples.jsonl", SUMMARY, "report.html", STAGES)


@dataclass(slots=True)
class _Run:
    """What the stages of one run share."""

    recipe: RecipeConfig
    out: Path
    tasks: dict[str, Task]
    fingerprints: dict[str, str]
    device: str
    dtype: str
    log: RunLog | NoLog
    progress: Progress
    stop: StopRequest
    done: dict[str, Path] = field(default_factory=dict)  # directories of the stages that later ones may read


def run(
    recipe: RecipeConfig,
    out: str | Path,
    *,
    progress: Progress,
    resume: bool = False,
    fresh: bool = False,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Runs what is not yet done of `recipe` in directory `out`, and returns (and writes) the summary.

    resume: stages whose inputs are unchanged and whose outputs are there are reused, and the one that was interrupted
    goes on. fresh: what a run left in `out` is removed first. stop: asked between steps whether to end; `Stopped` is
    raised then, and nothing that was finished is lost. UserError before any work for everything that can be found wrong
    then, an existing run without either of the first two included.
    """
    out, place = Path(out), world()
    if (here := 1 if place.peers is None else place.peers.size) != recipe.parallel.tensor:
        raise UserError(
            f"parallel.tensor is {recipe.parallel.tensor}, but these processes hold their models on {here}; start the "
            f"run with torchrun --nproc-per-node {recipe.parallel.tensor} -m r1fast.train ..."
        )
    place.on_first(lambda: _may_write(out, resume, fresh))
    tasks = check(recipe)
    device, dtype = resolve_device(recipe)
    for kind in {stage.kind for stage in recipe.stages.values()}:
        import_module(f"r1fast.stages.{kind}")  # all code of an hours-long run is read now, not as stages come
    prints, names = place.on_first(lambda: fingerprints(recipe)), order(recipe)
    redo = place.on_first(lambda: _prepare(recipe, out, prints, fresh))
    with RunLog(out) if place.first else NoLog(out) as log:
        log.keep_stages(names)
        this = _Run(recipe, out, tasks, prints, device, dtype, log, progress, stop or StopRequest())
        records = {}
        for name in names:
            records[name] = _do_stage(this, name) if name in redo else _reuse_stage(this, name)
            this.done[name] = out / STAGES / name
        summary = summarize(recipe, [records[name] for name in names], out, log.seconds, device)
        if place.first:
            write_atomically(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _prepare(recipe: RecipeConfig, out: Path, prints: Mapping[str, str], fresh: bool) -> set[str]:
    """The run directory made ready, and the stages that are to be run in it."""
    if fresh:
        _remove_run(out)
    redo = stages_to_do(recipe, out, prints)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made a run directory: {error.strerror}; name another with --out") from None
    for stale in (SUMMARY, "report.html"):
        (out / stale).unlink(missing_ok=True)
    write_atomically(out / CONFIG, dump_recipe(recipe))
    return redo


# -- the run directory --------------------------------------------------------------------------------------------


def _may_write(out: Path, resume: bool, fresh: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name another run directory with --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file():
        raise UserError(f"{out} is not empty and not a run (no {CONFIG} in it); name another directory with --out")
    if not (resume or fresh):
        raise UserError(
            f"{out} already holds a run; give --resume to go on with it (finished stages are reused), --fresh to "
            f"remove it and start again, or another --out"
        )


def _remove_run(out: Path) -> None:
    for name in _WRITTEN:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    """The stage.json of a finished stage; None where there is none that can be read."""
    try:
        record = json.loads((out / STAGES / name / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_done(out: Path, name: str, fingerprint: str, sources: set[str]) -> bool:
    """Whether the stage was finished with these very inputs and each file it wrote is still there, in its size.

    `sources`: the stages it reads. One that was made again since has another mark than the one that was read."""
    record = read_record(out, name)
    if record is None or record.get("fingerprint") != fingerprint or record.get("read") != _marks(out, sources):
        return False
    directory = out / STAGES / name
    return all(
        (directory / file).is_file() and (directory / file).stat().st_size == size
        for file, size in record["outputs"].items()
    )


def _marks(out: Path, sources: set[str]) -> dict[str, str | None]:
    return {name: (read_record(out, name) or {}).get("made") for name in sorted(sources)}


def _sources(recipe: RecipeConfig, name: str) -> set[str]:
    return {edge.source for edge in edges(recipe) if edge.target == name}


def stages_to_do(recipe: RecipeConfig, out: Path, prints: Mapping[str, str]) -> set[str]:
    """The stages that a resume in `out` runs: those that are not done, and all that read them."""
    missing = {name for name in recipe.stages if not is_done(out, name, prints[name], _sources(recipe, name))}
    return dependents(recipe, missing)


def told_before_resuming(recipe: RecipeConfig, out: Path) -> str | None:
    """One sentence where a resume would do finished stages again because the settings are others than the run's."""
    try:
        before = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    lost = [name for name in stages_to_do(recipe, out, fingerprints(recipe)) if read_record(out, name)]
    changed = list(_differences(before, yaml.safe_load(dump_recipe(recipe)), ""))
    if not lost or not changed:
        return None
    lost.sort(key=list(recipe.stages).index)
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"settings differ from those of the run in {out} ({'; '.join(changed[:3])}{more}): finished stages that are "
        f"done again: {', '.join(lost)}. Ctrl-C now keeps what is not yet begun"
    )


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif before != now:
        yield f"{path} {before} -> {now}"


def finished_stages(out: Path) -> list[str]:
    """Stages of a run directory that have a record, in the order of its config.yaml."""
    try:
        config = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return []
    return [name for name in config["stages"] if read_record(out, name) is not None]


# -- stages -------------------------------------------------------------------------------------------------------


def _do_stage(this: _Run, name: str) -> dict[str, Any]:
    """Runs one stage, from its newest snapshot or in an empty directory, and writes its record."""
    from r1fast.stages import run_stage

    context = _context(this, name)
    described = {"stage": name, "kind": context.stage.kind, "from": getattr(context.stage, "from_", None)}
    world().on_first(lambda: _begin(this, context, described))
    _seed_everything(context.seed)
    try:
        outcome = run_stage(context)
    except BaseException as error:  # told in the log, then the caller's affair: nothing is swallowed
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        this.log.event(event="stage", status=status, seconds=context.seconds(), error=repr(error), **described)
        raise
    record = world().on_first(lambda: _end(this, context, outcome))
    this.log.event(event="stage", status="finished", seconds=record["seconds"], **described)
    this.progress.finish(one_line(record))
    return record


def _begin(this: _Run, context: StageContext, described: Mapping[str, Any]) -> None:
    """The stage's directory and log as they must be before its first step."""
    name, directory = context.name, context.directory
    # The record goes before the log lines do: killed in between, a stage without lines must not be taken as done.
    (directory / RECORD).unlink(missing_ok=True)
    if context.resume is None:
        this.log.keep_stages(other for other in this.recipe.stages if other != name)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        this.log.event(event="stage", status="started", **described)
    else:
        this.log.rewind(name, context.resume.notes["lines"])
        this.log.event(event="stage", status="resumed", step=context.resume.step, **described)


def _end(this: _Run, context: StageContext, outcome: StageOutcome) -> dict[str, Any]:
    """The record, as it reads from the disk."""
    record = _record(this, context.name, outcome, context.seconds())
    text = json.dumps(record, indent=1, ensure_ascii=False, default=_plain) + "\n"
    write_atomically(context.directory / RECORD, text)
    shutil.rmtree(context.snapshots, ignore_errors=True)  # after the record: a kill in between costs nothing
    return read_record(this.out, context.name)


def _context(this: _Run, name: str) -> StageContext:
    directory = this.out / STAGES / name
    read = world().on_first(lambda: _marks(this.out, _sources(this.recipe, name)))
    key = {"fingerprint": this.fingerprints[name], "read": read}
    context = StageContext(
        name=name,
        stage=this.recipe.stages[name],
        recipe=this.recipe,
        directory=directory,
        seed=stage_seed(this.recipe.seed, name),
        device=this.device,
        dtype=this.dtype,
        tasks=this.tasks,
        log=this.log,
        progress=this.progress,
        artifacts=dict(this.done),
        stop=this.stop,
        snapshot_key=key,
    )
    usable = partial(_may_go_on, this.log, name, key)
    found = snapshot.newest(context.snapshots, usable, this.progress.warn, world())
    return replace(context, resume=found)


def _may_go_on(log: RunLog, name: str, key: Mapping[str, Any], notes: Mapping[str, Any]) -> bool:
    """Whether a snapshot is of these inputs, and the log still holds the lines of the steps before it."""
    held = log.lines(name)
    return all(notes.get(k) == v for k, v in key.items()) and all(held[f] >= n for f, n in notes["lines"].items())


def _record(this: _Run, name: str, outcome: StageOutcome, seconds: float) -> dict[str, Any]:
    stage, directory = this.recipe.stages[name], this.out / STAGES / name
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    files = [path for path in files if SNAPSHOTS not in path.relative_to(directory).parts]
    return {
        "name": name,
        "kind": stage.kind,
        "from": getattr(stage, "from_", None),
        "fingerprint": this.fingerprints[name],
        "made": uuid4().hex,  # marks this making of the stage: what reads it notes which one it read
        "read": _marks(this.out, _sources(this.recipe, name)),
        "seed": stage_seed(this.recipe.seed, name),
        "seconds": seconds,
        "note": outcome.note,
        "stats": dict(outcome.stats),
        "evaluation": None if outcome.evaluation is None else dict(outcome.evaluation),
        "outputs": {path.relative_to(directory).as_posix(): path.stat().st_size for path in files},
    }


def _reuse_stage(this: _Run, name: str) -> dict[str, Any]:
    record = world().on_first(lambda: read_record(this.out, name))
    this.log.event(
        event="stage",
        stage=name,
        kind=record["kind"],
        status="reused",
        seconds=record["seconds"],
        **{"from": record["from"]},
    )
    this.progress.stage(name, record["kind"], 0)
    this.progress.finish(f"{one_line(record)} (reused)")
    return record


def _plain(value: Any) -> Any:
    """numpy scalars and mapping views, which json does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if hasattr(value, "item") else str(value)


# -- the machine --------------------------------------------------------------------------------------------------


def resolve_device(recipe: RecipeConfig) -> tuple[str, str]:
    """(device, dtype) that `auto` means here; UserError where the asked-for one is not there. Sets the threads."""
    import torch

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    keep_freed_memory()
    device = choose_device(recipe.device)
    return device, choose_dtype(recipe.model.dtype, device)


def _seed_everything(seed: int) -> None:
    """A stage's own randomness is keyed by its seed; this is for the libraries' global generators, so that a stage
    gives the same result whether the stages before it ran or were reused."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
