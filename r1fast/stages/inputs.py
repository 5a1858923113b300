"""What a stage starts from: a checkpoint, encoded prompts, supervised rows. The one place where `from:` and `data:`
of a recipe become objects, so that every stage reads its inputs the same way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from r1fast.config import UserError
from r1fast.learn.packing import Row, row_from_example
from r1fast.model.sharding import shard
from r1fast.model.tensor_parallel import peers
from r1fast.model.tokenizer import apply_templates, decode, encode_completions, eos_token_ids, set_template
from r1fast.model.weights import load
from r1fast.parallel import ranks_here, world
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.stages.steps import RandomState
from r1fast.tasks.rows import read_jsonl
from r1fast.types import Example, Problem, Prompt, RolloutGroup

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from r1fast.model.decoder import Decoder
    from r1fast.schema import DataSource, SamplingConfig
    from r1fast.stages.context import StageContext
    from r1fast.tasks import Task


def checkpoint_path(ctx: StageContext, source: str) -> Path:
    """The folder that `from: source` means: the recipe's model, an earlier stage's checkpoint, or a path."""
    if source == "model":
        if ctx.recipe.model.path is None:
            raise UserError(f"stage {ctx.name!r} starts from the recipe's model, but model.path is not set")
        return Path(ctx.recipe.model.path)
    if source in ctx.artifacts:
        return ctx.artifacts[source] / "checkpoint"
    return Path(source)


def start_model(ctx: StageContext, source: str, spreads: bool = False) -> tuple[Decoder, PreTrainedTokenizerBase]:
    """The model and tokenizer of `from: source`, on the run's device, in the recipe's chat template.

    spreads: whether the stage will `spread` it; then it waits for that on the CPU where its weights will be split."""
    device = "cpu" if spreads and splits(ctx) else ctx.device
    model, tokenizer = load(checkpoint_path(ctx, source), device=device, dtype=ctx.dtype, tensor=peers())
    template = ctx.recipe.model.template
    if source not in ctx.artifacts and template != "checkpoint":
        set_template(tokenizer, template)
    return model, tokenizer


def splits(ctx: StageContext) -> bool:
    """Whether weights that are trained are split over the ranks."""
    return world().size > 1 and ctx.recipe.parallel.shard != "none"


def spread(ctx: StageContext, model: nn.Module) -> None:
    """Splits the weights over the ranks where the recipe asks for it; they are on the run's device then."""
    if splits(ctx):
        shard(model, ranks_here() if ctx.recipe.parallel.shard == "node" else None, ctx.device)


def encode_problems(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, max_length: int, sampling: SamplingConfig
) -> list[Prompt]:
    """Prompts that leave room for `max_tokens` in the context.

    Raises UserError naming the first that does not: a silently dropped prompt would change what is measured."""
    room = max_length - sampling.max_tokens
    encoded = apply_templates(tokenizer, [problem.text for problem in problems])
    prompts = [
        Prompt(id=p.id, tokens=tokens, text=p.text, answer=p.answer, task=p.task, meta=p.meta)
        for p, tokens in zip(problems, encoded, strict=True)
    ]
    for prompt in prompts:
        if len(prompt.tokens) > room:
            raise UserError(
                f"prompt {prompt.id!r} of task {prompt.task!r} has {len(prompt.tokens)} tokens, but model.max_length "
                f"{max_length} less max_tokens {sampling.max_tokens} leaves {room}: raise "
                f"model.max_length or lower sampling.max_tokens"
            )
    return prompts


def sampling_params(config: SamplingConfig, n: int, seed: int, **changes) -> SamplingParams:
    """The sampler's parameters for `n` samples of each prompt under a recipe's sampling block."""
    values = {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
    }
    return SamplingParams(n=n, seed=seed, **(values | changes))


def sample_texts(
    sampler: Sampler,
    prompts: list[Prompt],
    params: SamplingParams | list[SamplingParams],
    tokenizer: PreTrainedTokenizerBase,
) -> list[RolloutGroup]:
    """Sampled groups, in the order of the prompts, with each completion's text filled in."""
    return [with_texts(group, tokenizer) for group in sampler.sample(prompts, params)]


def with_texts(group: RolloutGroup, tokenizer: PreTrainedTokenizerBase) -> RolloutGroup:
    """The group with its completions' texts filled in."""
    return replace(group, rollouts=[replace(r, text=decode(tokenizer, r.tokens)) for r in group.rollouts])


def sampler_for(model: Decoder, tokenizer: PreTrainedTokenizerBase, max_seqs: int = 512) -> Sampler:
    """A sampler that reads the model's own weight tensors and stops where the tokenizer's sequences end."""
    return Sampler(model, eos_token_id=eos_token_ids(tokenizer, model.config.eos_token_ids), max_seqs=max_seqs)


class PromptStream:
    """Training prompts of one task without end: seeded epochs, each in an order of its own."""

    def __init__(self, ctx: StageContext, task: Task, tokenizer, sampling: SamplingConfig, count: int, seed: int):
        problems = task.problems("train", count, seed)
        if not problems:
            raise UserError(f"task {task.name!r} gives no training problems for stage {ctx.name!r}")
        self._prompts = encode_problems(problems, tokenizer, ctx.recipe.model.max_length, sampling)
        self._random = Random(seed)
        self._order: list[int] = []

    def state_dict(self) -> dict:
        return {"random": RandomState(self._random).state_dict(), "order": list(self._order)}

    def load_state_dict(self, state: dict) -> None:
        RandomState(self._random).load_state_dict(state["random"])
        self._order = list(state["order"])

    def take(self, count: int) -> list[Prompt]:
        taken: list[Prompt] = []
        while len(taken) < count:
            if not self._order:
                self._order = list(range(len(self._prompts)))
                self._random.shuffle(self._order)
            taken.append(self._prompts[self._order.pop()])
        return taken


def read_rows(path: Path) -> list[Example]:
    """Supervised rows of a JSONL file with `prompt` and `completion`; a bad line is named by file and number."""
    rows: list[Example] = []
    for row, where in read_jsonl(path):
        for key, kind, needed in (
            ("prompt", str, True),
            ("completion", str, True),
            ("task", str, False),
            ("meta", dict, False),
        ):
            if (needed or key in row) and not isinstance(row.get(key), kind):
                what = "text" if kind is str else "an object"
                raise UserError(f"{where}: not a row with `prompt` and `completion`: {key!r} must be {what}")
        task, meta = row.get("task", path.stem), row.get("meta", {})
        rows.append(Example(prompt=row["prompt"], completion=row["completion"], task=task, meta=meta))
    return rows


def write_rows(path: Path, rows: list[Example]) -> None:
    if not world().first:  # every rank holds the same rows
        return
    lines = (
        json.dumps(
            {"prompt": r.prompt, "completion": r.completion, "task": r.task, "meta": dict(r.meta)}, ensure_ascii=False
        )
        for r in rows
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def collect_examples(ctx: StageContext, sources: list[DataSource], seed: int) -> list[Example]:
    """The rows of every source, in the recipe's order; a source's `limit` takes a seeded sample of it."""
    collected: list[Example] = []
    for index, source in enumerate(sources):
        if source.stage is not None:
            rows = read_rows(ctx.artifacts[source.stage] / "rows.jsonl")
        elif source.path is not None:
            rows = read_rows(Path(source.path))
            if not rows:
                raise UserError(f"{source.path} holds no rows")
        else:
            rows = ctx.tasks[source.task].examples(source.limit, seed + index)
        if source.limit is not None and len(rows) > source.limit:
            rows = Random(seed + index).sample(rows, source.limit)
        collected += rows
    if not collected:
        raise UserError(f"stage {ctx.name!r} has no supervised rows: its `data` sources are empty")
    return collected


def encode_rows(examples: list[Example], tokenizer) -> list[Row]:
    prompts = apply_templates(tokenizer, [e.prompt for e in examples])
    completions = encode_completions(tokenizer, [e.completion for e in examples])
    return [row_from_example(p, c) for p, c in zip(prompts, completions, strict=True)]


def encode_examples(ctx: StageContext, examples: list[Example], tokenizer) -> tuple[list[Row], int]:
    """Rows for the packer and how many were left out because they exceed model.max_length (truncating would teach
    completions without an end)."""
    longest = ctx.recipe.model.max_length
    rows = [row for row in encode_rows(examples, tokenizer) if len(row.tokens) <= longest]
    if not rows:
        raise UserError(
            f"stage {ctx.name!r}: all {len(examples)} rows are longer than model.max_length {longest}; raise it"
        )
    return rows, len(examples) - len(rows)


def example_stream(examples: Iterator[Example], tokenizer, chunk: int = 64) -> Iterator[Row]:
    """Encoded rows of an endless corpus."""
    while True:
        yield from encode_rows(list(islice(examples, chunk)), tokenizer)
