"""What a run would do, without doing it: the stages in order, what each reads, how many prompts and tokens, and an
estimate of the memory it needs. Printed by --dry-run; nothing is written and no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1fast.check import Unread, check, encoder, root
from r1fast.device import free_memory
from r1fast.graph import data_sources, edges, order
from r1fast.learn.memory import (
    Asked,
    Memory,
    TrainingPlan,
    cache_bytes,
    plan_training,
    readable_bytes,
    working_bytes,
)
from r1fast.model.recall import recalls
from r1fast.parallel import shards
from r1fast.recipe import resolve_device

if TYPE_CHECKING:
    from r1fast.model.decoder_config import DecoderConfig
    from r1fast.schema import DataSource, RecipeConfig, Stage
    from r1fast.tasks import Task

SPREAD = ("pretrain", "sft", "reward_model", "distill", "grpo")  # stages whose model parallel.shard splits
SAMPLER_SEQUENCES = 512  # sequences decoded together at most (stages/inputs.py), for the size of the KV cache
_TYPICAL = 256  # problems of a task whose prompts are encoded for its mean prompt length


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One line of the plan. Counts are upper bounds where a stage decides as it goes; None: not known yet."""

    name: str
    kind: str
    reads: str
    work: str
    tokens: float | None
    memory: Memory | None
    training: TrainingPlan | None = None  # None where nothing is trained


def plan(recipe: RecipeConfig) -> list[StagePlan]:
    """The plan of every stage, in the order they would run; raises UserError for what `run` would raise at once, except
    that model.path and data may be missing yet (what depends on them is then unknown)."""
    tasks = check(recipe, need_inputs=False)
    planner = _Planner(recipe, tasks, *resolve_device(recipe))
    return [planner.stage(name) for name in order(recipe)]


class _Planner:
    """Estimates that several stages share, computed once: prompt lengths, model shapes, row counts."""

    def __init__(self, recipe: RecipeConfig, tasks: Mapping[str, Task], device: str, dtype: str):
        self.recipe, self.tasks, self.device = recipe, tasks, device
        self.width, self.free = 2 if dtype == "bfloat16" else 4, free_memory(device)
        self._prompts: dict[tuple[str, str], float] = {}
        self._shapes: dict[str, tuple[DecoderConfig, int] | None] = {}
        self._edges = edges(recipe)

    def stage(self, name: str) -> StagePlan:
        stage = self.recipe.stages[name]
        work, tokens = getattr(self, f"_{stage.kind}")(name, stage)
        return StagePlan(name, stage.kind, self._reads(name, stage), work, tokens, *self._memory(name, stage))

    def _reads(self, name: str, stage: Stage) -> str:
        start = getattr(stage, "from_", None)
        found = [f"from {start}"] if start else ["from scratch"]
        found += [f"{e.kind} {e.source}" for e in self._edges if e.target == name and e.kind != "from"]
        found += [f"rows of {s.task or s.path}" for _, s in data_sources(stage) if s.stage is None]
        return ", ".join(dict.fromkeys(found))

    # -- work: (in words, tokens) ---------------------------------------------------------------------------------

    def _pretrain(self, name: str, stage: Any) -> tuple[str, float | None]:
        return f"{stage.steps:,} steps of {stage.batch_tokens:,} tokens", stage.steps * stage.batch_tokens

    def _sft(self, name: str, stage: Any) -> tuple[str, float | None]:
        rows = sum(self._rows(source) for _, source in data_sources(stage))
        steps = max(1, math.ceil(stage.epochs * rows / stage.batch_examples))
        work = f"up to {rows:,} rows x {stage.epochs:g} epochs, {steps:,} steps of {stage.batch_examples}"
        return work, stage.epochs * rows * self.recipe.model.max_length

    _distill = _sft

    def _grpo(self, name: str, stage: Any) -> tuple[str, float | None]:
        prompts = stage.steps * stage.prompts_per_step
        rollouts = prompts * stage.group_size
        lengths = [self._prompt(name, entry.task) for entry in stage.mix]
        rounds = f", up to {stage.dynamic_rounds} draws" if stage.dynamic_sampling else ""
        work = f"{stage.steps:,} steps of {stage.prompts_per_step} prompts x {stage.group_size} samples{rounds}"
        if None in lengths:
            return work, None
        mean = sum(e.share * n for e, n in zip(stage.mix, lengths, strict=True)) / sum(e.share for e in stage.mix)
        return work, rollouts * (mean + stage.sampling.max_tokens)

    def _reject(self, name: str, stage: Any) -> tuple[str, float | None]:
        work = f"{stage.prompts:,} prompts x {stage.samples} samples, keep up to {stage.keep_per_prompt} each"
        length = self._prompt(name, stage.task)
        count = stage.prompts * stage.samples
        return work, None if length is None else count * (length + stage.sampling.max_tokens)

    def _reward_model(self, name: str, stage: Any) -> tuple[str, float | None]:
        seen = stage.pairs * stage.epochs
        return f"{stage.pairs:,} pairs x {stage.epochs:g} epochs", 2 * seen * self.recipe.model.max_length

    def _evaluate(self, name: str, stage: Any) -> tuple[str, float | None]:
        how = stage.protocol or self.recipe.evaluation
        length = self._prompt(name, how.task or next(iter(self.recipe.tasks)))
        count = how.limit * (how.samples + how.at_one + how.greedy)
        return f"{how.limit:,} problems x {how.samples} samples", (
            None if length is None else count * (length + how.sampling.max_tokens)
        )

    def _rows(self, source: DataSource) -> int:
        """Most rows that a source can give."""
        if source.stage is not None:
            stage = self.recipe.stages[source.stage]
            rows = stage.prompts * min(stage.samples, stage.keep_per_prompt)
            rows += sum(self._rows(general) for general in stage.general)
        elif source.path is not None:
            with open(source.path, "rb") as file:
                rows = sum(1 for line in file if line.strip())
        elif source.limit is not None:
            rows = source.limit
        elif isinstance(self.tasks[source.task], Unread):
            rows = 0
        else:
            rows = len(self.tasks[source.task].examples())
        return min(rows, source.limit or rows)

    def _prompt(self, name: str, task: str) -> float | None:
        """Mean tokens of a prompt, template included; None where no tokenizer is known yet."""
        start = root(self.recipe, name)
        key = (start, task)
        if key not in self._prompts:
            encode = encoder(self.recipe, start)
            lengths = [encode(problem.text) for problem in self.tasks[task].problems("train", _TYPICAL)]
            self._prompts[key] = sum(lengths) / max(1, len(lengths))
        return self._prompts[key] or None

    # -- memory ---------------------------------------------------------------------------------------------------

    def _memory(self, name: str, stage: Stage) -> tuple[Memory | None, TrainingPlan | None]:
        """As the stage itself will find them (stages/fitting.py), where the machine is as free then as it is now."""
        shape = self._shape(root(self.recipe, name))
        if shape is None:
            return None, None
        config, parameters = shape
        longest, lora = self.recipe.model.max_length, getattr(stage, "adapters", None)
        split = shards(self.recipe.parallel.shard) if stage.kind in SPREAD else 1
        weights = self._weights(stage, parameters, split)
        sequences = SAMPLER_SEQUENCES
        if stage.kind == "grpo" and not stage.evaluate:
            sequences = min(sequences, stage.prompts_per_step * stage.group_size)
        samples = stage.kind in ("grpo", "reject", "evaluate") or stage.evaluate
        cache = cache_bytes(config, sequences, longest, self.width) if samples else 0.0
        if stage.kind in ("reject", "evaluate"):
            return Memory(weights=weights, cache=cache), None
        tokens = getattr(stage, "micro_batch_tokens", getattr(stage, "batch_tokens", None))
        states, whole = stage.optimizer.states, parameters * self.width
        if lora is not None:
            from r1fast.model.lora import adapter_parameters

            parameters = adapter_parameters(config, lora)
        asked = Asked(tokens, getattr(stage, "recompute", False), None if states == "auto" else states)
        found = plan_training(
            config,
            asked,
            trained=parameters,
            width=self.width,
            free=self.free - weights,
            device=self.device,
            longest=longest,
            cache=cache,
            weights=weights,
            shards=split,
            gathered=whole if split > 1 and samples else 0.0,
            working=working_bytes(config, self.width, trained=lora is None) if split > 1 else 0.0,
            recall=recalls(self.device, self.recipe.parallel.tensor > 1),
        )
        return found.memory, found

    def _weights(self, stage: Stage, parameters: int, split: int) -> float:
        """Bytes of all models of a stage on one rank. Trained shares are float32: they are the masters."""
        trained = 4 if split > 1 and getattr(stage, "adapters", None) is None else self.width
        found = parameters * trained / split
        if stage.kind == "grpo":
            found += parameters * self.width / split * (stage.objective.kl_coef > 0 and stage.adapters is None)
            asked = sum(model is not None for model in (stage.reward_model, stage.safety_model))
            found += parameters * self.width * asked
        return found

    def _shape(self, start: str) -> tuple[DecoderConfig, int] | None:
        """(configuration, parameters) of the models that descend from `start`; of what a rank has of them."""
        if start not in self._shapes:
            self._shapes[start] = self._read_shape(start)
        return self._shapes[start]

    def _read_shape(self, start: str) -> tuple[DecoderConfig, int] | None:
        from r1fast.model.decoder_config import DecoderConfig
        from r1fast.model.tensor_parallel import part_of
        from r1fast.model.tokenizer import SPECIALS
        from r1fast.model.weights import read_config

        if start in self.recipe.stages:
            words = {word for task in self.tasks.values() for word in task.words()}
            shape = self.recipe.stages[start].shape.model_dump()
            config = DecoderConfig(vocab_size=len(words | set(SPECIALS)), **shape)
        else:
            folder = self.recipe.model.path if start == "model" else start
            if folder is None:
                return None
            config = read_config(Path(folder))
        config = part_of(config, self.recipe.parallel.tensor)
        return config, parameter_count(config)


def parameter_count(config: DecoderConfig) -> int:
    """Exactly, from the decoder itself laid out on no device."""
    import torch

    from r1fast.model.decoder import Decoder

    return sum(p.numel() for p in Decoder(config, "meta", torch.float32).parameters())


# -- printing -----------------------------------------------------------------------------------------------------


def readable_count(count: float | None) -> str:
    if count is None:
        return "?"
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.0f}{unit}" if count >= 10 or not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def print_plan(recipe: RecipeConfig, out: str) -> None:
    """The plan as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    stages = plan(recipe)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    grid = Table(title=f"plan of {recipe.name} (seed {recipe.seed}) in {out}", title_justify="left")
    for column in ("stage", "kind", "reads", "work"):
        grid.add_column(column)
    for column in ("tokens", "weights", "training", "KV cache", "activations", "memory"):
        grid.add_column(column, justify="right", no_wrap=True)
    for row in stages:
        memory = row.memory
        parts = ["?"] * 5
        if memory is not None:
            parts = [memory.weights, memory.training, memory.cache, memory.activations, memory.total]
            parts = [readable_bytes(part) for part in parts]
        tokens = readable_count(row.tokens)
        grid.add_row(row.name, row.kind, row.reads, row.work, tokens, *parts)
    console.print(grid)
    for row in stages:
        found = row.training
        told = found is not None and (found.memory.gathered or found.recompute or found.states == "bfloat16")
        if told or (found is not None and not found.fits):
            console.print(f"{row.name}: {found.told()}")
    console.print(
        "tokens: at most, prompts and completions at their longest; memory: an estimate, at its greatest. Nothing was "
        "written."
    )
    if (ranks := shards(recipe.parallel.shard)) > 1:
        console.print(
            f"parallel.shard={recipe.parallel.shard}: memory is that of each of the {ranks} ranks that hold shares of "
            f"a model that is trained; models that only sample or score are whole on every rank."
        )
    if (ranks := recipe.parallel.tensor) > 1:
        console.print(
            f"parallel.tensor={ranks}: memory is that of each of the {ranks} ranks that hold a model together: its "
            f"heads, inner units and words, and their keys and values; norms are on every rank."
        )
    if any(row.memory is None or row.tokens is None for row in stages):
        console.print("? is not known yet: give model.path=DIR (a Hugging Face folder) and data=FILE.")
