"""The block allocator under any sequence of operations: nothing leaks, nothing is freed twice, counts are right."""

from ast import literal_eval

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from r1fast.rollout.kv_cache import BlockPool, block_names


def prefixes(name):
    whole = literal_eval(name.decode())
    return [whole[: i + 1] for i in range(len(whole))]


class PoolMachine(RuleBasedStateMachine):
    """Tables come, are shared, written, and go; a shadow of each block's content says whether copies keep it."""

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 4))
    def start(self, blocks, size):
        self.pool = BlockPool(blocks, size)
        self.tables = []
        self.expected = []  # what each table's owner has written, block by block
        self.memory = {}
        self.names = {}  # name -> the content it was given to
        self.writes = 0

    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(0, self.pool.free))
        table = self.pool.allocate(count)
        assert len(set(table)) == count
        self.writes += 1
        for block in table:
            self.memory[block] = self.writes
        self.tables.append(table)
        self.expected.append([self.writes] * count)

    @rule(extra=st.integers(1, 5))
    def allocate_too_many(self, extra):
        free = self.pool.free
        with pytest.raises(ValueError, match=f"{free} free"):
            self.pool.allocate(free + extra)
        assert self.pool.free == free

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        free = self.pool.free
        self.tables.append(self.pool.fork(self.tables[i]))
        self.expected.append(self.expected[i].copy())
        assert self.pool.free == free

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def write(self, data):
        i = data.draw(st.sampled_from([i for i, table in enumerate(self.tables) if table]))
        j = data.draw(st.integers(0, len(self.tables[i]) - 1))
        shared = sum(self.tables[i][j] in table for table in self.tables) > 1
        if shared and self.pool.free == 0:
            return
        copy = self.pool.unshare(self.tables[i], j)
        assert (copy is not None) == shared
        if copy is not None:
            source, destination = copy
            assert self.tables[i][j] == destination != source
            self.memory[destination] = self.memory[source]
        self.writes += 1
        self.memory[self.tables[i][j]] = self.expected[i][j] = self.writes

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables.pop(i)
        self.expected.pop(i)
        stale = table.copy()
        self.pool.release(table)
        assert table == []
        if stale and not any(stale[0] in other for other in self.tables):
            with pytest.raises(ValueError, match="freed twice"):
                self.pool.release(stale[:1])
            if not self.pool.idle(stale[:1]):
                with pytest.raises(ValueError, match="cannot be shared"):
                    self.pool.fork(stale[:1])
            with pytest.raises(ValueError, match="cannot be named"):
                self.pool.name(stale[0], b"")
            with pytest.raises(ValueError, match="cannot be written"):
                self.pool.unshare(stale[:1])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def name(self, data):
        """Of the first blocks of a table, each after what is in it and before it."""
        i = data.draw(st.sampled_from([i for i, table in enumerate(self.tables) if table]))
        for j in range(data.draw(st.integers(1, len(self.tables[i])))):
            name = repr(self.expected[i][: j + 1]).encode()
            self.pool.name(self.tables[i][j], name)
            self.names[name] = self.expected[i][j]

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def find(self, data):
        """A found block holds what its name says, whoever had it since; a table of them is a table as any other."""
        names = [repr(x).encode() for x in prefixes(data.draw(st.sampled_from(sorted(self.names))))]
        found = self.pool.find(names)
        assert [self.memory[block] for block in found] == [self.names[name] for name in names[: len(found)]]
        idle, free = self.pool.idle(found), self.pool.free
        self.tables.append(self.pool.fork(found))
        self.expected.append([self.memory[block] for block in found])
        assert self.pool.free == free - idle

    @precondition(lambda self: self.names)
    @rule()
    def flush(self):
        free = self.pool.free
        self.pool.flush()
        assert self.pool.free == free and not any(self.pool.find([name]) for name in self.names)
        self.names.clear()

    @invariant()
    def consistent(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check(self.tables)
        for table, expected in zip(self.tables, self.expected, strict=True):
            assert [self.memory[block] for block in table] == expected


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_for_is_the_ceiling(tokens, size):
    blocks = BlockPool(1, size).blocks_for(tokens)
    assert blocks * size >= tokens > (blocks - 1) * size


def test_check_sees_every_kind_of_fault():
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    pool.check([table])
    with pytest.raises(AssertionError, match="1 references counted, 0 held"):
        pool.check([])  # a leak
    with pytest.raises(AssertionError, match="1 references counted, 2 held"):
        pool.check([table, table])  # an owner that was not counted
    pool._free.append(pool._free[-1])
    with pytest.raises(AssertionError, match="twice"):
        pool.check([table])


def test_blocks_are_reused_before_new_ones_are_touched():
    pool = BlockPool(8, 2)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.release(first)
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_reset_frees_everything():
    pool = BlockPool(3, 2)
    pool.fork(pool.allocate(3))
    pool.name(0, b"a")
    pool.reset()
    pool.check([])
    assert pool.free == 3 and pool.find([b"a"]) == []


def test_idle_blocks_are_taken_last_and_the_oldest_first():
    pool = BlockPool(5, 2)
    tables = [pool.allocate(2), pool.allocate(2)]
    for table, names in zip(tables, ([b"a", b"ab"], [b"c", b"cd"]), strict=True):
        for block, name in zip(table, names, strict=True):
            pool.name(block, name)
        pool.release(table)
    assert pool.free == 5 and pool.idle(range(5)) == 4
    assert pool.allocate(1) == [4]  # never named
    assert pool.allocate(1) == [1]  # the end of the prompt that was given up first
    assert pool.find([b"a", b"ab"]) == [0] and pool.find([b"c", b"cd"]) == [2, 3]
    mine = pool.fork(pool.find([b"c"]))
    assert pool.allocate(2) == [3, 0] and pool.find([b"a"]) == []
    assert pool.find([b"c"]) == mine  # owned: it stays


def test_names_say_everything_that_came_before():
    names = block_names(b"w", [1, 2, 3, 4, 5], 2)
    assert len(names) == 2 and names == block_names(b"w", [1, 2, 3, 4], 2)
    assert names[0] == block_names(b"w", [1, 2], 2)[0]
    others = (
        block_names(b"v", [1, 2, 3, 4], 2),
        block_names(b"w", [9, 2, 3, 4], 2),
        block_names(b"w", [3, 4, 3, 4], 2),
    )
    assert all(other[1] != names[1] for other in others)


def test_a_named_block_that_is_to_be_written_loses_its_name():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.name(0, b"a")
    assert pool.unshare(table) is None and pool.find([b"a"]) == []


@pytest.mark.parametrize(("blocks", "size"), [(0, 16), (4, 0)])
def test_empty_pools_are_refused(blocks, size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(blocks, size)
