"""Decoding that does not ask the host after each token: a step as tensor operations, replayed as a CUDA graph.

On a GPU a step of decoding takes less than launching its kernels one by one, and a host that reads every token waits
once a step. Here the rows of the batch live on the device, and one step (the layers, the head, the draw, the stop
rules, the next position and slot) moves them on by itself; so it can be captured once and replayed several times before
the host looks (nano-vllm leaves the head, the draw and the block tables outside of its graphs, and looks every time).

A row that has ended, or that only fills the step up to a size there is a graph for, goes through the motions in the
cache's scratch block. Sizes: `BUCKETS` of rows, powers of two of table columns; each graph is captured when it is first
needed, all in one memory pool, and stays right after weight updates, which happen in place.

Samples of a prompt read its blocks together (`paged_attention`'s groups). Who shares what changes only when rows come
and go, so the host finds the groups where it sends the rows, and a step with groups is a graph of its own.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1fast.model.decoder import Decoder
from r1fast.model.paged import PagedKV, PagedStep
from r1fast.rollout.batch import Drawn, RunningBatch
from r1fast.rollout.engine import StepEngine, take_stops
from r1fast_kernels import sample_token
from r1fast_kernels.paged_groups import find_groups, pieces_of, worth_grouping

BUCKETS = (1, 2, 4, 8, *range(16, 513, 16))  # beyond: multiples of 64
_INT64 = ("token", "length", "drawn", "limit", "min_tokens", "seed", "key")  # of RunningBatch's arrays
_FLOAT32 = ("temperature", "top_p")
Shape = tuple[int, int, bool, bool]  # of a step: rows, columns, whether some wait, whether some share pieces

log = logging.getLogger("r1fast.rollout")


def bucket(rows: int) -> int:
    """The smallest size of a step that holds `rows` rows."""
    return next((size for size in BUCKETS if size >= rows), -(-rows // 64) * 64)


def columns_for(blocks: int) -> int:
    """The smallest number of table columns, a power of two, that holds `blocks`."""
    return 1 << max(0, blocks - 1).bit_length()


class DeviceRows:
    """The rows of a batch on the model's device, and the step that moves them on.

    rows: room for so many. columns: of their tables, blocks of `block` positions. stops: stop tokens of a row at most.
    steps: between two reads.
    """

    def __init__(self, rows: int, columns: int, stops: int, steps: int, block: int, device: torch.device):
        self.rows, self.columns, self.stops, self.steps, self.block = rows, columns, stops, steps, block

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self._int64 = zeros(len(_INT64), rows, dtype=torch.int64)
        self._float32 = zeros(len(_FLOAT32), rows, dtype=torch.float32).fill_(1)  # a top_p of 0 would be refused
        self._top_k = zeros(rows, dtype=torch.int32)
        self._alive = zeros(rows, dtype=torch.bool)
        self._table = zeros(rows, columns, dtype=torch.int32)
        self._groups = zeros(pieces_of(columns, block), rows, dtype=torch.int32)
        self._stop_ids = torch.full((rows, stops), -1, device=device, dtype=torch.int64)
        self._number = zeros(1, dtype=torch.int64)  # steps since the last read
        # What they drew, and in a last row how many: one copy brings both to the host.
        self._tokens = zeros(steps + 1, rows, dtype=torch.int64)
        self._logprobs = zeros(steps, 2, rows, dtype=torch.float32)  # of the distribution drawn from, and the whole one

    def fits(self, rows: int, columns: int, stops: int, steps: int, block: int) -> bool:
        wanted = (rows, columns, stops, steps)
        return self.block == block and all(map(int.__le__, wanted, (self.rows, self.columns, self.stops, self.steps)))

    def load(self, batch: RunningBatch, groups: Tensor | None) -> None:
        """The batch's rows as the host has them; all others are dead. groups: of the batch's table, if a step with
        groups is to follow."""
        self._load(batch.tensor, batch.table, torch.from_numpy(batch.stop_ids))
        if groups is not None:
            self._groups.copy_(torch.arange(self.rows))  # a row that only fills, and pieces nobody has: by themselves
            self._groups[: len(groups), : groups.shape[1]] = groups.to(self._groups.device)

    def load_tried(
        self, batch: RunningBatch, row: NDArray[np.int64], offset: NDArray[np.int64], tokens: Tensor
    ) -> None:
        """Rows for one step of tokens that are tried out: see StepEngine.draw_at."""
        index = torch.from_numpy(row)
        fields = {name: batch.tensor[name][index] for name in (*_INT64, *_FLOAT32, "top_k")}
        fields["token"], fields["length"] = tokens, fields["length"] + torch.from_numpy(offset)
        self._load(fields, batch.table[index], torch.full((len(row), 0), -1))

    def _load(self, fields: dict[str, Tensor], table: Tensor, stop_ids: Tensor) -> None:
        size, device = len(table), self._int64.device
        self._int64[:, :size] = torch.stack([fields[name] for name in _INT64]).to(device)
        self._float32[:, :size] = torch.stack([fields[name] for name in _FLOAT32]).to(device)
        self._top_k[:size] = fields["top_k"].to(device)
        self._table[:size, : table.shape[1]] = table.to(device)
        self._table[size:, 0] = 0
        self._stop_ids.fill_(-1)
        self._stop_ids[:size, : stop_ids.shape[1]] = stop_ids.to(device)
        self._alive[:size] = True
        self._alive[size:] = False

    def park(self) -> None:
        """No row is alive: a step changes nothing but the scratch block. `load` brings them back."""
        self._alive.zero_()

    def step(self, model: Decoder, kv: PagedKV, rows: int, columns: int, wait: bool, grouped: bool) -> None:
        """One token of the first `rows` rows that are alive, in place, by `columns` columns of their tables.

        wait: some of them may not stop yet. grouped: they share pieces, as loaded. The host is not asked for anything.
        """
        row = dict(zip(_INT64, self._int64[:, :rows].unbind(0), strict=True))
        temperature, top_p = self._float32[:, :rows].unbind(0)
        alive, table = self._alive[:rows], self._table[:rows, :columns]
        position = torch.where(alive, row["length"], 0)
        block = table.gather(1, (position // kv.block_size).unsqueeze(1)).squeeze(1)
        slot = torch.where(alive, block * kv.block_size + position % kv.block_size, kv.scratch_slot)
        groups = self._groups[: pieces_of(columns, kv.block_size), :rows] if grouped else None
        step = PagedStep(row["token"], position, slot, table, (position + 1).int(), groups=groups)
        logits = model.logits(model.forward_paged(step, kv))
        correction = 0.0
        if wait:
            waits = alive & (row["drawn"] < row["min_tokens"])
            correction = take_stops(logits, waits, self._stop_ids[:rows], temperature)
        noise = (row["seed"], row["key"], position + 1, temperature, self._top_k[:rows], top_p)
        drawn = sample_token(logits, *noise)
        self._record(row, alive, drawn.token, torch.stack((drawn.logprob, drawn.logprob_full + correction)))

    def _record(self, row: dict[str, Tensor], alive: Tensor, token: Tensor, logprobs: Tensor) -> None:
        rows = len(alive)
        row["token"].copy_(torch.where(alive, token, row["token"]))
        self._tokens[:, :rows].index_copy_(0, self._number, row["token"].unsqueeze(0))
        self._logprobs[:, :, :rows].index_copy_(0, self._number, torch.where(alive, logprobs, 0.0).unsqueeze(0))
        for counter in (row["length"], row["drawn"], self._tokens[-1, :rows]):
            counter += alive
        self._number += 1
        ended = (self._stop_ids[:rows] == row["token"].unsqueeze(1)).any(1) | (row["drawn"] >= row["limit"])
        alive &= ~ended

    def take(self, steps: int, rows: int) -> Drawn:
        """What the first `rows` rows drew in the `steps` steps since the last time; the host waits for them."""
        tokens = self._tokens[[*range(steps), self.steps], :rows].cpu().numpy()
        logprobs = self._logprobs[:steps, :, :rows].cpu().numpy()
        self._number.zero_()
        self._tokens[-1].zero_()
        return Drawn(tokens[:steps].T, logprobs[:, 0].T, logprobs[:, 1].T, tokens[steps])


class GraphEngine(StepEngine):
    """Decodes up to `steps` tokens a row before the host looks; on a GPU by CUDA graphs.

    Where a step cannot be captured (an op whose backend asks the host), the log says why, and the same steps run one
    kernel at a time; so they do on a CPU.
    """

    def __init__(self, model: Decoder, steps: int = 8):
        super().__init__(model)
        self.ahead = steps
        self._rows: DeviceRows | None = None
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[Shape, torch.cuda.CUDAGraph | None] = {}
        self._pool = self._held = None
        self._seen = -1
        self._groups: tuple[int, Tensor | None] = -1, None

    def begin(self, kv: PagedKV, batch: RunningBatch) -> None:
        super().begin(kv, batch)
        self._seen = -1
        self._groups = -1, None

    def release(self) -> None:
        super().release()
        self._rows = None
        self._forget()

    @torch.inference_mode()
    def decode(self, ahead: int) -> Drawn:
        batch = self._batch
        left = int((batch.view["limit"] - batch.view["drawn"]).max())
        steps, size = min(ahead, left, self.ahead), batch.size
        groups = self._find_groups()
        shape = bucket(size), columns_for(batch.table.shape[1]), batch.waiting(0) is not None, groups is not None
        rows = self._room(*shape[:2])
        graph = self._graph(shape)
        if self._seen != batch.changes:
            rows.load(batch, groups)
            self._seen = batch.changes
        self._run(graph, steps, shape)
        drawn = rows.take(steps, size)
        batch.advance(drawn.counts)
        return drawn

    @torch.inference_mode()
    def draw_at(self, row: NDArray[np.int64], offset: NDArray[np.int64], tokens: NDArray[np.int64]) -> Drawn:
        shape = bucket(len(row)), columns_for(self._batch.table.shape[1]), False, False
        rows = self._room(*shape[:2])
        graph = self._graph(shape)
        rows.load_tried(self._batch, row, offset, torch.from_numpy(tokens))
        self._seen = -1
        self._run(graph, 1, shape)
        return rows.take(1, len(row))

    def _find_groups(self) -> Tensor | None:
        """Of the batch as it is, on the host; None where reading what its rows share once is not worth it."""
        batch = self._batch
        if self._groups[0] != batch.changes:
            groups = find_groups(batch.table, batch.block_size)
            self._groups = batch.changes, groups if worth_grouping(groups, batch.tensor["context"]) else None
        return self._groups[1]

    def _run(self, graph: torch.cuda.CUDAGraph | None, steps: int, shape: Shape) -> None:
        for _ in range(steps):
            if graph is None:
                self._rows.step(self.model, self._kv, *shape)
            else:
                graph.replay()

    def _room(self, rows: int, columns: int) -> DeviceRows:
        """The rows on the device; new ones, and new graphs, where the old ones are too small or their cache is gone."""
        batch, device = self._batch, self._kv.keys.device
        stops = batch.stop_ids.shape[1]
        if self._rows is None or not self._rows.fits(rows, columns, stops, self.ahead, self._kv.block_size):
            old = self._rows
            room = (max(rows, bucket(batch.rows)), columns_for(batch.width), stops, self.ahead)
            if old is not None:
                room = tuple(map(max, room, (old.rows, old.columns, old.stops, old.steps)))
            self._forget()
            self._rows = DeviceRows(*room, self._kv.block_size, device)
        # What a graph reads at fixed addresses. The rotary tables are made at their full length first, and kept, so
        # that nobody replaces them under a graph.
        tables = self.model.rope_tables(max(self.model.config.max_positions, self._rows.columns * self._kv.block_size))
        held = [self._kv.keys, self._kv.values, *tables, *self.model.parameters()]
        addresses = [tensor.data_ptr() for tensor in held]
        if self._held is None or self._held[0] != addresses:
            self._forget()
            self._held = addresses, held
        return self._rows

    def _graph(self, shape: Shape) -> torch.cuda.CUDAGraph | None:
        """The graph of one step of this shape, captured now where there is none yet; None: run it as it is."""
        if self._kv.keys.device.type != "cuda":
            return None
        if shape not in self._graphs:
            self._rows.park()
            self._seen = -1
            try:
                self._graphs[shape] = self._capture(shape)
            except RuntimeError as error:  # what asks the host ends the capture
                log.warning("no CUDA graph for decoding: %s; every kernel is launched by itself", error)
                self._graphs[shape] = None
        return self._graphs[shape]

    def _capture(self, shape: Shape) -> torch.cuda.CUDAGraph:
        # Kernels are compiled and libraries set up by ordinary steps first, on a stream of their own as capture asks.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._rows.step(self.model, self._kv, *shape)
                self._rows.take(1, 1)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # A learner beside the sampler (overlap=always) may allocate meanwhile; the default mode, `global`, forbids it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._rows.step(self.model, self._kv, *shape)
        self._rows.take(1, 1)
        return graph
