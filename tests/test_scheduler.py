"""The scheduler driven by a model of integers: what a sequence draws next is a hash of all that its blocks hold.

A wrong block, a missed copy, a lost token or a bad recompute changes the hash and with it everything drawn after, so
equality with the direct computation proves the whole bookkeeping. No torch.
"""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.rollout.kv_cache import BlockPool, block_names
from r1fast.rollout.scheduler import Request, Scheduler

VOCABULARY, STOP = 11, 0


def draw(context, sample):
    return hash((tuple(context), sample)) % VOCABULARY


def expected(request, sample):
    tokens = []
    while len(tokens) < request.limit and (not tokens or tokens[-1] != STOP):
        tokens.append(draw([*request.prompt, *tokens], sample))
    return tokens


class Engine:
    """What the sampler does, one Python object per sequence: fills blocks, draws, tells the scheduler."""

    def __init__(self, blocks, size, max_seqs, prefill_tokens):
        self.pool = BlockPool(blocks, size)
        self.scheduler = Scheduler(self.pool, max_seqs, prefill_tokens)
        self.memory = [[None] * size for _ in range(blocks)]
        self.running = {}  # sequence -> tokens drawn
        self.results = {}
        self.completed = []  # request indices, in order of completion
        self.forwarded = 0
        self.widest = self.longest = 0

    def write(self, table, position, token):
        assert self.pool._references[table[position // self.pool.block_size]] >= 1
        self.memory[table[position // self.pool.block_size]][position % self.pool.block_size] = token

    def read(self, table, length):
        size = self.pool.block_size
        return [self.memory[table[p // size]][p % size] for p in range(length)]

    def record(self, sequence, context):
        drawn = self.running[sequence]
        drawn.append(draw(context, sequence.sample))
        if drawn[-1] == STOP or len(drawn) == sequence.request.limit:
            self.results[sequence.request.index, sequence.sample] = self.running.pop(sequence)
            if self.scheduler.finish(sequence):
                self.completed.append(sequence.request.index)

    def prefill(self):
        chunks = self.scheduler.plan()
        self.longest = max(self.longest, sum(chunk.stop - chunk.start for chunk in chunks))
        for chunk in chunks:
            for position in range(chunk.start, chunk.stop):
                self.write(chunk.prefill.table, position, chunk.prefill.tokens[position])
            self.forwarded += chunk.stop - chunk.start
            self.scheduler.computed(chunk)
            if chunk.last:
                for source, destination in self.scheduler.launch(chunk.prefill):
                    self.memory[destination] = self.memory[source].copy()
                for sequence in chunk.prefill.sequences:
                    self.running[sequence] = sequence.tokens.copy()
                    self.record(sequence, self.read(sequence.table, len(chunk.prefill.tokens)))

    def decode(self):
        size = self.pool.block_size
        length = {s: len(s.request.prompt) + len(drawn) - 1 for s, drawn in self.running.items()}
        full = [s for s in self.running if length[s] == len(s.table) * size]
        for sequence in self.scheduler.grow(full):
            sequence.tokens = self.running.pop(sequence)
        self.widest = max(self.widest, len(self.running))
        for sequence in list(self.running):
            self.write(sequence.table, length[sequence], self.running[sequence][-1])
        for sequence in list(self.running):
            self.record(sequence, self.read(sequence.table, length[sequence] + 1))

    def cancel(self, index):
        for sequence in self.scheduler.cancel(index):
            assert not sequence.table
            del self.running[sequence]

    def run(self, requests, cancels=()):
        """cancels: (step, request index)."""
        for request in requests:
            names = tuple(block_names(b"", request.prompt, self.pool.block_size))
            self.scheduler.add(replace(request, names=names))
        steps = 0
        while not self.scheduler.done:
            for step, index in cancels:
                if step == 2 * steps:
                    self.cancel(index)
            self.prefill()
            for step, index in cancels:
                if step == 2 * steps + 1:
                    self.cancel(index)
            self.decode()
            self.pool.check(self.scheduler.tables())
            steps += 1
            assert steps < 5000, "no progress"
        assert self.pool.free == self.pool.blocks
        assert self.scheduler.available == self.pool.blocks
        assert (self.scheduler._growth, self.scheduler._waiting_samples, self.scheduler._prefilling_samples) == (
            0,
            0,
            0,
        )
        return self.results


def make_requests(rng, count, longest=12, samples=4, limit=10):
    return [
        Request(
            i, tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))), rng.randint(1, samples),
            rng.randint(1, limit),
        )
        for i in range(count)
    ]  # fmt: skip


def assert_right(results, requests):
    assert results == {(r.index, s): expected(r, s) for r in requests for s in range(r.samples)}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(1, 5), spare=st.integers(0, 12), max_seqs=st.integers(1, 20),
    prefill_tokens=st.integers(1, 40), count=st.integers(1, 12),
)  # fmt: skip
def test_any_pool_gives_what_direct_computation_gives(seed, size, spare, max_seqs, prefill_tokens, count):
    requests = make_requests(random.Random(seed), count)
    blocks = max(-(-(len(r.prompt) + r.limit) // size) for r in requests) + spare
    engine = Engine(blocks, size, max_seqs, prefill_tokens)
    assert_right(engine.run(requests), requests)
    assert engine.widest <= max_seqs
    assert engine.longest <= prefill_tokens
    assert sorted(engine.completed) == list(range(count))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(1, 4), spare=st.integers(0, 10), max_seqs=st.integers(1, 12),
    prefill_tokens=st.integers(1, 12), cancels=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 9)), max_size=6),
)  # fmt: skip
def test_cancels_at_any_moment_leave_the_others_right(seed, size, spare, max_seqs, prefill_tokens, cancels):
    """Prompts begin alike, so that some read blocks which a cancelled one was to compute."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCABULARY) for _ in range(12)]
    requests = [
        replace(request, prompt=(*stem[: rng.randint(0, 12)], *request.prompt))
        for request in make_requests(rng, 10, longest=4)
    ]
    blocks = max(-(-(len(r.prompt) + r.limit) // size) for r in requests) + spare
    engine = Engine(blocks, size, max_seqs, prefill_tokens)
    results = engine.run(requests, cancels)
    gone = {index for _, index in cancels}
    right = {(r.index, s): expected(r, s) for r in requests for s in range(r.samples)}
    assert results == {key: right[key] for key in results}
    assert {key for key in right if key[0] not in gone} <= set(results)


def test_a_tight_pool_preempts_and_changes_nothing():
    requests = make_requests(random.Random(1), 20, limit=30)
    engine = Engine(14, 4, 16, 64)
    assert_right(engine.run(requests), requests)
    assert engine.scheduler.preemptions > 0
    roomy = Engine(400, 4, 16, 64)
    assert_right(roomy.run(requests), requests)
    assert roomy.scheduler.preemptions == 0


def test_a_prompt_is_forwarded_once_for_its_group():
    request = Request(0, tuple(range(1, 11)), samples=6, limit=5)
    engine = Engine(64, 4, 8, 100)
    assert_right(engine.run([request]), [request])
    assert engine.forwarded == len(request.prompt)


def test_a_group_wider_than_the_batch_shares_the_full_blocks_of_its_prompt():
    request = Request(0, tuple(range(1, 11)), samples=9, limit=6)
    engine = Engine(64, 4, 3, 100)
    assert_right(engine.run([request]), [request])
    # Later samples find the prompt's two full blocks whenever a sibling runs, and forward the other two tokens.
    assert engine.forwarded < 9 * len(request.prompt)


def test_groups_end_as_soon_as_their_samples_do():
    quick = Request(1, (3, 4), samples=2, limit=1)
    slow = next(
        r for r in (Request(0, (5, i), samples=1, limit=9) for i in range(1, 500)) if len(expected(r, 0)) == 9
    )  # fmt: skip
    engine = Engine(64, 4, 8, 100)
    engine.run([slow, quick])
    assert engine.completed == [1, 0]


def test_the_last_admitted_is_preempted_first():
    pool = BlockPool(5, 2)
    scheduler = Scheduler(pool, 4, 100)
    scheduler.add(Request(0, (1,), samples=2, limit=4))
    scheduler.add(Request(1, (2,), samples=1, limit=4))
    sequences = []
    for chunk in scheduler.plan():
        scheduler.computed(chunk)
        scheduler.launch(chunk.prefill)
        sequences += chunk.prefill.sequences
    assert [(s.request.index, s.sample) for s in sequences] == [(0, 0), (0, 1), (1, 0)]
    assert pool.free == 2
    assert scheduler.grow(sequences) == [sequences[2]]
    assert [len(s.table) for s in sequences] == [2, 2, 0]
    pool.check(scheduler.tables())


def test_a_prefill_is_given_up_before_a_running_sequence():
    pool = BlockPool(6, 2)
    scheduler = Scheduler(pool, 4, 4)
    scheduler.add(Request(0, (1,), samples=1, limit=9))
    scheduler.add(Request(1, (2,) * 7, samples=1, limit=1))
    first, second = scheduler.plan()
    scheduler.computed(first)
    scheduler.launch(first.prefill)
    scheduler.computed(second)
    (sequence,) = first.prefill.sequences
    assert scheduler.grow([sequence]) == [] and second.prefill.table  # one free block is left for it
    assert scheduler.grow([sequence]) == [] and not second.prefill.table
    pool.check(scheduler.tables())
    assert scheduler.running == 1


@pytest.mark.parametrize(("limit", "blocks", "admitted"), [(7, 6, False), (7, 7, True), (3, 5, True), (3, 4, False)])
def test_admission_leaves_room_for_those_that_run(limit, blocks, admitted):
    """Two samples hold a block each and may ask for one more (limit 7) or none (limit 3); the newcomer needs three."""
    scheduler = Scheduler(BlockPool(blocks, 4), 8, 100)
    scheduler.add(Request(0, (1,), samples=2, limit=limit))
    (chunk,) = scheduler.plan()
    scheduler.computed(chunk)
    scheduler.launch(chunk.prefill)
    scheduler.add(Request(1, (2,) * 9, samples=1, limit=2))
    assert bool(scheduler.plan()) == admitted
    for sequence in chunk.prefill.sequences:
        scheduler.finish(sequence)
    assert admitted or scheduler.plan()


def test_small_gaps_wait_until_an_eighth_of_the_batch_is_free():
    scheduler = Scheduler(BlockPool(200, 4), 16, 1000)
    for i in range(20):
        scheduler.add(Request(i, (1, 2), samples=1, limit=3))
    running = []
    for chunk in scheduler.plan():
        scheduler.computed(chunk)
        scheduler.launch(chunk.prefill)
        running += chunk.prefill.sequences
    assert len(running) == 16
    scheduler.finish(running.pop())
    assert scheduler.plan() == []
    scheduler.finish(running.pop())
    assert len(scheduler.plan()) == 2


def test_a_request_that_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="can never fit"):
        Scheduler(BlockPool(2, 4), 4, 100).add(Request(3, (1,) * 5, samples=1, limit=4))


def test_incomplete_prefills_do_not_launch():
    scheduler = Scheduler(BlockPool(8, 4), 4, 3)
    scheduler.add(Request(0, (1,) * 5, samples=1, limit=4))
    (chunk,) = scheduler.plan()
    scheduler.computed(chunk)
    assert not chunk.last
    with pytest.raises(ValueError, match="before all of its tokens"):
        scheduler.launch(chunk.prefill)


def test_no_torch():
    code = "import sys, r1fast.rollout.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
