"""Who owns which block of the key-value cache: counts only, no tensors, so that it can be tested as plain Python.

The cache is `blocks` blocks of `block_size` tokens (PagedAttention, Kwon et al. 2023, section 4). A sequence's
*table* is the list of the blocks that hold its tokens in order; only the last one may be partly filled. Sequences share
blocks by reference count: the n samples of a group those of their prompt, and prompts that begin alike their beginning.
A block is written by one owner only: a sequence whose last, partly filled block is shared takes a copy of it first
(`unshare`, copy on write; the caller moves the data).

Prefix cache. A full block may get a *name*, which stands for all tokens up to its end and for the weights that computed
it (`block_names`). A named block that loses its last owner keeps its content and waits, idle, to be found again; idle
blocks count as free, and the one that was given up first is taken first when nothing else is free. Because the weights
are part of every name, blocks of other weights cannot be found, flushed or not.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def block_names(root: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """A name for each full block of `tokens`: a hash of the block's tokens and of the name of the block before it.

    root: what else the content depends on, the weights above all. 128 bits of BLAKE2b: 1 us a block.
    """
    names, name = [], root
    whole = len(tokens) // block_size * block_size
    packed = array("q", tokens[:whole]).tobytes()
    for start in range(0, len(packed), 8 * block_size):
        name = hashlib.blake2b(name + packed[start : start + 8 * block_size], digest_size=16).digest()
        names.append(name)
    return names


class BlockPool:
    """A fixed number of blocks with reference counts. It never grows; running out is the scheduler's business."""

    def __init__(self, blocks: int, block_size: int):
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, got {blocks} blocks of {block_size}")
        self.blocks = blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """Forget every owner and every name: for after an interrupt, when the tables of the broken call are gone."""
        self._references = [0] * self.blocks
        # A stack: the block freed last is taken first, so a small working set stays in the processor's caches and
        # memory that no call has needed yet is never touched (a first touch costs ten times a copy on a CPU).
        self._free = list(range(self.blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, without an owner; the first is the oldest
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks without an owner, idle ones included."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    # -- owners --------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, one reference each. ValueError, and nothing taken, when there are fewer."""
        if not 0 <= count <= self.free:
            raise ValueError(f"{count} blocks asked of a pool with {self.free} free")
        for _ in range(count - len(self._free)):
            block = next(iter(self._idle))
            self.forget(block)  # which puts it among the free ones
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        for block in taken:
            self._references[block] = 1
        return taken

    def fork(self, table: Sequence[int]) -> list[int]:
        """A second table over the same blocks; idle ones get their first owner."""
        references = self._references
        for block in table:
            if references[block] < 1 and block not in self._idle:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in table:
            if references[block] == 0:
                self._idle.pop(block, None)
            references[block] += 1
        return list(table)

    def unshare(self, table: list[int], index: int = -1) -> tuple[int, int] | None:
        """Make `table[index]` writable: None when it already is, else (source, destination), the copy to be made.

        The destination replaces the source in `table`. The source keeps its other owners and therefore its content,
        until the last of them frees it: copy before then. A block that stays loses its name: it is to be written.
        """
        source = table[index]
        if self._references[source] < 1:
            raise ValueError(f"block {source} is free and cannot be written")
        if self._references[source] == 1:
            self.forget(source)
            return None
        (destination,) = self.allocate(1)
        self._references[source] -= 1
        table[index] = destination
        return source, destination

    def release(self, table: list[int]) -> None:
        """Give up a table's references and empty it. ValueError when a block of it is already free."""
        references = self._references
        for block in reversed(table):  # the end of a prefix is of no use without its beginning: it goes idle first
            if references[block] < 1:
                raise ValueError(f"block {block} freed twice")
            references[block] -= 1
            if references[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.clear()

    # -- names ---------------------------------------------------------------------------------------------------

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` that is known; `fork` makes them a table's."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks have no owner: so many fewer are free once they are shared."""
        return sum(block in self._idle for block in blocks)

    def name(self, block: int, name: bytes) -> None:
        """The block holds, or will hold before anybody reads it, what `name` stands for. A name that is taken stays
        where it is. ValueError for a block without an owner."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is free and cannot be named")
        if name not in self._named:
            self.forget(block)
            self._named[name] = block
            self._names[block] = name

    def forget(self, block: int) -> None:
        """The block has no name any more."""
        name = self._names.pop(block, None)
        if name is not None:
            del self._named[name]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def flush(self) -> None:
        """Forget all names: what is idle is free, what is owned stays owned."""
        for block in reversed(list(self._names)):
            self.forget(block)

    def check(self, tables: Iterable[list[int]]) -> None:
        """Every invariant, given all living tables: AssertionError on a leak, a double owner or a wrong count."""
        held = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._references):
            assert count == held[block], f"block {block}: {count} references counted, {held[block]} held"
        vacant = [*self._free, *self._idle]
        assert len(set(vacant)) == len(vacant), "a block is in the free list twice"
        assert all(self._references[block] == 0 for block in vacant), "a free block has an owner"
        assert len(vacant) + len(held) == self.blocks, "a block is neither free nor owned"
        assert {name: block for block, name in self._names.items()} == self._named, "two blocks have one name"
        assert set(self._idle) <= set(self._names), "an idle block has no name"
        assert not set(self._free) & set(self._names), "a free block has a name"
