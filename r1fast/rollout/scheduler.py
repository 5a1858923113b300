"""Which tokens are computed next: continuous batching over a pool of blocks, as plain Python without tensors.

A request (one prompt, n samples) waits, is prefilled once in chunks, and launches n running sequences over the same
prompt blocks. Running sequences draw one token a step until they finish. When blocks run out the sequence admitted
last gives its blocks back and waits to be recomputed from its prompt and what it has drawn; as the noise of a draw
depends only on the sequence and the position, the result is the same as without.

The scheduler is asked only when something happens (admission, a block is full, a sequence ends); the steady state of
decoding is arrays in batch.py and never comes here. Continuous batching: Orca (Yu et al. 2022); preemption by
recompute: vLLM (Kwon et al. 2023, section 4.5); chunked prefill: Sarathi (Agrawal et al. 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from r1fast.rollout.kv_cache import BlockPool


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how many completions of which length to draw from it."""

    index: int  # of the prompt in the call
    prompt: tuple[int, ...]
    samples: int
    limit: int  # tokens to draw at most, for each sample


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. While it runs, what it has drawn is in the batch's arrays, not here."""

    request: Request
    sample: int
    table: list[int] = field(default_factory=list)  # blocks; empty while it waits
    tokens: list[int] = field(default_factory=list)  # drawn before the last preemption
    logprobs: list[float] = field(default_factory=list)
    logprobs_full: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens to be forwarded once for all of `sequences`, which then go on from the same last row."""

    request: Request
    sequences: list[Sequence]
    tokens: tuple[int, ...]
    table: list[int]
    computed: int  # tokens whose keys and values are in the cache
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
    """The state of one call. Every request must fit the pool on its own: `pool.blocks_for(prompt + limit)` blocks."""

    def __init__(self, pool: BlockPool, max_seqs: int, prefill_tokens: int):
        self.pool = pool
        self.max_seqs = max_seqs
        self.prefill_tokens = prefill_tokens  # most prompt tokens a step, so that no prompt holds up those that decode
        # A prefill is a forward pass of its own; a step that admits a single row would double its cost. While others
        # run, rows are therefore filled an eighth of the batch at a time: 256 prompts x 16 samples of 30 tokens through
        # 256 rows then take 107 prefills and 537 decodes instead of 430 and 507.
        self.admit_rows = max(1, max_seqs // 8)
        self.preemptions = 0
        self._waiting: deque[tuple[Request, list[Sequence]]] = deque()
        self._waiting_samples = 0
        self._prefilling: deque[Prefill] = deque()
        self._prefilling_samples = 0
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._siblings: dict[int, list[Sequence]] = {}  # request index -> its running sequences
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
        size = self.pool.block_size
        siblings = self._siblings.get(request.index)
        # The full blocks of the prompt are in the cache already when a sample of the same prompt runs. One token at
        # least is forwarded: its row gives the logits.
        shared = min(len(request.prompt), len(tokens) - 1) // size if siblings else 0
        # Each sample ends with a block of its own: its copy of the partly filled one, or a fresh one.
        base = len(tokens) // size - shared
        # Room for every running sequence to grow once, or as far as it may: admitting into less would soon evict
        # what was just computed.
        headroom = min(len(self._running), self._growth)
        fits = self.available - base - headroom
        if not (self._running or self._prefilling):
            fits = max(fits, 1)  # alone it always fits: checked in `add`
        count = min(len(sequences), fits)
        if count < 1:
            return 0
        table = self.pool.fork(siblings[0].table[:shared]) if siblings else []
        table += self.pool.allocate(self.pool.blocks_for(len(tokens)) - shared)
        reserved = base + shared + count - len(table)
        self._reserved += reserved
        self._prefilling.append(Prefill(request, sequences[:count], tokens, table, shared * size, reserved))
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
        self._siblings.setdefault(prefill.request.index, []).extend(prefill.sequences)
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
            prefill = self._prefilling.pop()
            self._prefilling_samples -= len(prefill.sequences)
            self._reserved -= prefill.reserved
            self.pool.release(prefill.table)
            self._wait(prefill.request, prefill.sequences)
            return None
        sequence = next(reversed(self._running))
        self._leave(sequence)
        self._wait(sequence.request, [sequence])
        return sequence

    def _wait(self, request: Request, sequences: list[Sequence]) -> None:
        self._waiting.appendleft((request, sequences))
        self._waiting_samples += len(sequences)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running batch, its blocks freed."""
        request = sequence.request
        del self._running[sequence]
        self._growth -= self.pool.blocks_for(len(request.prompt) + request.limit) - len(sequence.table)
        self._siblings[request.index].remove(sequence)
        self.pool.release(sequence.table)

    def finish(self, sequence: Sequence) -> bool:
        """The sequence has drawn its last token; True when it was the last of its request."""
        self._leave(sequence)
        index = sequence.request.index
        self._unfinished[index] -= 1
        if self._unfinished[index]:
            return False
        del self._unfinished[index], self._siblings[index]
        return True
