"""Everything about a recipe that can be found wrong before any work: names, abilities, files, checkpoints, lengths.

`check` builds the recipe's tasks and raises UserError with the first thing it finds; what it returns is what the run
uses. Only data can be wrong after it has passed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1fast import plugins, rewards
from r1fast import tasks as task_kinds
from r1fast.config import UserError, nearest
from r1fast.graph import data_sources, order, tasks_of, uses_evaluation
from r1fast.schema import DataSource, EvaluationConfig, GRPOStage, RecipeConfig, SamplingConfig, TaskConfig
from r1fast.tasks.rows import RowTask

if TYPE_CHECKING:
    from r1fast.tasks import Task

MODEL_REWARDS = {"preference": "reward_model", "safety": "safety_model"}  # reward -> the key that names who is asked
_MADE = 256  # problems of a task that makes them; of a task that reads them, all are looked at
_LONGEST = 64  # problems of a task, by characters, whose prompts are encoded to find the longest


def check(recipe: RecipeConfig, need_inputs: bool = True) -> dict[str, Task]:
    """The recipe's tasks by name, after all checks. `need_inputs` false (a dry run) forgives what the presets leave to
    the user: model.path, the data, the student of a distillation."""
    plugins.load(recipe.plugins)
    rewards.configure(recipe.rewards)
    _names(recipe)
    order(recipe)
    for name, stage in recipe.stages.items():
        for task in tasks_of(recipe, stage):
            _known_task(recipe, task, f"stages.{name}")
    built = {name: _build(recipe, name, need_inputs) for name in recipe.tasks}
    for name in recipe.stages:
        _abilities(recipe, name, built)
        _rewards(recipe, name, built)
    if need_inputs:
        _verifiers(recipe, built)
    _starts(recipe, need_inputs)
    _files(recipe)
    _lengths(recipe)
    _prompts(recipe, built)
    return built


def _build(recipe: RecipeConfig, name: str, need_inputs: bool) -> Task:
    config = recipe.tasks[name]
    kind = next((kind for kind in RowTask.__subclasses__() if kind.kind == config.kind), None)
    if kind is None or need_inputs or config.path or recipe.data:
        return task_kinds.build(name, config, recipe.data)
    return _unread(kind, name, config)


class Unread:
    """Marks the stand-in for a task whose data are not given yet: of its kind, but without rows."""


def _unread(kind: type[RowTask], name: str, config: TaskConfig) -> Task:
    class WithoutRows(Unread, kind):
        def __init__(self) -> None:
            task_kinds.Task.__init__(self, name, config)
            self.verifier = getattr(self.options, "verifier", kind.verifier)
            self._splits = dict.fromkeys(task_kinds.SPLITS, ())

    return WithoutRows()


# -- names --------------------------------------------------------------------------------------------------------


def _names(recipe: RecipeConfig) -> None:
    for block, names in (("stages", recipe.stages), ("tasks", recipe.tasks)):
        if not names:
            raise UserError(f"the recipe {recipe.name!r} has no {block}")
        for name in names:
            if name == "model" or not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"{block}.{name}: not a usable name; use letters, digits, `_`, `-` and `.` (and not `model`, which "
                    f"means the recipe's checkpoint)"
                )
    for name, stage in recipe.stages.items():
        for key, source in data_sources(stage):
            _one_source(source, f"stages.{name}.{key}")
        if stage.kind in ("sft", "distill") and not stage.data:
            raise UserError(f"stages.{name}.data is empty; give at least one source of rows")
        if stage.kind == "grpo":
            if not stage.mix:
                raise UserError(f"stages.{name}.mix is empty; give at least one task")
            if min(entry.start for entry in stage.mix) > 0:
                raise UserError(f"stages.{name}.mix: every entry starts late, so the first steps have no prompts")
            if recipe.checkpoint.best == "pass@1" and not stage.evaluate_every:
                raise UserError(
                    f"checkpoint.best is pass@1, which stages.{name} does not measure; set "
                    f"stages.{name}.evaluate_every, or checkpoint.best=auto"
                )
            if stage.adapters is not None and stage.reference_refresh is not None:
                raise UserError(
                    f"stages.{name}.reference_refresh cannot be kept with adapters: the reference is the base, "
                    f"which the adapters are beside; set it to null, or train all weights"
                )
            if stage.overlap == "always":
                _overlap(name, stage)


def _overlap(name: str, stage: GRPOStage) -> None:
    """Learning from groups while others are drawn, where that was asked for."""
    reasons = {
        "adapters": stage.adapters is not None and "they are merged into the weights while the sampler runs",
        "dynamic_sampling": stage.dynamic_sampling and "which groups it keeps is known when all are drawn",
        "objective.truncated_is": stage.objective.truncated_is is not None and "it is decided on before any gradient",
        "reward_model": stage.reward_model is not None and "it scores all groups together",
        "safety_model": stage.safety_model is not None and "it scores all groups together",
    }
    for key, why in reasons.items():
        if why:
            raise UserError(f"stages.{name}: overlap=always and {key} exclude each other ({why}); set overlap=auto")


def _one_source(source: DataSource, place: str) -> None:
    given = [key for key in ("stage", "task", "path") if getattr(source, key) is not None]
    if len(given) != 1:
        raise UserError(f"{place} must name exactly one of stage, task and path, not {' and '.join(given) or 'none'}")


def _known_task(recipe: RecipeConfig, task: str, place: str) -> None:
    if task not in recipe.tasks:
        near = nearest(task, list(recipe.tasks))
        raise UserError(f"{place} uses the task {task!r}, which is none{near}; tasks are {', '.join(recipe.tasks)}")


# -- what stages ask of tasks and rewards --------------------------------------------------------------------------


def _abilities(recipe: RecipeConfig, name: str, tasks: Mapping[str, Task]) -> None:
    stage = recipe.stages[name]
    if stage.kind == "pretrain":
        _split(recipe, name)
        _needs(tasks[stage.task], "corpus", "documents to pretrain on", f"stages.{name}.task", tasks)
        for task in tasks.values():
            if task.words() is None:
                raise UserError(
                    f"stages.{name} builds a tokenizer of the tasks' words, but the task {task.name!r} has open text: "
                    f"start from a checkpoint (from: model) instead"
                )
    if stage.kind == "reward_model":
        _needs(tasks[stage.task], "preferences", "preference pairs", f"stages.{name}.task", tasks)
    for key, source in data_sources(stage):
        if source.task is not None:
            _needs(tasks[source.task], "examples", "written solutions", f"stages.{name}.{key}.task", tasks)
    for protocol in protocols(recipe, name):
        judged = tasks[protocol.task or next(iter(tasks))]
        if judged.verifier is None:
            raise UserError(
                f"stages.{name} is evaluated on the task {judged.name!r}, where no answer is right or wrong; name "
                f"another in evaluation.task (its own measures are for evaluation.general)"
            )
        if protocol.general is not None:
            _needs(tasks[protocol.general], "measure", "measures of its own", "evaluation.general", tasks)


def _split(recipe: RecipeConfig, name: str) -> None:
    if recipe.parallel.tensor > 1:
        from r1fast.model.tensor_parallel import check_split

        check_split(recipe.stages[name].shape, recipe.parallel.tensor, f"stages.{name}.shape")


def _needs(task: Task, ability: str, what: str, place: str, tasks: Mapping[str, Task]) -> None:
    def has(some: Task) -> bool:
        return getattr(type(some), ability, None) not in (None, getattr(task_kinds.Task, ability))

    if not has(task):
        others = [other.name for other in tasks.values() if has(other)]
        known = f"tasks here that have: {', '.join(others)}" if others else "no task of this recipe has"
        raise UserError(f"{place}: the task {task.name!r} has no {what}; {known}")


def protocols(recipe: RecipeConfig, name: str) -> list[EvaluationConfig]:
    """The evaluation that a stage is put through, if any."""
    stage = recipe.stages[name]
    own = getattr(stage, "protocol", None)
    return [own] if own else [recipe.evaluation] if uses_evaluation(stage) else []


def _rewards(recipe: RecipeConfig, name: str, tasks: Mapping[str, Task]) -> None:
    stage = recipe.stages[name]
    asked: list[tuple[str, str, str]] = []  # reward, place, task
    if stage.kind == "grpo":
        for index, entry in enumerate(stage.mix):
            place = f"stages.{name}.mix.{index}.rewards"
            if not entry.rewards:
                raise UserError(f"{place} is empty; give at least one reward")
            asked += [(reward, place, entry.task) for reward in entry.rewards]
    if stage.kind == "reject":
        asked = [(reward, f"stages.{name}.require", stage.task) for reward in stage.require]
    for reward, place, task in asked:
        if reward in MODEL_REWARDS:
            key = MODEL_REWARDS[reward]
            if getattr(stage, key, None) is None:
                raise UserError(f"{place}: {reward!r} asks a reward model; name its stage in {key}")
            if reward == "safety" and recipe.stages[stage.safety_model].objective != "pointwise":
                raise UserError(
                    f"stages.{name}.safety_model: {stage.safety_model!r} compares pairs; safety asks a model of single "
                    f"responses, so set stages.{stage.safety_model}.objective=pointwise"
                )
        elif reward == "accuracy":
            if tasks[task].verifier is None:
                raise UserError(f"{place}: accuracy needs right answers, and the task {task!r} has none")
        else:
            _known_reward(reward, place)
            if reward == "length" and tasks[task].verifier is None:
                raise UserError(f"{place}: `length` rewards short right answers, and the task {task!r} has none")
            if reward == "language" and not all("language" in p.meta for p in tasks[task].problems("train", 1)):
                raise UserError(f"{place}: the task {task!r} does not say its language; leave `language` out")


def _verifiers(recipe: RecipeConfig, tasks: Mapping[str, Task]) -> None:
    """Every reward that the run will ask must be usable on this machine."""
    asked: dict[str | None, str] = {}
    for name, stage in recipe.stages.items():
        asked.update({tasks[task].verifier: f"tasks.{task}" for task in tasks_of(recipe, stage)})
        for entry in getattr(stage, "mix", ()):
            asked.update(dict.fromkeys(entry.rewards, f"stages.{name}.mix"))
    for reward, place in asked.items():
        if reward in rewards.names() and (why := rewards.get(reward).why_not()) is not None:
            raise UserError(f"{place}: {why}")


def _known_reward(reward: str, place: str) -> None:
    known = ["accuracy", *MODEL_REWARDS, *rewards.names()]
    if reward not in known:
        near = nearest(reward, known)
        raise UserError(f"{place}: no reward {reward!r}{near}; rewards are {', '.join(known)}")


# -- files and checkpoints ------------------------------------------------------------------------------------------


def start_folders(recipe: RecipeConfig) -> Iterator[tuple[str, str | None]]:
    """(stage, folder) of every stage that starts from outside the run; None where model.path is not set."""
    for name, stage in recipe.stages.items():
        start = getattr(stage, "from_", None)
        if start is not None and start not in recipe.stages:
            yield name, recipe.model.path if start == "model" else start


def _starts(recipe: RecipeConfig, need_inputs: bool) -> None:
    for name, stage in recipe.stages.items():
        if need_inputs and stage.kind == "distill" and stage.teacher == stage.from_:
            raise UserError(
                f"stages.{name}: teacher and student are both {stage.from_!r}; give the student's folder: "
                f"stages.{name}.from=DIR"
            )
    seen: set[str] = set()
    for name, folder in start_folders(recipe):
        if folder is None:
            if need_inputs:
                raise UserError(
                    f"stage {name!r} starts from `model`, but model.path is not set; give the folder of a Llama, "
                    f"Qwen2/2.5 or Qwen3 checkpoint: model.path=DIR"
                )
            continue
        if folder in seen:
            continue
        seen.add(folder)
        from r1fast.model.tensor_parallel import check_split
        from r1fast.model.weights import load_tokenizer, read_config

        config = read_config(Path(folder))
        check_split(config, recipe.parallel.tensor, folder)
        if not any(Path(folder).glob("*.safetensors")):
            raise UserError(f"{folder}: no *.safetensors file in it, so it is no complete checkpoint")
        if load_tokenizer(folder) is None:
            raise UserError(f"{folder}: no tokenizer in it; save the checkpoint's tokenizer beside it")
        if config.max_positions < recipe.model.max_length:
            raise UserError(
                f"model.max_length is {recipe.model.max_length}, but the checkpoint {folder} has "
                f"{config.max_positions} positions; lower model.max_length"
            )


def _files(recipe: RecipeConfig) -> None:
    for name, stage in recipe.stages.items():
        for key, source in data_sources(stage):
            if source.path is None:
                continue
            if not Path(source.path).is_file():
                raise UserError(f"stages.{name}.{key}.path: no file {source.path}")
            from r1fast.stages.inputs import read_rows

            read_rows(Path(source.path))


# -- lengths ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """One place of the recipe where prompts of a task are sampled from."""

    place: str
    stage: str
    task: str
    split: str
    sampling: SamplingConfig


def uses(recipe: RecipeConfig) -> list[Use]:
    found = []
    for name, stage in recipe.stages.items():
        if stage.kind == "grpo":
            found += [Use(f"stages.{name}.sampling", name, entry.task, "train", stage.sampling) for entry in stage.mix]
        if stage.kind == "reject":
            found.append(Use(f"stages.{name}.sampling", name, stage.task, "train", stage.sampling))
        for protocol in protocols(recipe, name):
            place = f"stages.{name}.protocol.sampling" if getattr(stage, "protocol", None) else "evaluation.sampling"
            for task in filter(None, (protocol.task or next(iter(recipe.tasks)), protocol.general)):
                found.append(Use(place, name, task, "test", protocol.sampling))
    return found


def _lengths(recipe: RecipeConfig) -> None:
    longest = recipe.model.max_length
    for name, stage in recipe.stages.items():
        if stage.kind == "pretrain" and stage.shape.max_positions < longest:
            raise UserError(
                f"model.max_length is {longest}, but stages.{name}.shape.max_positions is {stage.shape.max_positions}; "
                f"raise the latter"
            )
    for use in uses(recipe):
        if use.sampling.max_tokens >= longest:
            raise UserError(
                f"{use.place}.max_tokens is {use.sampling.max_tokens}, which leaves no room for a prompt in "
                f"model.max_length {longest}; lower it or raise model.max_length"
            )


def _prompts(recipe: RecipeConfig, tasks: Mapping[str, Task]) -> None:
    """Reads the problems of every task that is sampled from, and compares the longest prompts with the room left."""
    encoders: dict[str, Encoder] = {}
    lengths: dict[tuple[str, str, Encoder], tuple[int, str]] = {}
    for use in uses(recipe):
        if isinstance(tasks[use.task], Unread):
            continue
        start = root(recipe, use.stage)
        if start not in encoders:
            encoders[start] = encoder(recipe, start)
        key = (use.task, use.split, encoders[start])
        if key not in lengths:
            lengths[key] = _longest_prompt(tasks[use.task], use.split, encoders[start])
        length, problem = lengths[key]
        room = recipe.model.max_length - use.sampling.max_tokens
        if length > room:
            raise UserError(
                f"prompt {problem!r} of task {use.task!r} has {length} tokens, but model.max_length "
                f"{recipe.model.max_length} less {use.place}.max_tokens {use.sampling.max_tokens} leaves {room}: raise "
                f"the one or lower the other"
            )


def _longest_prompt(task: Task, split: str, encode: Encoder) -> tuple[int, str]:
    """(tokens, problem id) of a split's longest prompt, looked for among the longest by characters."""
    problems = task.problems(split, None if task.reads_rows else _MADE)
    if not problems:
        raise UserError(f"task {task.name!r} has no {split} problems; give it more data")
    longest = sorted(problems, key=lambda p: len(p.text), reverse=True)[:_LONGEST]
    return max((encode(problem.text), problem.id) for problem in longest)


class Encoder:
    """Tokens of a prompt in the model that a stage samples from: by its checkpoint's tokenizer; by words for a model
    from scratch; unknown (0) while model.path is not given."""

    def __init__(self, kind: str, tokenizer: Any = None):
        self.kind, self.tokenizer = kind, tokenizer

    def __call__(self, text: str) -> int:
        if self.tokenizer is not None:
            from r1fast.model.tokenizer import apply_template

            return len(apply_template(self.tokenizer, text))
        return len(text.split()) + 2 if self.kind == "words" else 0  # 2: <user> and <asst>


_WORDS = Encoder("words")


def root(recipe: RecipeConfig, stage: str) -> str:
    """Where a stage's weights come from in the end: the name of a pretrain stage, `model`, or a folder."""
    while stage in recipe.stages and recipe.stages[stage].kind != "pretrain":
        stage = recipe.stages[stage].from_
    return stage


def encoder(recipe: RecipeConfig, start: str) -> Encoder:
    """For models whose weights come from `start` (see root)."""
    if start in recipe.stages:
        return _WORDS
    folder = recipe.model.path if start == "model" else start
    if folder is None:
        return Encoder("unknown")
    from r1fast.model.tokenizer import set_template
    from r1fast.model.weights import load_tokenizer

    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, recipe.model.template)
    return Encoder("tokenizer", tokenizer)
