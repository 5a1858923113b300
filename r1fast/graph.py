"""The recipe as a graph: which stage reads what of which, in what order they run, and a fingerprint of everything
that a stage's result depends on. Plain functions of a RecipeConfig; nothing here runs or writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from r1fast.config import UserError, nearest
from r1fast.schema import DataSource, RecipeConfig, Stage, TaskConfig

GIVES_CHECKPOINT = ("pretrain", "sft", "distill", "grpo")
GIVES_ROWS = ("reject",)
GIVES_REWARD_MODEL = ("reward_model",)
FORMAT = 1  # of what stages write; raised when an old run's stages can no longer be reused
# What a folder's content hash covers: everything that changes what a checkpoint computes or how it speaks.
_CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class Edge:
    """`target` reads something of `source`; both are names of stages."""

    source: str
    target: str
    kind: str  # "from" | "data" | "reward model" | "teacher"


# -- what a stage reads -------------------------------------------------------------------------------------------


def data_sources(stage: Stage) -> list[tuple[str, DataSource]]:
    """(key, source) of every supervised source of a stage, the key as the recipe spells it."""
    key = "general" if stage.kind == "reject" else "data"
    return [(f"{key}.{index}", source) for index, source in enumerate(getattr(stage, key, None) or [])]


def uses_evaluation(stage: Stage) -> bool:
    """Whether the recipe's `evaluation` block decides anything that the stage writes."""
    if stage.kind == "evaluate":
        return stage.protocol is None
    return stage.evaluate or (stage.kind == "grpo" and stage.evaluate_every > 0)


def tasks_of(recipe: RecipeConfig, stage: Stage) -> list[str]:
    """Names of the tasks that a stage reads, its evaluation included; each once."""
    names = [stage.task] if hasattr(stage, "task") else []
    names += [entry.task for entry in getattr(stage, "mix", [])]
    names += [source.task for _, source in data_sources(stage) if source.task]
    protocol = getattr(stage, "protocol", None) or (recipe.evaluation if uses_evaluation(stage) else None)
    if protocol:
        names += [protocol.task or next(iter(recipe.tasks)), *([protocol.general] if protocol.general else [])]
    return list(dict.fromkeys(names))


def edges(recipe: RecipeConfig) -> list[Edge]:
    """Every arrow between stages, in the recipe's order. UserError where a name is no stage, or one of a kind that
    does not give what is asked of it."""
    found = []
    for name, stage in recipe.stages.items():
        start = getattr(stage, "from_", None)
        if start is not None and _is_stage(recipe, start, f"stages.{name}.from"):
            found.append(_edge(recipe, start, name, "from", GIVES_CHECKPOINT, "a checkpoint"))
        for key, source in data_sources(stage):
            if source.stage is not None:
                _must_be_stage(recipe, source.stage, f"stages.{name}.{key}.stage")
                found.append(_edge(recipe, source.stage, name, "data", GIVES_ROWS, "supervised rows"))
        for key in ("reward_model", "safety_model"):
            asked = getattr(stage, key, None)
            if asked is not None:
                _must_be_stage(recipe, asked, f"stages.{name}.{key}")
                found.append(_edge(recipe, asked, name, "reward model", GIVES_REWARD_MODEL, "a reward model"))
        teacher = getattr(stage, "teacher", None)
        if teacher is not None and _is_stage(recipe, teacher, f"stages.{name}.teacher"):
            found.append(_edge(recipe, teacher, name, "teacher", GIVES_CHECKPOINT, "a checkpoint"))
    return found


def _is_stage(recipe: RecipeConfig, source: str, place: str) -> bool:
    """Whether a start is a stage; otherwise it must be `model` or an existing folder."""
    if source in recipe.stages:
        return True
    if source != "model" and not Path(source).is_dir():
        near = nearest(source, list(recipe.stages))
        raise UserError(
            f"{place} is {source!r}, which is no stage{near}, not `model` and no checkpoint folder; stages are "
            f"{', '.join(recipe.stages)}"
        )
    return False


def _must_be_stage(recipe: RecipeConfig, source: str, place: str) -> None:
    if source not in recipe.stages:
        near = nearest(source, list(recipe.stages))
        raise UserError(f"{place} is {source!r}, which is no stage{near}; stages are {', '.join(recipe.stages)}")


def _edge(recipe: RecipeConfig, source: str, target: str, kind: str, givers: tuple[str, ...], what: str) -> Edge:
    given = recipe.stages[source].kind
    if given not in givers:
        raise UserError(
            f"stage {target!r} needs {what} ({kind}) of stage {source!r}, which is of kind {given} and gives none; "
            f"name one of kind {' or '.join(givers)}"
        )
    return Edge(source, target, kind)


# -- order --------------------------------------------------------------------------------------------------------


def order(recipe: RecipeConfig) -> list[str]:
    """Names of the stages so that each comes after all it reads; where that leaves a choice, the file's order.

    UserError names the circle where there is one."""
    reads: dict[str, set[str]] = {name: set() for name in recipe.stages}
    for edge in edges(recipe):
        reads[edge.target].add(edge.source)
    done: list[str] = []
    waiting = list(recipe.stages)
    while waiting:
        ready = next((name for name in waiting if reads[name] <= set(done)), None)
        if ready is None:
            circle = _circle(reads, waiting)
            raise UserError(f"the stages form a circle, so none can be first: {' reads '.join(circle)}")
        waiting.remove(ready)
        done.append(ready)
    return done


def _circle(reads: Mapping[str, set[str]], waiting: list[str]) -> list[str]:
    """A closed walk among stages that all wait for another: follow any unmet need until a name comes again."""
    walk = [waiting[0]]
    while True:
        following = next(name for name in waiting if name in reads[walk[-1]])
        if following in walk:
            return [*walk[walk.index(following) :], following]
        walk.append(following)


def dependents(recipe: RecipeConfig, names: set[str]) -> set[str]:
    """`names` and every stage that reads one of them, however far."""
    found = set(names)
    for name in order(recipe):
        if any(edge.target == name and edge.source in found for edge in edges(recipe)):
            found.add(name)
    return found


# -- fingerprints -------------------------------------------------------------------------------------------------


def stage_seed(seed: int, name: str) -> int:
    """A stage's seed: a hash of the recipe's seed and the stage's name, so that adding a stage changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big") >> 1


def fingerprints(recipe: RecipeConfig) -> dict[str, str]:
    """Stage name -> sha256 of all that its result depends on: its block, the seed, the blocks of the model, tasks and
    evaluation it uses, the content of the files it reads, and the fingerprints of the stages it reads.

    Not of device, threads, descriptions or stages that it does not read: changing these re-runs nothing."""
    result: dict[str, str] = {}
    arrows = edges(recipe)
    for name in order(recipe):
        reads = {f"{e.kind} {e.source}": result[e.source] for e in arrows if e.target == name}
        result[name] = _digest({**_own_inputs(recipe, name), "reads": reads})
    return result


def _own_inputs(recipe: RecipeConfig, name: str) -> dict[str, Any]:
    stage = recipe.stages[name]
    # A base from scratch gets a tokenizer of the words of all tasks, whichever it trains on.
    tasks = list(recipe.tasks) if stage.kind == "pretrain" else tasks_of(recipe, stage)
    model = recipe.model.model_dump(exclude={"path"})
    start = getattr(stage, "from_", None)
    if start is not None and start not in recipe.stages:
        folder = recipe.model.path if start == "model" else start
        model["checkpoint"] = content_hash(folder) if folder else None
    return {
        "format": FORMAT,
        "name": name,
        "seed": recipe.seed,
        "stage": stage.model_dump(mode="json", by_alias=True),
        "model": model,
        "tasks": {task: task_inputs(recipe, recipe.tasks[task]) for task in sorted(tasks) if task in recipe.tasks},
        **({"plugins": [content_hash(path) for path in recipe.plugins]} if recipe.plugins else {}),
        "evaluation": recipe.evaluation.model_dump(mode="json") if uses_evaluation(stage) else None,
        "files": [content_hash(source.path) for _, source in data_sources(stage) if source.path],
    }


def task_inputs(recipe: RecipeConfig, task: TaskConfig) -> dict[str, Any]:
    """A task's block with the content of the files it names, in its options too (a test split of its own)."""
    path = task.path or recipe.data
    named = sorted(value for value in task.options.values() if isinstance(value, str) and Path(value).is_file())
    files = [content_hash(file) for file in [*([path] if path else []), *named]]
    return {**task.model_dump(mode="json", exclude={"path"}), "files": files}


def content_hash(path: str) -> str:
    """sha256 and size of a file, or of the files of a checkpoint folder by name; a dataset's name stands for itself."""
    place = Path(path)
    if place.is_file():
        return _file_hash(place)
    if place.is_dir():
        files = sorted({file for pattern in _CHECKPOINT_FILES for file in place.glob(pattern)})
        return _digest({file.name: _file_hash(file) for file in files})
    return f"name {path}"


def _file_hash(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {_sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)}"


@lru_cache(maxsize=1024)
def _sha256(path: str, size: int, modified: int) -> str:
    """Of the file's bytes; size and time are in the key, so that a file changed since is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
