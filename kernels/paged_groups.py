"""Which rows of a decode step read the same stretch of the cache, so that it is read once for all of them.

A context is cut every `PIECE` positions, and attention over a piece depends on nothing but the piece's blocks. The rows
of a batch whose tables name the same blocks in a piece (the samples of a prompt; behind a common template, all rows)
can therefore be attended to it together, whatever comes before and after it (Hydragen, Juravsky et al. 2024;
FlashInfer's cascade, of any number of levels, as each piece has groups of its own).
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 256  # positions; csrc/cuda/paged_attention.h has the same number
# What grouping costs: Triton's tiles have 64 query rows where 16 would do for a row that is alone, 64 FLOP per byte of
# a 16-bit cache against the 180 that an H100's tensor cores do while one arrives; so a row alone stays bound by memory,
# with half of the margin gone. (Those of CUDA C++ have as many rows as there are, by 16.) What it saves is one read of
# the piece's keys and values (PIECE * heads * width * 4 bytes) for each row that joins another; its sums are written
# and read in either case. So nothing shorter than a piece (16 blocks of 16) is shared, and an eighth of the reads must
# be saved to be sure of a gain. A model of the bytes: no GPU has measured it yet.
LEAST_SAVED = 1 / 8


def pieces_of(columns: int, block: int) -> int:
    """Pieces that tables of so many blocks hold; at least one."""
    return max(-(-columns * block // PIECE), 1)


def same_as_before(block_tables: Tensor, block: int) -> Tensor:
    """bool [P, S]: whether a row has in a piece the same blocks as the row before it. A -1 is no block.

    block_tables: int32 [S, M]. No host is asked.
    """
    rows, columns = block_tables.shape
    same = torch.zeros(rows, columns, dtype=torch.bool, device=block_tables.device)
    same[1:] = (block_tables[1:] == block_tables[:-1]) & (block_tables[1:] >= 0)
    # A piece need not begin or end with a block; beyond the table there is nothing to differ.
    pieces = torch.arange(pieces_of(columns, block), device=block_tables.device)
    differ = torch.zeros(rows, columns + 1, dtype=torch.int32, device=block_tables.device)
    differ[:, 1:] = (~same).int().cumsum(1)
    first = (pieces * PIECE // block).clamp(max=columns)
    last = (((pieces + 1) * PIECE - 1) // block + 1).clamp(max=columns)
    return ((differ[:, last] == differ[:, first]) & (last > first)).T


def find_groups(block_tables: Tensor, block: int) -> Tensor:
    """int32 [P, S] for `paged_attention`: the rows from groups[p, s] to s have the same blocks in piece p.

    block_tables: int32 [S, M], -1 where a row has no block. block: positions of one. Neighbours alone are compared, so
    the samples of a prompt should follow one another. No host is asked.
    """
    row = torch.arange(block_tables.shape[0], device=block_tables.device)
    return torch.where(same_as_before(block_tables, block), 0, row).cummax(1).values.int()


def worth_grouping(groups: Tensor, context_lens: Tensor) -> bool:
    """Whether reading each group's pieces once saves enough of what the rows would read one by one; asks the host."""
    saved = int(context_lens.sum()) - positions_read(groups, context_lens)
    return saved > 0 and saved >= LEAST_SAVED * int(context_lens.sum())


def positions_read(groups: Tensor, context_lens: Tensor) -> int:
    """Positions whose keys and values are read: those of a group's piece once; asks the host."""
    begin = torch.arange(len(groups), device=groups.device)[:, None] * PIECE
    leads = groups == torch.arange(groups.shape[1], device=groups.device)
    return int((leads * (context_lens - begin).clamp(0, PIECE)).sum())
