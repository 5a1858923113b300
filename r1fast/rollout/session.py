"""Requests that arrive and leave while others decode: what a server, a learner that overlaps, and a plain call run on.

    with sampler.session() as session:
        number = session.submit(tokens, SamplingParams(max_tokens=64), stream=True)     # any thread
        session.cancel(number)                                                          # any thread
        while session.wait(timeout=1.0):                                                # one thread: the driver
            for event in session.step():
                ...  # Drew, SampleDone, GroupDone or Cancelled; event.request is the number

`submit` and `cancel` may be called from any thread at any time and return at once; they take effect at the driver's
next step. `step` is one forward pass: it prefills waiting prompts and decodes the running rows in turn. The weights
must not change while the session has work: RuntimeError from `step`; while it has none they may. Any exception out of
`step` (KeyboardInterrupt too) ends the session with every block freed; what was unfinished is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from r1fast.model.paged import PagedStep
from r1fast.rollout.batch import Drawn, RunningBatch
from r1fast.rollout.engine import Engine, PrefillWork
from r1fast.rollout.events import Cancelled, Drew, Event, GroupDone, SampleDone
from r1fast.rollout.kv_cache import block_names
from r1fast.rollout.memory import KVMemory, WeightsWatch
from r1fast.rollout.params import Reader, SamplingParams, as_prompt
from r1fast.rollout.scheduler import Chunk, Request, Scheduler
from r1fast.rollout.scheduler import Sequence as Running
from r1fast.rollout.text import StopStrings
from r1fast.types import Prompt, Rollout, RolloutGroup


@dataclass(slots=True, eq=False)
class Open:
    """A request on its way."""

    request: Request
    prompt: Prompt
    params: SamplingParams
    streamed: bool
    stops: StopStrings | None = None
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # by sample


class Session:
    """See the module. Made by `Sampler.session`."""

    def __init__(
        self,
        engine: Engine,
        memory: KVMemory,
        batch: RunningBatch,
        reader: Reader,
        max_seqs: int,
        prefill_tokens: int,
        on_close: Callable[[], None],
    ):
        self._engine, self._memory, self._batch, self._reader = engine, memory, batch, reader
        self._on_close, self._blocks = on_close, memory.pool.blocks
        self._scheduler = Scheduler(memory.pool, max_seqs, prefill_tokens)
        self._read_weights()
        self._open: dict[int, Open] = {}
        self._attended = 0  # open requests whose tokens are looked at one by one
        self._prefilled = False
        self._news = threading.Condition()  # guards the five below
        self._arrived: list[Open] = []
        self._to_cancel: list[int] = []
        self._next = 0
        self._unfinished: set[int] = set()
        self._closed = False
        self._stepping = threading.RLock()  # one driver at a time; `close` from its own step passes
        batch.clear()
        engine.begin(memory.kv, batch)

    # -- any thread ------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt | list[int], params: SamplingParams, *, stream: bool = False, earlier: int = 0
    ) -> int:
        """Ask for `params.n` completions of a prompt (token ids, or a Prompt); the number that its events will carry.

        stream: give its tokens out as they are drawn. earlier: equal requests with equal seeds draw equal tokens unless
        this differs (`Sampler.sample` counts the equal prompts of a call with it).
        UserError when the request is invalid; nobody else notices. RuntimeError when the session is closed.
        """
        with self._news:
            number = self._next
            self._next += 1
        prompt = as_prompt(prompt, str(number))
        name, tokens = f"request {number}", tuple(prompt.tokens)
        request = self._reader.request(name, number, tokens, params, earlier, self._blocks)
        self.enqueue(Open(request, prompt, params, stream))
        return number

    def enqueue(self, one: Open) -> None:
        """A request that the Reader has made already, under a number of the caller's."""
        with self._news:
            if self._closed:
                raise RuntimeError("the session is closed")
            self._arrived.append(one)
            self._unfinished.add(one.request.index)
            self._news.notify_all()

    def cancel(self, request: int) -> bool:
        """Give a request up: its blocks are free after the next step, which says Cancelled. False when it is over."""
        with self._news:
            if request not in self._unfinished:
                return False
            self._to_cancel.append(request)
            self._news.notify_all()
            return True

    def cancel_all(self) -> None:
        """Give up every request that is not over yet."""
        with self._news:
            self._to_cancel += self._unfinished
            self._news.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to do; False when there is nothing after `timeout` seconds, or ever again."""
        with self._news:
            self._news.wait_for(lambda: self._unfinished or self._closed, timeout)
            return bool(self._unfinished) and not self._closed

    @property
    def unfinished(self) -> int:
        """Requests that are submitted and not over."""
        return len(self._unfinished)

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    @property
    def found_tokens(self) -> int:
        """Prompt tokens that were in the cache already."""
        return self._scheduler.found_tokens

    # -- the driver's thread ---------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is unfinished, after the step that may be running; the sampler is free for the next call."""
        with self._stepping:
            with self._news:
                if self._closed:
                    return
                self._closed = True
                self._arrived.clear()
                self._unfinished.clear()
                self._news.notify_all()
            if not self._scheduler.done and self._memory.pool is not None:
                self._memory.pool.reset()  # blocks may be named whose content was never computed
            self._batch.clear()
            self._on_close()

    def step(self) -> list[Event]:
        """One forward pass, or none when nothing can run; what happened in it, in order."""
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("step() is running in another thread; a session has one driver")
        try:
            if self._closed:
                raise RuntimeError("the session is closed")
            return self._step()
        except BaseException:  # KeyboardInterrupt too: no block outlives its session
            self.close()
            raise
        finally:
            self._stepping.release()

    def _step(self) -> list[Event]:
        events = self._take_news()
        scheduler = self._scheduler
        if scheduler.done:
            return events
        if self._watch.changed():
            raise RuntimeError("the model's weights changed while it was sampling; the rest is not drawn")
        chunks = [] if self._prefilled else scheduler.plan()  # in turn: prompts do not hold up those that decode
        self._prefilled = bool(chunks)
        if chunks:
            self._prefill(chunks, events)
        elif self._batch.size:
            self._decode(events)
        return events

    def _take_news(self) -> list[Event]:
        with self._news:
            arrived, self._arrived = self._arrived, []
            cancelled, self._to_cancel = self._to_cancel, []
        events: list[Event] = []
        if arrived:
            self._admit(arrived)
        for number in cancelled:
            if number in self._open:
                self._end(number)
                events.append(Cancelled(number))
        return events

    def _read_weights(self) -> None:
        """Nothing is in flight: from here on the weights are these, and blocks of others are not found."""
        self._memory.restamp()
        self._watch = WeightsWatch(self._memory.model)
        self._weights_version = self._memory.model.weights_version

    def _admit(self, arrived: list[Open]) -> None:
        if self._scheduler.done:
            self._read_weights()
        size = self._memory.block_size
        width = max(-(-(len(one.request.prompt) + one.request.limit) // size) for one in arrived)
        longest = max(one.request.limit for one in arrived)
        batch = self._batch
        if width > batch.width or longest > batch.longest:
            batch.reserve(width, longest)
        for one in arrived:
            request = one.request
            names = tuple(block_names(self._memory.stamp, request.prompt, size))
            one.request, one.stops = replace(request, names=names), self._reader.stop_strings(one.params)
            self._open[request.index] = one
            self._attended += one.streamed or one.stops is not None
            self._scheduler.add(one.request)

    def _end(self, number: int) -> None:
        """The request is over: what still runs of it leaves."""
        gone = set(self._scheduler.cancel(number))
        if gone:
            self._batch.remove([row for row, sequence in enumerate(self._batch.sequences) if sequence in gone])
        one = self._open.pop(number)
        self._attended -= one.streamed or one.stops is not None
        with self._news:
            self._unfinished.discard(number)

    # -- one step --------------------------------------------------------------------------------------------------

    def _prefill(self, chunks: list[Chunk], events: list[Event]) -> None:
        """Forward the chunks end to end; the prompts that they complete launch and draw their first tokens."""
        batch, first, row = self._batch, self._batch.size, -1
        launched, rows, copies = [], [], []
        for chunk in chunks:
            self._scheduler.computed(chunk)
            row += chunk.stop - chunk.start
            if chunk.last:
                launched.append(chunk.prefill)
                rows.append(row)
        step = self._prefill_step(chunks)  # before the launch, which moves tables on
        for prefill in launched:
            copies += self._scheduler.launch(prefill)
        if launched:
            batch.append(launched)
        counts = [len(prefill.sequences) for prefill in launched]
        drawn = self._engine.prefill(PrefillWork(step, first, rows, counts, copies))
        if drawn is not None:
            self._record(drawn, first, events)

    def _prefill_step(self, chunks: list[Chunk]) -> PagedStep:
        size = self._memory.block_size
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
        return PagedStep(*(torch.from_numpy(array).to(self._batch.device) for array in arrays))

    def _decode(self, events: list[Event]) -> None:
        """The next tokens of every running sequence."""
        batch, ahead = self._batch, self._engine.ahead
        if ahead > 1 and len(batch.full(ahead)) * -(-ahead // batch.block_size) > self._scheduler.available:
            ahead = 1  # looking ahead is not worth a preemption
        while full := batch.full(ahead):
            self._grow(full)
        if batch.size:
            self._record(self._engine.decode(ahead), 0, events)

    def _grow(self, full: list[int]) -> None:
        """A new block for each full row; the rows preempted for it leave, with what they have drawn."""
        batch = self._batch
        preempted = self._scheduler.grow([batch.sequences[row] for row in full])
        batch.extend([row for row in full if batch.sequences[row].table])
        if preempted:
            rows = [row for row, sequence in enumerate(batch.sequences) if not sequence.table]
            for row in rows:
                sequence = batch.sequences[row]
                sequence.tokens, sequence.logprobs, sequence.logprobs_full = batch.output(row)
            batch.remove(rows)

    def _record(self, drawn: Drawn, first: int, events: list[Event]) -> None:
        """Keep what the rows from `first` on have drawn; those that are finished by it leave."""
        batch = self._batch
        if not np.isfinite(drawn.logprobs).all():
            # What is not a number would outlive its block: under a mask it is multiplied by zero, and stays.
            self._engine.release()
            self._memory.release()
            raise RuntimeError("the model's logits are not finite; its weights are broken, or training has diverged")
        stopped = set()
        if self._attended:
            drawn, stopped = self._attend(drawn, first, events)
        rows = batch.record(first, drawn)
        if stopped:
            rows = sorted({*rows, *stopped})
        if not rows:
            return
        full = []
        for row in rows:
            sequence = batch.sequences[row]
            finish = "stop" if row in stopped or batch.stopped(row) else "length"
            tokens, logprobs, untruncated = batch.output(row)
            rollout = Rollout(tokens, logprobs, finish, logprobs_full=untruncated)
            one = self._open[sequence.request.index]
            self._scheduler.finish(sequence)
            if len(one.rollouts) < one.params.n:
                one.rollouts[sequence.sample] = rollout
                events.append(SampleDone(sequence.request.index, sequence.sample, rollout))
                if len(one.rollouts) == one.params.n:
                    full.append(one)
        batch.remove(rows)
        for one in full:
            rollouts = [one.rollouts[sample] for sample in sorted(one.rollouts)]
            self._end(one.request.index)
            events.append(GroupDone(one.request.index, RolloutGroup(one.prompt, rollouts, self._weights_version)))

    def _attend(self, drawn: Drawn, first: int, events: list[Event]) -> tuple[Drawn, set[int]]:
        """Look for stop strings and give streamed tokens out; what is kept of `drawn`, and the rows that have ended."""
        counts, stopped = drawn.counts.copy(), set()
        for i, sequence in enumerate(self._batch.sequences[first:]):
            one = self._open[sequence.request.index]
            if one.stops and self._completes(sequence, one, drawn.tokens[i, : counts[i]], counts, i):
                stopped.add(first + i)
            if one.streamed:
                kept = (column[i, : counts[i]].tolist() for column in drawn[:3])
                events.append(Drew(sequence.request.index, sequence.sample, *kept))
        return drawn._replace(counts=counts), stopped

    def _completes(self, sequence: Running, one: Open, tokens: np.ndarray, counts: np.ndarray, row: int) -> bool:
        """Whether one of the tokens completes a stop string; `counts[row]` then ends with it."""
        if sequence.text is None:
            sequence.text = one.stops.watch()
        for number, token in enumerate(tokens.tolist(), 1):
            if sequence.text.push(token):
                counts[row] = number
                return True
            sequence.text.take()
        return False
