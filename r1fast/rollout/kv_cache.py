"""Who owns which block of the key-value cache: counts only, no tensors, so that it can be tested as plain Python.

The cache is `blocks` blocks of `block_size` tokens (PagedAttention, Kwon et al. 2023, section 4). A sequence's
*table* is the list of the blocks that hold its tokens in order; only the last one may be partly filled. The n samples
of a group share the blocks of their prompt by reference count. A block is written by one owner only: a sequence whose
last, partly filled block is shared takes a copy of it first (`unshare`, copy on write; the caller moves the data).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks with reference counts. It never grows; running out is the scheduler's business."""

    def __init__(self, blocks: int, block_size: int):
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, got {blocks} blocks of {block_size}")
        self.blocks = blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """Forget every owner: for after an interrupt, when the tables of the broken call are gone."""
        self._references = [0] * self.blocks
        # A stack: the block freed last is taken first, so a small working set stays in the processor's caches and
        # memory that no call has needed yet is never touched (a first touch costs ten times a copy on a CPU).
        self._free = list(range(self.blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, one reference each. ValueError, and nothing taken, when there are fewer."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks asked of a pool with {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        for block in taken:
            self._references[block] = 1
        return taken

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks."""
        references = self._references
        for block in table:
            if references[block] < 1:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in table:
            references[block] += 1
        return table.copy()

    def unshare(self, table: list[int], index: int = -1) -> tuple[int, int] | None:
        """Make `table[index]` writable: None when it already is, else (source, destination), the copy to be made.

        The destination replaces the source in `table`. The source keeps its other owners and therefore its content,
        until the last of them frees it: copy before then.
        """
        source = table[index]
        if self._references[source] < 1:
            raise ValueError(f"block {source} is free and cannot be written")
        if self._references[source] == 1:
            return None
        (destination,) = self.allocate(1)
        self._references[source] -= 1
        table[index] = destination
        return source, destination

    def release(self, table: list[int]) -> None:
        """Give up a table's references and empty it. ValueError when a block of it is already free."""
        references = self._references
        for block in reversed(table):
            if references[block] < 1:
                raise ValueError(f"block {block} freed twice")
            references[block] -= 1
            if references[block] == 0:
                self._free.append(block)
        table.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Every invariant, given all living tables: AssertionError on a leak, a double owner or a wrong count."""
        held = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._references):
            assert count == held[block], f"block {block}: {count} references counted, {held[block]} held"
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert all(self._references[block] == 0 for block in self._free), "a free block has an owner"
        assert len(self._free) + len(held) == self.blocks, "a block is neither free nor owned"
