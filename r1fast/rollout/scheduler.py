"""Which tokens are computed next: continuous batching over a pool of blocks, as plain Python without tensors.

A request (one prompt, n samples) waits, is prefilled once in chunks, and launches n running sequences over the same
prompt blocks. Running sequences draw one token a step until they finish. When blocks run out the sequence admitted
last gives its blocks back and waits to be recomputed from its prompt and what it has drawn; as the noise of a draw
depends only on the sequence and the position, the result is the same as without. A request can be cancelled at any
time.

A prompt's full blocks are named in the pool when its prefill is admitted, so whoever begins alike (the next samples of
the group, a prompt with the same template, the same prompt in a later call) finds them, even before they are computed:
prefills are served first come, first served, so a block is computed in an earlier step than its readers or in the same
one, in which every layer writes all keys and values before it reads any.

The scheduler is asked only when something happens (admission, a block is full, a sequence ends); the steady state of
decoding is arrays in batch.py and never comes here. Continuous batching: Orca (Yu et al. 2022); preemption by
recompute: vLLM (Kwon et al. 2023, section 4.5); chunked prefill: Sarathi (Agrawal et al. 2023); blocks found again by
their hash: vLLM's automatic prefix caching.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from r1fast.rollout.kv_cache import BlockPool

if TYPE_CHECKING:
    from r1fast.rollout.params import Draws
    from r1fast.rollout.text import TextStream


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how many completions of which length to draw from it."""

    index: int  # of the prompt in the call
    prompt: tuple[int, ...]
    samples: int
    limit: int  # tokens to draw at most, for each sample
    names: tuple[bytes, ...] = ()  # of the prompt's full blocks (kv_cache.block_names); none: nothing is shared
    draws: Draws | None = None  # how, for the batch; not read here


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. While it runs, what it has drawn is in the batch's arrays, not here."""

    request: Request
    sample: int
    table: list[int] = field(default_factory=list)  # blocks; empty while it waits
    tokens: list[int] = field(default_factory=list)  # drawn before the last preemption
    logprobs: list[float] = field(default_factory=list)
    logprobs_full: list[float] = field(default_factory=list)
    text: TextStream | None = None  # for its stop strings; not read here


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens to be forwarded once for all of `sequences`, which then go on from the same last row."""

    request: Request
    sequences: list[Sequence]
    tokens: tuple[int, ...]
    table: list[int]
    found: int  # blocks at the table's beginning that others compute or have computed
    computed: int  # tokens whose keys and values are in the cache, or will be before this prefill's first step ends
    reserved: int  # free blocks kept back for the launch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prefill: `prefill.tokens[start:stop]`, to be forwarded in this step."""

    prefill: Prefill
    start: int
    stop: int

    @property
    def last(self) -> bool:
        return self.stop == len(self.prefill.tokens)


class Scheduler:
    """The state of a session. Every request must fit the pool on its own: `pool.blocks_for(prompt + limit)` blocks."""

    def __init__(self, pool: BlockPool, max_seqs: int, prefill_tokens: int):
        self.pool = pool
        self.max_seqs = max_seqs
        self.prefill_tokens = prefill_tokens  # most prompt tokens a step, so that no prompt holds up those that decode
        # A prefill is a forward pass of its own; a step that admits a single row would double its cost. While others
        # run, rows are therefore filled an eighth of the batch at a time: 256 prompts x 16 samples of 30 tokens through
        # 256 rows then take 107 prefills and 537 decodes instead of 430 and 507.
        self.admit_rows = max(1, max_seqs // 8)
        self.preemptions = 0
        self.found_tokens = 0  # prompt tokens that were in the cache already, whoever put them there
        self._waiting: deque[tuple[Request, list[Sequence]]] = deque()
        self._waiting_samples = 0
        self._prefilling: deque[Prefill] = deque()
        self._prefilling_samples = 0
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._unfinished: dict[int, int] = {}  # request index -> samples to come
        self._reserved = 0
        self._growth = 0  # blocks that the running sequences may still ask for

    # -- the state ---------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return not self._unfinished

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def available(self) -> int:
        """Free blocks that are not promised to a prefill."""
        return self.pool.free - self._reserved

    def tables(self) -> Iterable[list[int]]:
        """Every table that holds blocks, for `BlockPool.check`."""
        yield from (prefill.table for prefill in self._prefilling)
        yield from (sequence.table for sequence in self._running)

    # -- waiting -> prefilling ---------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        if self.pool.blocks_for(len(request.prompt) + request.limit) > self.pool.blocks:
            raise ValueError(f"request {request.index} can never fit a pool of {self.pool.blocks} blocks")
        sequences = [Sequence(request, sample) for sample in range(request.samples)]
        self._waiting.append((request, sequences))
        self._waiting_samples += request.samples
        self._unfinished[request.index] = request.samples

    def plan(self) -> list[Chunk]:
        """Admit what fits, then cut up to `prefill_tokens` tokens from the admitted prefills, first come first."""
        self._admit()
        budget, chunks = self.prefill_tokens, []
        for prefill in self._prefilling:
            if budget == 0:
                break
            stop = min(len(prefill.tokens), prefill.computed + budget)
            chunks.append(Chunk(prefill, prefill.computed, stop))
            budget -= stop - prefill.computed
        return chunks

    def _admit(self) -> None:
        free_rows = self.max_seqs - len(self._running) - self._prefilling_samples
        if self._running and free_rows < min(self.admit_rows, self._waiting_samples):
            return
        while self._waiting and free_rows:
            request, sequences = self._waiting[0]
            admitted = self._admit_some(request, sequences[:free_rows])
            if not admitted:
                return
            free_rows -= admitted
            self._waiting_samples -= admitted
            if admitted == len(sequences):
                self._waiting.popleft()
            else:
                self._waiting[0] = (request, sequences[admitted:])

    def _admit_some(self, request: Request, sequences: list[Sequence]) -> int:
        """Start one prefill for as many of `sequences` as there are blocks for; how many that is."""
        tokens = request.prompt + tuple(sequences[0].tokens)
        pool = self.pool
        # One token at least is forwarded: its row gives the logits.
        found = pool.find(request.names[: (len(tokens) - 1) // pool.block_size])
        # Each sample ends with a block of its own: its copy of the partly filled one, or a fresh one.
        base = len(tokens) // pool.block_size - len(found)
        # Room for every running sequence to grow once, or as far as it may: admitting into less would soon evict
        # what was just computed.
        headroom = min(len(self._running), self._growth)
        fits = self.available - pool.idle(found) - base - headroom
        if not (self._running or self._prefilling):
            fits = max(fits, 1)  # alone it always fits: checked in `add`
        count = min(len(sequences), fits)
        if count < 1:
            return 0
        table = pool.fork(found)
        table += pool.allocate(pool.blocks_for(len(tokens)) - len(found))
        for block, name in zip(table[len(found) :], request.names[len(found) :], strict=False):
            pool.name(block, name)
        reserved = base + len(found) + count - len(table)
        self._reserved += reserved
        computed = len(found) * pool.block_size
        self.found_tokens += computed
        self._prefilling.append(Prefill(request, sequences[:count], tokens, table, len(found), computed, reserved))
        self._prefilling_samples += count
        return count

    # -- prefilling -> running ---------------------------------------------------------------------------------

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache."""
        chunk.prefill.computed = chunk.stop

    def launch(self, prefill: Prefill) -> list[tuple[int, int]]:
        """The sequences of a completed prefill begin to run, each with room for one token more than the prefill's.

        Returns the (source, destination) blocks to be copied before anything is written.
        """
        if prefill.computed != len(prefill.tokens):
            raise ValueError("a prefill was launched before all of its tokens were computed")
        self._prefilling.remove(prefill)
        self._prefilling_samples -= len(prefill.sequences)
        self._reserved -= prefill.reserved
        partial = len(prefill.tokens) % self.pool.block_size != 0
        most = self.pool.blocks_for(len(prefill.request.prompt) + prefill.request.limit)
        copies = []
        for sequence in prefill.sequences:
            final = sequence is prefill.sequences[-1]
            sequence.table = prefill.table if final else self.pool.fork(prefill.table)
            if not partial:
                sequence.table += self.pool.allocate(1)
            elif (copy := self.pool.unshare(sequence.table)) is not None:
                copies.append(copy)
            self._running[sequence] = None
            self._growth += most - len(sequence.table)
        return copies

    # -- running -> finished, or back to waiting -----------------------------------------------------------------

    def grow(self, sequences: list[Sequence]) -> list[Sequence]:
        """One more block at the end of each table; returns those preempted for it (they may be among `sequences`).

        The caller must store what a preempted sequence has drawn in its lists before `plan`.
        """
        preempted = []
        for sequence in sequences:
            while self.available < 1 and sequence in self._running:
                victim = self._preempt()
                if victim is not None:
                    preempted.append(victim)
            if sequence in self._running:
                sequence.table += self.pool.allocate(1)
                self._growth -= 1
        return preempted

    def _preempt(self) -> Sequence | None:
        """Free the blocks of what was admitted last: a prefill (None) or a running sequence."""
        self.preemptions += 1
        if self._prefilling:
            self._give_up(self._prefilling[-1])
            return None
        sequence = next(reversed(self._running))
        self._leave(sequence)
        self._wait(sequence.request, [sequence])
        return sequence

    def _give_up(self, prefill: Prefill) -> None:
        """A prefill goes back to waiting, and those that were to read the blocks which it will not compute now."""
        self._prefilling.remove(prefill)
        self._prefilling_samples -= len(prefill.sequences)
        self._reserved -= prefill.reserved
        done = prefill.computed // self.pool.block_size
        lost = set(prefill.table[max(done, prefill.found) : len(prefill.request.names)])
        for block in lost:
            self.pool.forget(block)
        self.pool.release(prefill.table)
        for other in list(reversed(self._prefilling)):  # the last first, so that they wait in their order
            if other in self._prefilling and lost & set(other.table[: other.found]):
                self._give_up(other)
        self._wait(prefill.request, prefill.sequences)

    def _wait(self, request: Request, sequences: list[Sequence]) -> None:
        self._waiting.appendleft((request, sequences))
        self._waiting_samples += len(sequences)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running batch, its blocks freed."""
        request = sequence.request
        del self._running[sequence]
        self._growth -= self.pool.blocks_for(len(request.prompt) + request.limit) - len(sequence.table)
        self.pool.release(sequence.table)

    def finish(self, sequence: Sequence) -> bool:
        """The sequence has drawn its last token; True when it was the last of its request."""
        self._leave(sequence)
        index = sequence.request.index
        self._unfinished[index] -= 1
        if self._unfinished[index]:
            return False
        del self._unfinished[index]
        return True

    def cancel(self, index: int) -> list[Sequence]:
        """The request leaves, wherever its samples are. Returns those that were running, their blocks freed.

        Nothing happens where the request is finished or unknown.
        """
        if index not in self._unfinished:
            return []
        del self._unfinished[index]
        for prefill in [prefill for prefill in self._prefilling if prefill.request.index == index]:
            if prefill in self._prefilling:
                self._give_up(prefill)
        kept = [(request, sequences) for request, sequences in self._waiting if request.index != index]
        self._waiting = deque(kept)
        self._waiting_samples = sum(len(sequences) for _, sequences in kept)
        running = [sequence for sequence in self._running if sequence.request.index == index]
        for sequence in running:
            self._leave(sequence)
        return running
