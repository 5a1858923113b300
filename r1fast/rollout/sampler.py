"""Completions of prompts from the trainer's own weights: paged, batched continuously, a group's prompt computed once.

A call is a loop of two kinds of step, in turn where there is work for both: one forwards up to `prefill_tokens` tokens
of the prompts that the scheduler admits and launches the samples of each completed prompt from its last row of logits;
the other decodes one token of every running sequence.

Draws. Sample s of a prompt draws token t from noise keyed by (seed, prompt, s, t), where `prompt` names the prompt's
tokens (and, among equal prompts of one seed in a call, which of them it is). So a request's tokens depend neither on
what else is in the call or batch, nor on chunks, preemptions or the size of the pool; its log-probabilities may differ
in the last bits, as products of other shapes round differently.

Memory. The pool holds `kv_blocks` blocks, or, where that is None, enough for `max_seqs` sequences of the call's longest
prompt and completion without any sharing, but at most half of the memory that is free when it is made (and never less
than the longest request needs); with less than everybody's need, sequences are preempted and computed again. Buffers
are kept between calls and only ever replaced by larger ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from r1fast.config import UserError
from r1fast.heap import keep_freed_memory
from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV, PagedStep
from r1fast.rollout.batch import Drawn, RunningBatch
from r1fast.rollout.engine import Engine, PrefillWork, StepEngine
from r1fast.rollout.kv_cache import BlockPool
from r1fast.rollout.scheduler import Chunk, Request, Scheduler
from r1fast.types import Prompt, Rollout, RolloutGroup

_DRAWS = ("limit", "stop_set", "seed", "key", "temperature", "top_k", "top_p")  # what a prompt tells its rows
_SAMPLE_BITS = 20  # of the 63-bit sequence key; the rest names the prompt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw completions of one prompt."""

    n: int = 1  # samples
    max_tokens: int = 128  # for each sample; also ended by the model's context
    temperature: float = 1.0  # 0: greedy, with log-probabilities of the untempered softmax
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # besides the sampler's eos


@dataclass(slots=True)
class _Call:
    """What one call holds until its last group is out; every list has one entry for each prompt."""

    prompts: list[Prompt]
    requests: list[Request] = field(default_factory=list)
    draws: list[tuple[int | float, ...]] = field(default_factory=list)  # in the order of _DRAWS
    rollouts: list[list[Rollout | None]] = field(default_factory=list)
    stop_sets: dict[tuple[int, ...], int] = field(default_factory=dict)  # the distinct sets of stop tokens -> row
    scheduler: Scheduler | None = None
    weights_version: int = -1

    def stops(self, vocabulary: int) -> NDArray[np.bool_]:
        """bool [stop sets, V]: which tokens end a sequence of each set."""
        stops = np.zeros((len(self.stop_sets), vocabulary), bool)
        for ids, row in self.stop_sets.items():
            stops[row, list(ids)] = True
        return stops


class Sampler:
    """Draws completions from `model`. One call at a time; see the module for what it promises."""

    def __init__(
        self,
        model: Decoder,
        eos_token_id: int | Iterable[int] | None = None,
        max_seqs: int = 256,
        kv_blocks: int | None = None,
        block_size: int = 16,
        prefill_tokens: int = 8192,
    ):
        """max_seqs: sequences that decode together. prefill_tokens: most prompt tokens forwarded in one step.

        Raises UserError for sizes below 1 or an eos token outside the vocabulary.
        """
        for name, value in (("max_seqs", max_seqs), ("block_size", block_size), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise UserError(f"sampler: {name} is {value}, it must be at least 1")
        if kv_blocks is not None and kv_blocks < 1:
            raise UserError(f"sampler: kv_blocks is {kv_blocks}, it must be at least 1, or None to size it by the call")
        if model.device.type == "cpu":
            keep_freed_memory()
        self.model = model
        ids = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self.eos_token_ids = _stop_tokens(ids, model.config.vocab_size, "sampler: eos_token_id")
        self.max_seqs, self.block_size, self.prefill_tokens = max_seqs, block_size, prefill_tokens
        self.kv_blocks = kv_blocks
        self.preemptions = 0  # in the last call
        self.engine: Engine = StepEngine(model)
        self._pool: BlockPool | None = None
        self._kv: PagedKV | None = None
        self._batch: RunningBatch | None = None
        self._busy = False

    # -- the public calls ----------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        on_group: Callable[[int, RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]:
        """One group of `params.n` rollouts for each prompt, in the order of the prompts.

        prompts: token ids, or Prompt objects (kept in the groups). params: one for all, or one for each prompt.
        on_group(index of the prompt, group) is called as each group finishes. Raises UserError before any work when a
        request is invalid, naming it.
        """
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        for index, group in self.stream(prompts, params):
            groups[index] = group
            if on_group is not None:
                on_group(index, group)
        return groups

    def stream(
        self, prompts: Sequence[Sequence[int]] | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """(index of the prompt, group) as soon as all of a prompt's samples are done; see `sample`.

        The weights must not change before the last group is out: RuntimeError.
        """
        return self._groups(self._read(prompts, params))

    def _groups(self, call: _Call) -> Iterator[tuple[int, RolloutGroup]]:
        for finished in self._run(call):
            for index in finished:
                yield index, RolloutGroup(call.prompts[index], call.rollouts[index], call.weights_version)

    def stream_tokens(self, prompt: Sequence[int] | Prompt, params: SamplingParams) -> Iterator[int]:
        """The tokens of one sample as they are drawn. UserError unless params.n is 1."""
        if params.n != 1:
            raise UserError(f"streaming tokens needs n=1, got n={params.n}")
        return self._tokens(self._read([prompt], params))

    def _tokens(self, call: _Call) -> Iterator[int]:
        sent = 0
        for finished in self._run(call):
            running = self._batch.size
            tokens = call.rollouts[0][0].tokens if finished else self._batch.output(0)[0] if running else []
            yield from tokens[sent:]
            sent = max(sent, len(tokens))

    # -- one call --------------------------------------------------------------------------------------------------

    def _read(self, prompts, params) -> _Call:
        """Check every request; nothing is allocated or changed yet."""
        prompts, params = _as_prompts(prompts), _as_params(prompts, params)
        vocabulary, context, pool = self.model.config.vocab_size, self.model.config.max_positions, self.kv_blocks
        call, seen = _Call(prompts), {}
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            tokens, name = tuple(prompt.tokens), f"prompt {index}"
            _check(name, tokens, one, vocabulary, context)
            request = Request(index, tokens, one.n, min(one.max_tokens, context - len(tokens)))
            need = self._blocks_for(request)
            if pool is not None and need > pool:
                raise UserError(
                    f"{name}: {len(tokens)} tokens and {request.limit} to draw need {need} blocks of "
                    f"{self.block_size}, but the pool has kv_blocks={pool}; raise kv_blocks or lower max_tokens"
                )
            stops = (*self.eos_token_ids, *_stop_tokens(one.stop_token_ids, vocabulary, f"{name}: stop_token_ids"))
            stop_set = call.stop_sets.setdefault(tuple(sorted(set(stops))), len(call.stop_sets))
            same = tokens, one.seed
            earlier = seen[same] = seen.get(same, -1) + 1
            key = _key(tokens, earlier)
            draw = (request.limit, stop_set, one.seed, key, one.temperature, one.top_k, one.top_p)
            call.requests.append(request)
            call.draws.append(draw)
            call.rollouts.append([None] * one.n)
        return call

    def _run(self, call: _Call) -> Iterator[list[int]]:
        """Step until all is drawn; after each step the indices of the prompts that are finished by it."""
        if self._busy:
            raise RuntimeError("this sampler is in the middle of another call; finish or close it first")
        self._busy = True
        try:
            pool = self._make_room(call.requests)
            draws = {name: np.array(column) for name, *column in zip(_DRAWS, *call.draws, strict=True)}
            self._batch.begin(draws, call.stops(self.model.config.vocab_size), self.model.device)
            self.engine.begin(self._kv, self._batch)
            scheduler = call.scheduler = Scheduler(pool, self.max_seqs, self.prefill_tokens)
            call.weights_version = self.model.weights_version
            for request in call.requests:
                scheduler.add(request)
            chunks = []
            while not scheduler.done:
                if self.model.weights_version != call.weights_version:
                    raise RuntimeError("the model's weights changed while it was sampling; the rest is not drawn")
                chunks = [] if chunks else scheduler.plan()  # in turn: prompts do not hold up those that decode
                if chunks:
                    yield self._prefill(call, chunks)
                elif self._batch.size:
                    yield self._decode(call)
            self.preemptions = scheduler.preemptions
        except BaseException:  # KeyboardInterrupt and GeneratorExit too: no block outlives its call
            if self._pool is not None:
                self._pool.reset()
            raise
        finally:
            self._busy = False

    def _prefill(self, call: _Call, chunks: list[Chunk]) -> list[int]:
        """Forward the chunks end to end; the prompts that they complete launch and draw their first tokens."""
        batch, first, row = self._batch, self._batch.size, -1
        launched, rows, copies = [], [], []
        for chunk in chunks:
            call.scheduler.computed(chunk)
            row += chunk.stop - chunk.start
            if chunk.last:
                launched.append(chunk.prefill)
                rows.append(row)
        step = self._prefill_step(chunks)  # before the launch, which moves tables on
        for prefill in launched:
            copies += call.scheduler.launch(prefill)
        if launched:
            batch.append(launched)
        counts = [len(prefill.sequences) for prefill in launched]
        drawn = self.engine.prefill(PrefillWork(step, first, rows, counts, copies))
        return [] if drawn is None else self._record(call, drawn, first)

    def _prefill_step(self, chunks: list[Chunk]) -> PagedStep:
        size = self.block_size
        tables = np.full((len(chunks), max(len(chunk.prefill.table) for chunk in chunks)), -1, np.int32)
        tokens, positions, slots = [], [], []
        for row, chunk in enumerate(chunks):
            table = tables[row, : len(chunk.prefill.table)] = chunk.prefill.table
            position = np.arange(chunk.start, chunk.stop)
            tokens += chunk.prefill.tokens[chunk.start : chunk.stop]
            positions.append(position)
            slots.append(np.array(table)[position // size] * size + position % size)
        starts = np.cumsum([0, *(chunk.stop - chunk.start for chunk in chunks)], dtype=np.int32)
        arrays = (
            np.array(tokens, np.int64), np.concatenate(positions), np.concatenate(slots), tables,
            np.array([chunk.stop for chunk in chunks], np.int32), starts,
        )  # fmt: skip
        return PagedStep(*(torch.from_numpy(array).to(self.model.device) for array in arrays))

    def _decode(self, call: _Call) -> list[int]:
        """The next tokens of every running sequence."""
        batch, ahead = self._batch, self.engine.ahead
        if ahead > 1 and len(batch.full(ahead)) * -(-ahead // self.block_size) > call.scheduler.available:
            ahead = 1  # looking ahead is not worth a preemption
        while full := batch.full(ahead):
            self._grow(call, full)
        return self._record(call, self.engine.decode(ahead), 0) if batch.size else []

    def _grow(self, call: _Call, full: list[int]) -> None:
        """A new block for each full row; the rows preempted for it leave, with what they have drawn."""
        batch = self._batch
        preempted = call.scheduler.grow([batch.sequences[row] for row in full])
        batch.extend([row for row in full if batch.sequences[row].table])
        if preempted:
            rows = [row for row, sequence in enumerate(batch.sequences) if not sequence.table]
            for row in rows:
                sequence = batch.sequences[row]
                sequence.tokens, sequence.logprobs, sequence.logprobs_full = batch.output(row)
            batch.remove(rows)

    def _record(self, call: _Call, drawn: Drawn, first: int) -> list[int]:
        """Keep what the rows from `first` on have drawn; the prompts that are finished by it."""
        batch = self._batch
        if not np.isfinite(drawn.logprobs).all():
            # What is not a number would outlive its block: under a mask it is multiplied by zero, and stays.
            self.engine.release()
            self._kv = self._pool = None
            raise RuntimeError("the model's logits are not finite; its weights are broken, or training has diverged")
        rows = batch.record(first, drawn)
        if not rows:
            return []
        groups = []
        for row in rows:
            sequence = batch.sequences[row]
            index = sequence.request.index
            finish = "stop" if batch.stopped(row) else "length"
            tokens, logprobs, full = batch.output(row)
            call.rollouts[index][sequence.sample] = Rollout(tokens, logprobs, finish, logprobs_full=full)
            if call.scheduler.finish(sequence):
                groups.append(index)
        batch.remove(rows)
        return groups

    # -- memory ------------------------------------------------------------------------------------------------------

    def _blocks_for(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.limit) // self.block_size)

    def _make_room(self, requests: list[Request]) -> BlockPool:
        """Pool, cache and batch arrays for these requests; those of earlier calls where they are large enough."""
        size, config, device, dtype = self.block_size, self.model.config, self.model.device, self.model.dtype
        width = max(map(self._blocks_for, requests))
        rows = min(self.max_seqs, sum(request.samples for request in requests))
        blocks = self.kv_blocks
        if blocks is None:
            per_block = PagedKV.bytes_per_block(config, size, dtype)
            held = 0 if self._kv is None else self._kv.blocks
            blocks = max(width, min(width * rows, (_free_memory(device) // per_block + held) // 2), held)
        kv = self._kv
        if kv is None or kv.blocks != blocks or kv.keys.device != device or kv.keys.dtype != dtype:
            self._kv = self._pool = None  # the old one goes before the new one comes
            self._kv = PagedKV.allocate(config, blocks, size, device, dtype)
            self._pool = BlockPool(blocks, size)
        longest = max(request.limit for request in requests)
        batch = self._batch
        if batch is None or batch.rows < rows or batch.width < width or batch.longest < longest:
            old = (batch.rows, batch.width, batch.longest) if batch else (0, 0, 0)
            self._batch = RunningBatch(*map(max, old, (rows, width, longest)), size)
        return self._pool


# -- requests --------------------------------------------------------------------------------------------------------


def _as_prompts(prompts) -> list[Prompt]:
    if not len(prompts):
        raise UserError("the list of prompts is empty; give at least one")
    return [
        prompt if isinstance(prompt, Prompt) else Prompt(str(index), tuple(map(int, prompt)), "", None, "")
        for index, prompt in enumerate(prompts)
    ]


def _as_params(prompts, params) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise UserError(f"{len(params)} sampling params for {len(prompts)} prompts; give one for all, or one for each")
    return list(params)


def _check(name: str, tokens: tuple[int, ...], params: SamplingParams, vocabulary: int, context: int) -> None:
    """One sentence about the first thing that is wrong with a request."""
    wrong = None
    if not tokens:
        wrong = "it has no tokens; give at least one"
    elif not 0 <= min(tokens) <= max(tokens) < vocabulary:
        bad = next(token for token in tokens if not 0 <= token < vocabulary)
        wrong = f"token {bad} is outside the vocabulary of {vocabulary}"
    elif len(tokens) >= context:
        wrong = f"its {len(tokens)} tokens leave no room to answer in the model's context of {context}; shorten it"
    elif not 1 <= params.n < 1 << _SAMPLE_BITS:
        wrong = f"n is {params.n}, it must be from 1 to {(1 << _SAMPLE_BITS) - 1}"
    elif params.max_tokens < 1:
        wrong = f"max_tokens is {params.max_tokens}, it must be at least 1"
    elif not 0 <= params.temperature < float("inf"):
        wrong = f"temperature is {params.temperature}, it must be a number from 0 (greedy) up"
    elif not 0 < params.top_p <= 1:
        wrong = f"top_p is {params.top_p}, it must be above 0 and at most 1 (off)"
    elif not 0 <= params.top_k < 1 << 31:
        wrong = f"top_k is {params.top_k}, it must be 0 (off) or more"
    elif not -(1 << 63) <= params.seed < 1 << 63:
        wrong = f"seed {params.seed} does not fit 64 bits"
    if wrong:
        raise UserError(f"{name}: {wrong}")


def _stop_tokens(ids: Iterable[int], vocabulary: int, where: str) -> tuple[int, ...]:
    ids = tuple(ids)
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UserError(f"{where}: token {token} is outside the vocabulary of {vocabulary}")
    return ids


def _key(tokens: tuple[int, ...], earlier: int) -> int:
    """What names a prompt to the noise: its content, and how many equal prompts came before it in the call."""
    content = np.array([earlier, *tokens], np.int64).tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (1 + _SAMPLE_BITS) << _SAMPLE_BITS


def _free_memory(device: torch.device) -> int:
    """Bytes that a new allocation could take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: assume a small machine
        return 4 << 30
