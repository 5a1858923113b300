"""The running sequences as arrays, so that a step of decoding costs a handful of vector operations and no Python loop.

Row r of every array is one running sequence; rows 0..size-1 are in use and are packed together again when sequences
leave. What is drawn lies in a store of its own, which does not move: `store[r]` names the row's place there. The arrays
are numpy's and the tensors given to the model are views of the same memory, so on a CPU nothing is copied; on a GPU a
step copies these few kilobytes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1fast.model.paged import PagedStep
from r1fast.rollout.scheduler import Prefill
from r1fast.rollout.scheduler import Sequence as Running

_INT64 = (
    "length",  # tokens in the cache; the position of `token`
    "slot",  # where the cache takes `token`: block * block_size + offset
    "token",  # drawn last, not in the cache yet
    "capacity",  # tokens that the row's blocks hold
    "drawn",  # tokens drawn so far
    "limit",  # tokens to draw at most
    "store",  # row of the store
    "min_tokens",  # before so many are drawn, none of them is a stop token
    "seed",
    "key",  # names the sequence to the noise
)
_INT32 = ("context", "top_k")  # context: length + 1, what the attention of the next step sees
_FLOAT32 = ("temperature", "top_p")


class Drawn(NamedTuple):
    """What a step drew for the rows of the batch from some row on: of row i the first `counts[i]` of K columns.

    The other columns hold anything that is finite: a log-probability that is not says that the model is broken.
    """

    tokens: NDArray[np.int64]  # [rows, K]
    logprobs: NDArray[np.float32]  # [rows, K], nats, of the distribution each was drawn from
    logprobs_full: NDArray[np.float32]  # [rows, K], of the untruncated one at the same temperature
    counts: NDArray[np.int64]  # [rows], from 1 to K


class RunningBatch:
    """Room for `rows` sequences of at most `width` blocks that draw at most `longest` tokens each; `reserve` widens."""

    def __init__(self, rows: int, width: int, longest: int, block_size: int, device: torch.device | str = "cpu"):
        """device: of the model."""
        self.rows, self.width, self.longest, self.block_size = rows, width, longest, block_size
        self.device = torch.device(device)
        # Fields of one type are the rows of one array: packing takes four operations instead of fifteen.
        self._packed = [
            np.zeros((len(_INT64), rows), np.int64),
            np.zeros((len(_INT32), rows), np.int32),
            np.zeros((len(_FLOAT32), rows), np.float32),
        ]
        fields = zip((_INT64, _INT32, _FLOAT32), self._packed, strict=True)
        self._arrays = {name: array[i] for names, array in fields for i, name in enumerate(names)}
        self._tensors = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        self._table = np.full((rows, width), -1, np.int32)
        self._whole_table = torch.from_numpy(self._table)
        self._stop_ids = np.full((rows, 0), -1, np.int64)
        self._tokens = np.empty((rows, longest), np.int64)
        self._logprobs = np.empty((rows, longest), np.float32)
        self._logprobs_full = np.empty((rows, longest), np.float32)
        self.changes = 0  # of rows and tables, all calls together; `advance` and `record` are not counted
        self.clear()

    def clear(self) -> None:
        """Empty the batch for a new call."""
        self.sequences: list[Running] = []
        self._places = list(range(self.rows))  # free rows of the store
        self._some_wait = False  # whether a row may have min_tokens still to draw
        self._reserved = False  # whether a row may have a block for tokens further ahead
        self._resized()

    def reserve(self, width: int, longest: int) -> None:
        """Room for tables of `width` blocks and `longest` tokens to draw; what is there stays. At least doubles what it
        widens, so that it happens rarely."""
        width = width if width <= self.width else max(width, 2 * self.width)
        longest = longest if longest <= self.longest else max(longest, 2 * self.longest)
        if width > self.width:
            table = np.full((self.rows, width), -1, np.int32)
            table[:, : self.width] = self._table
            self._table, self._whole_table, self.width = table, torch.from_numpy(table), width
            self._resized()
        if longest > self.longest:
            for name in ("_tokens", "_logprobs", "_logprobs_full"):
                old = getattr(self, name)
                wider = np.empty((self.rows, longest), old.dtype)
                wider[:, : self.longest] = old
                setattr(self, name, wider)
            self.longest = longest

    @property
    def size(self) -> int:
        return len(self.sequences)

    def _resized(self) -> None:
        """New views of the rows in use, once for all the steps until the next sequence comes or goes.

        view, tensor: each array by its name, [size]. stop_ids: int64 [size, S], the tokens that end a row, -1 for none.
        table: int32 [size, columns].
        """
        self.changes += 1
        size = len(self.sequences)
        self.view = {name: array[:size] for name, array in self._arrays.items()}
        self.tensor = {name: tensor[:size] for name, tensor in self._tensors.items()}
        self.stop_ids = self._stop_ids[:size]
        self._narrow()

    def _narrow(self) -> None:
        """Of the table only the columns that some row uses: the attention reads no more."""
        columns = int(self.view["capacity"].max(initial=0)) // self.block_size
        self.table = self._whole_table[: self.size, :columns]

    # -- sequences come and go -----------------------------------------------------------------------------------

    def append(self, prefills: Sequence[Prefill]) -> None:
        """Rows for the launched sequences of these prefills, in order; their next tokens are still to be drawn."""
        sequences = [sequence for prefill in prefills for sequence in prefill.sequences]
        rows, arrays, block = slice(self.size, self.size + len(sequences)), self._arrays, self.block_size
        counts = [len(prefill.sequences) for prefill in prefills]
        requests = [prefill.request for prefill in prefills]
        arrays["limit"][rows] = np.repeat([request.limit for request in requests], counts)
        for name in ("seed", "key", "temperature", "top_k", "top_p", "min_tokens"):
            arrays[name][rows] = np.repeat([getattr(request.draws, name) for request in requests], counts)
        arrays["key"][rows] += [sequence.sample for sequence in sequences]
        length = np.array([len(prefill.tokens) for prefill in prefills for _ in prefill.sequences])
        blocks = np.array([len(sequence.table) for sequence in sequences])
        width = blocks.max()
        tables = np.array([sequence.table + [-1] * (width - len(sequence.table)) for sequence in sequences])
        self._table[rows] = -1
        self._table[rows, :width] = tables
        arrays["capacity"][rows] = blocks * block
        arrays["slot"][rows] = tables[np.arange(len(tables)), length // block] * block + length % block
        arrays["length"][rows] = length
        arrays["context"][rows] = length + 1
        arrays["store"][rows] = places = [self._places.pop() for _ in sequences]
        arrays["drawn"][rows] = [len(sequence.tokens) for sequence in sequences]
        for place, sequence in zip(places, sequences, strict=True):
            if sequence.tokens:  # it was preempted
                self._tokens[place, : len(sequence.tokens)] = sequence.tokens
                self._logprobs[place, : len(sequence.tokens)] = sequence.logprobs
                self._logprobs_full[place, : len(sequence.tokens)] = sequence.logprobs_full
        self._append_stops(rows, [request.draws.stop_ids for request in requests], counts)
        self._some_wait |= any(request.draws.min_tokens for request in requests)
        self.sequences += sequences
        self._resized()

    def _append_stops(self, rows: slice, stops: list[tuple[int, ...]], counts: list[int]) -> None:
        most = max(map(len, stops))
        if most > self._stop_ids.shape[1]:
            wider = np.full((self.rows, most), -1, np.int64)
            wider[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = wider
        columns = self._stop_ids.shape[1]
        padded = [ids + (-1,) * (columns - len(ids)) for ids in stops]
        self._stop_ids[rows] = np.repeat(np.array(padded, np.int64).reshape(len(stops), columns), counts, 0)

    def output(self, row: int) -> tuple[list[int], list[float], list[float]]:
        """Tokens that the row has drawn, their log-probabilities, and the untruncated ones."""
        place, drawn = self._arrays["store"][row], self._arrays["drawn"][row]
        stores = (self._tokens, self._logprobs, self._logprobs_full)
        return tuple(store[place, :drawn].tolist() for store in stores)

    def remove(self, rows: Sequence[int]) -> None:
        """Take rows out and pack the others, in their order."""
        keep = np.ones(self.size, bool)
        keep[rows] = False
        keep = keep.nonzero()[0]
        self._places.extend(self._arrays["store"][rows].tolist())
        for array in self._packed:
            array[:, : len(keep)] = array[:, keep]
        self._table[: len(keep)] = self._table[keep]
        self._stop_ids[: len(keep)] = self._stop_ids[keep]
        self.sequences = [self.sequences[row] for row in keep.tolist()]
        self._resized()

    # -- one step of decoding ------------------------------------------------------------------------------------

    def full(self, ahead: int = 1) -> list[int]:
        """Rows without room for the keys and values of their next `ahead` tokens, or as many as they may still draw."""
        view = self.view
        room = view["capacity"] - view["length"]
        if ahead == 1:
            return (room == 0).nonzero()[0].tolist()
        return (room < np.minimum(ahead, view["limit"] - view["drawn"])).nonzero()[0].tolist()

    def extend(self, rows: Sequence[int]) -> None:
        """Take over the new last block of these rows' sequences."""
        block, capacity = self.block_size, self._arrays["capacity"]
        blocks = np.array([self.sequences[row].table[-1] for row in rows], np.int64)
        rows = np.array(rows, np.int64)  # may be none: all that were full are preempted
        held = capacity[rows]
        self._table[rows, held // block] = blocks
        full = self._arrays["length"][rows] == held  # else the block is for tokens further ahead
        self._reserved |= not full.all()
        self._arrays["slot"][rows[full]] = blocks[full] * block
        capacity[rows] = held + block
        self.changes += 1
        self._narrow()

    def step(self) -> PagedStep:
        """One token of every row, for the decoder."""
        tensor = self.tensor
        inputs = (tensor["token"], tensor["length"], tensor["slot"], self.table, tensor["context"])
        return PagedStep(*self.on_device(inputs))

    def advance(self, counts: NDArray[np.int64] | int | None = None) -> None:
        """The keys and values of the step's tokens are in the cache: `counts` [size] of each row, None for one each."""
        int64, int32, _ = self._packed
        size = self.size
        if counts is None and self._reserved:
            counts = 1  # the next slot may be in a block that the row has already
        if counts is None:
            int64[:2, :size] += 1  # length and slot
            int32[:1, :size] += 1  # context
            return
        view, block = self.view, self.block_size
        length = view["length"]
        length += counts
        view["context"][:] = length + 1
        column = np.minimum(length // block, self.width - 1)  # one past the table where the row is full: see `extend`
        view["slot"][:] = self._table[np.arange(size), column].astype(np.int64) * block + length % block

    def noise(self, first: int) -> Iterator[Tensor]:
        """seed, sequence, position, temperature, top_k, top_p of the rows from `first` on, for `sample_token`."""
        tensor = self.tensor
        names = ("seed", "key", "length", "temperature", "top_k", "top_p")
        return self.on_device(tensor[name][first:] if first else tensor[name] for name in names)

    def waiting(self, first: int) -> Tensor | None:
        """bool [rows from `first` on]: those that must not stop yet; None where there is none."""
        if not self._some_wait:
            return None
        waits = self.view["drawn"] < self.view["min_tokens"]
        if not waits.any():
            self._some_wait = False
            return None
        return torch.from_numpy(waits[first:]) if waits[first:].any() else None

    def record(self, first: int, drawn: Drawn) -> list[int]:
        """Store what the rows from `first` on have drawn; returns those rows that are finished by it."""
        view = self.view if not first else {name: array[first:] for name, array in self.view.items()}
        store, count = view["store"], view["drawn"]
        if drawn.tokens.shape[1] == 1:
            tokens = drawn.tokens[:, 0]
            self._tokens[store, count] = tokens
            self._logprobs[store, count] = drawn.logprobs[:, 0]
            self._logprobs_full[store, count] = drawn.logprobs_full[:, 0]
            count += 1
        else:
            row, column = (np.arange(drawn.tokens.shape[1]) < drawn.counts[:, None]).nonzero()
            place = store[row], count[row] + column
            self._tokens[place] = drawn.tokens[row, column]
            self._logprobs[place] = drawn.logprobs[row, column]
            self._logprobs_full[place] = drawn.logprobs_full[row, column]
            tokens = drawn.tokens[np.arange(len(drawn.tokens)), drawn.counts - 1]
            count += drawn.counts
        view["token"][:] = tokens
        stopped = (self.stop_ids[first:] == tokens[:, None]).any(1)
        return ((stopped | (count == view["limit"])).nonzero()[0] + first).tolist()

    def stopped(self, row: int) -> bool:
        """Whether the last token drawn by the row is one of its stop tokens."""
        return bool((self.stop_ids[row] == self._arrays["token"][row]).any())

    def on_device(self, tensors) -> Iterator[Tensor]:
        if self.device.type == "cpu":
            return iter(tensors)
        return (tensor.to(self.device) for tensor in tensors)
