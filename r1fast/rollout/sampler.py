"""Completions of prompts from the trainer's own weights: paged, batched continuously, a group's prompt computed once.

    sampler = Sampler(model, eos_token_id=2)
    groups = sampler.sample(prompts, SamplingParams(n=8))           # all of them, in order
    for index, group in sampler.stream(prompts, params): ...        # each as soon as it is finished
    with sampler.session() as session: ...                          # requests come and go: session.py

A call is a loop of two kinds of step, in turn where there is work for both: one forwards up to `prefill_tokens` tokens
of the prompts that the scheduler admits and launches the samples of each completed prompt from its last row of logits;
the other decodes every running sequence. What a step computes is the engine's (engine.py), what runs is the scheduler's
(scheduler.py), and memory and the prefix cache are memory.py's.

Draws. Sample s of a prompt draws the token at position t from noise keyed by (seed, prompt, s, t), where `prompt` names
the prompt's tokens (and, among equal prompts of one seed in a call, which of them it is). So a request's tokens depend
neither on what else is in the call or batch, nor on chunks, preemptions, cached prefixes or the size of the pool; its
log-probabilities may differ in the last bits, as products of other shapes round differently, unless `exact` is set
(exact.py).

Length bias. With `spare` samples, or with `enough` prompts, what finishes first is kept, and that is what is short:
mean length falls, and with it whatever goes with length. A sample that is given up late has also cost its decoding.
Without them nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from r1fast.config import UserError
from r1fast.heap import keep_freed_memory
from r1fast.model.decoder import Decoder
from r1fast.rollout.batch import RunningBatch
from r1fast.rollout.engine import Engine
from r1fast.rollout.events import Drew, Event, GroupDone
from r1fast.rollout.exact import ExactEngine
from r1fast.rollout.memory import KVMemory
from r1fast.rollout.params import Reader, SamplingParams, as_params, as_prompts, stop_tokens
from r1fast.rollout.session import Open, Session
from r1fast.rollout.speculation import Acceptance, engine_for
from r1fast.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sampler", "SamplingParams", "Session"]

Prompts = Sequence[Sequence[int]] | Sequence[Prompt]
OnError = Callable[[int, UserError], None]


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
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        engine: Engine | None = None,
        exact: bool = False,
    ):
        """max_seqs: sequences that decode together. kv_blocks: of the cache; None sizes it by the call and by what is
        free (memory.py). prefill_tokens: most prompt tokens forwarded in one step. tokenizer: for stop strings alone.
        engine: what computes the steps; the device's own (speculation.py) where None. exact: bit-identical
        log-probabilities whatever else is in the batch, at a price (exact.py), with an engine of its own.

        Raises UserError for sizes below 1 or an eos token outside the vocabulary.
        """
        for name, value in (("max_seqs", max_seqs), ("block_size", block_size), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise UserError(f"sampler: {name} is {value}, it must be at least 1")
        if kv_blocks is not None and kv_blocks < 1:
            raise UserError(f"sampler: kv_blocks is {kv_blocks}, it must be at least 1, or None to size it by the call")
        if model.device.type == "cpu":
            keep_freed_memory()
        ids = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        config = model.config
        self.model = model
        self.eos_token_ids = stop_tokens(ids, config.vocab_size, "sampler: eos_token_id")
        self.max_seqs, self.block_size, self.prefill_tokens = max_seqs, block_size, prefill_tokens
        if exact and engine is not None:
            raise UserError("sampler: exact comes with an engine of its own; give one of the two")
        self.engine: Engine = engine or (ExactEngine if exact else engine_for)(model)
        self.memory = KVMemory(model, block_size, kv_blocks)
        self.preemptions = 0  # in the last call
        self.found_tokens = 0  # prompt tokens of the last call that were in the cache already
        self._reader = Reader(config.vocab_size, config.max_positions, block_size, self.eos_token_ids, tokenizer)
        self._batch: RunningBatch | None = None
        self._session: Session | None = None

    # -- the public calls ----------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams],
        on_group: Callable[[int, RolloutGroup], None] | None = None,
        *,
        enough: int | None = None,
        on_error: OnError | None = None,
    ) -> list[RolloutGroup | None]:
        """One group of `params.n` rollouts for each prompt, in the order of the prompts.

        prompts: token ids, or Prompt objects (kept in the groups). params: one for all, or one for each prompt.
        on_group(index of the prompt, group) is called as each group finishes. enough: stop when so many groups are
        finished; the others are None (and short ones come first: see the module). Raises UserError before any work when
        a request is invalid, naming it; with on_error, that is called with (index, error) instead, the request's group
        is None, and the others are drawn.
        """
        if enough is not None and enough < 1:
            raise UserError(f"enough is {enough}, it must be at least 1, or None for all")
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        stream = self.stream(prompts, params, on_error=on_error)
        for count, (index, group) in enumerate(stream, 1):
            groups[index] = group
            if on_group is not None:
                on_group(index, group)
            if count == enough:
                stream.close()
                break
        return groups

    def stream(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_error: OnError | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """(index of the prompt, group) as soon as all of a prompt's samples are done; see `sample`.

        Between two groups nothing is computed, so what is done with a group is done while the rest waits; closing the
        iterator gives up the rest. The weights must not change before the last group is out: RuntimeError.
        """
        return self._groups(self._run(self._read(prompts, params, on_error)))

    def _groups(self, events: Iterator[Event]) -> Iterator[tuple[int, RolloutGroup]]:
        with closing(events):
            for event in events:
                if isinstance(event, GroupDone):
                    yield event.request, event.group

    def events(self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams]) -> Iterator[Event]:
        """Everything that happens in a call, tokens as they are drawn included: Drew, SampleDone and GroupDone events
        whose `request` is the index of the prompt. Errors and closing are those of `stream`."""
        requests = self._read(prompts, params, None)
        for one in requests:
            one.streamed = True
        return self._run(requests)

    def stream_tokens(self, prompt: Sequence[int] | Prompt, params: SamplingParams) -> Iterator[int]:
        """The tokens of one sample as they are drawn. UserError unless params.n is 1."""
        if params.n != 1 or params.spare:
            raise UserError(f"streaming tokens needs n=1 and no spare ones, got n={params.n}, spare={params.spare}")
        return self._tokens(self.events([prompt], params))

    def _tokens(self, events: Iterator[Event]) -> Iterator[int]:
        with closing(events):
            for event in events:
                if isinstance(event, Drew):
                    yield from event.tokens

    def session(self) -> Session:
        """Requests that arrive and leave while others decode: see session.py. Holds the sampler until it is closed.

        The cache has kv_blocks blocks, or as many as `max_seqs` sequences of the model's whole context need, but at
        most half of the free memory.
        """
        return self._begin(-(-self.model.config.max_positions // self.block_size), self.max_seqs, 1)

    @property
    def acceptance(self) -> Acceptance | None:
        """How many tokens of the last call were guessed, and how many were right; None: the engine guesses none."""
        return getattr(self.engine, "acceptance", None)

    def cancel(self) -> None:
        """End the call that is running, from any thread, with its next step: `sample` returns what is done and None for
        the rest, `stream` ends. Nothing happens when none is running."""
        session = self._session
        if session is not None:
            session.cancel_all()

    def forget(self) -> None:
        """Forget the prefixes of earlier calls: the next one computes all of its prompts, to the last bit as if it were
        the first. RuntimeError in the middle of a call."""
        self._check_idle()
        if self.memory.pool is not None:
            self.memory.pool.flush()

    def release(self) -> None:
        """Give up the cache, its prefixes and all buffers, on a GPU to the device; the next call takes them back.

        RuntimeError in the middle of a call.
        """
        self._check_idle()
        self.engine.release()
        self.memory.release()
        self._batch = None

    # -- one call --------------------------------------------------------------------------------------------------

    def _read(self, prompts: Prompts, params, on_error: OnError | None) -> list[Open]:
        """Check every request; nothing is allocated or changed yet."""
        prompts = as_prompts(prompts)
        requests, seen = [], {}
        for index, (prompt, one) in enumerate(zip(prompts, as_params(prompts, params), strict=True)):
            tokens = tuple(prompt.tokens)
            same = tokens, one.seed
            earlier = seen[same] = seen.get(same, -1) + 1
            try:
                request = self._reader.request(f"prompt {index}", index, tokens, one, earlier, self.memory.kv_blocks)
            except UserError as error:
                if on_error is None:
                    raise
                on_error(index, error)
            else:
                requests.append(Open(request, prompt, one, streamed=False))
        return requests

    def _run(self, requests: list[Open]) -> Iterator[Event]:
        """Everything that happens until all is drawn."""
        if not requests:
            return
        blocks = [-(-(len(one.request.prompt) + one.request.limit) // self.block_size) for one in requests]
        rows = min(self.max_seqs, sum(one.request.samples for one in requests))
        with self._begin(max(blocks), rows, max(one.request.limit for one in requests)) as session:
            for one in requests:
                session.enqueue(one)
            while session.unfinished:
                yield from session.step()
            self.preemptions, self.found_tokens = session.preemptions, session.found_tokens

    def _begin(self, width: int, rows: int, longest: int) -> Session:
        """A session for `rows` sequences of up to `width` blocks that draw up to `longest` tokens."""
        self._check_idle()
        self.memory.prepare(width, rows)
        batch = self._batch
        if batch is None or batch.rows < rows:
            old = (batch.rows, batch.width, batch.longest) if batch else (0, 0, 0)
            self._batch = batch = RunningBatch(
                *map(max, old, (rows, width, longest)), self.block_size, self.model.device
            )
        batch.reserve(width, longest)
        self._session = Session(
            self.engine, self.memory, batch, self._reader, self.max_seqs, self.prefill_tokens, self._closed
        )
        return self._session

    def _check_idle(self) -> None:
        if self._session is not None:
            raise RuntimeError("this sampler is in the middle of another call; finish or close it first")

    def _closed(self) -> None:
        self._session = None
