"""Many processes as one: who does which part, and how each comes to know all of it.

Started by torchrun, every rank runs the same program on the same state; what is dear is split. Sampling, scoring and
log-probs are split by `share` and put together by `collect`, gradients by adding them up, so that after each step every
rank holds the same numbers and takes the same decisions. With one process all of it is free of cost and of torch's
process group.

Where a model lies on several ranks (tensor parallelism), these are peers: neighbours that draw, score and learn the
same, each with its part of every layer. The ranks are then a grid of data x tensor, and work is shared out over the
columns of the grid: `rank` and `size` count peers as one.

The engine is torch.distributed: NCCL between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from r1fast.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=30)  # of one collective: ranks may differ by a long response, not by more


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`. The methods are collectives: every rank must call them, in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None  # torch's process group; None: the one of all ranks
    all: World | None = None  # every process; None: these are all
    peers: World | None = None  # those that hold one model together with this one; None: it holds its own

    @property
    def everyone(self) -> World:
        """Every process of the run, peers counted one by one."""
        return self.all or self

    def of_peers(self, work: Callable[[], Result], failed: Exception | None = None) -> Result:
        """What `work` gives on the first of the peers, on each of them: for what is dear, or has effects outside, and
        must not be done once for every part of a model. failed: why this rank could not come so far; errors as of
        `map`."""

        def own() -> Result | None:
            if failed is not None:
                raise failed
            return work() if self.speaks_for_peers else None

        return own() if self.peers is None else self.peers.everywhere(own)[0]

    @property
    def speaks_for_peers(self) -> bool:
        """Whether this rank is the one of its peers that does what only one should."""
        return self.peers is None or self.peers.rank == 0

    def apart(self) -> World:
        """Every process, with a group of their own, over gloo: for a thread beside the one that computes."""
        ranks = self.everyone
        if ranks.size == 1:
            return self
        import torch.distributed as dist

        return World(ranks.rank, ranks.size, dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.everyone.rank == 0

    def share(self, costs: Sequence[float]) -> list[list[int]]:
        """Which items each rank takes, of these costs: the dearest first, each to whoever has the least so far.

        The same on every rank, and each rank's items in their order. (No collective.)"""
        loads, taken = [0.0] * self.size, [[] for _ in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            loads[rank] += costs[item]
            taken[rank].append(item)
        return [sorted(items) for items in taken]

    def map(
        self, items: Sequence[Item], work: Callable[[list[Item]], list[Result]], costs: Sequence[float]
    ) -> list[Result]:
        """`work` of all items, in their order, on every rank; each rank does a share of it.

        A rank whose share is empty does nothing. What one rank raises is raised on all: none is left waiting."""
        if self.size == 1:
            return work(list(items))
        shares = self.share(costs)
        failed, done = None, []
        try:
            done = work([items[i] for i in shares[self.rank]]) if shares[self.rank] else []
        except Exception as error:  # told to all below
            failed = error
        parts = self.gather((failed and f"{type(failed).__name__}: {failed}", isinstance(failed, UserError), done))
        if failed is not None:
            raise failed
        for rank, (why, users, _) in enumerate(parts):
            if why is not None:
                raise UserError(why.split(": ", 1)[1]) if users else RuntimeError(f"rank {rank} failed: {why}")
        results: list[Any] = [None] * len(items)
        for share, (_, _, part) in zip(shares, parts, strict=True):
            for i, result in zip(share, part, strict=True):
                results[i] = result
        return results

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. Plain values and CPU tensors: it is pickled between the ranks of a run."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on the first rank, on every rank; the others only wait. Errors as of `map`."""
        return self.everyone.map([None], lambda own: [work() for _ in own], [1.0])[0]

    def everywhere(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives on each rank, on every rank. Errors as of `map`."""
        ranks = self.everyone
        return ranks.map(range(ranks.size), lambda own: [work() for _ in own], [1.0] * ranks.size)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether some process has it set."""
        if self.everyone.size == 1:
            return flags
        return tuple(map(any, zip(*self.everyone.gather(flags), strict=True)))

    def add(self, tensors: Sequence[Any]) -> None:
        """Replaces each tensor by the sum over all ranks, in place and in buckets."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        if self.everyone.size > 1:
            import torch.distributed as dist

            dist.barrier(self.everyone.group)


_BUCKET = 64 << 20  # bytes; one message of this size is as fast as any, and the copy stays small


def _buckets(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Consecutive tensors of one dtype, together at most _BUCKET bytes or a single one."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    yield bucket


# Within `joined` of a run whose models lie on several ranks: (this rank's place, the device mesh of its peers)
_grid: list[tuple[World, Any]] = []


def world() -> World:
    """This process's place; the only one where no process group has been joined."""
    if not os.environ.get("WORLD_SIZE"):
        return World()
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return _grid[0][0] if _grid else World(dist.get_rank(), dist.get_world_size())


def tensor_mesh() -> Any:
    """The device mesh of this rank's peers, one dimension; None where every rank holds its own models."""
    return _grid[0][1] if _grid else None


def launched() -> bool:
    """Whether torchrun started this process as one of several (or of one)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_here() -> int:
    """Ranks on this machine. UserError where the machines of the run have different numbers of them."""
    here, place = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world().everyone
    size = place.size
    if len(set(place.gather(here))) > 1 or size % here:
        raise UserError(
            f"parallel.shard=node needs the same number of processes on every machine, and this one has {here} of "
            f"{size}; give torchrun the same --nproc-per-node everywhere, or set parallel.shard=all"
        )
    return here


def shards(how: str) -> int:
    """Ranks that `parallel.shard=how` splits a weight over, of those that torchrun started. (No collective.)"""
    counted = {"all": "WORLD_SIZE", "node": "LOCAL_WORLD_SIZE"}.get(how, "")
    return int(os.environ.get(counted, "1"))


@contextmanager
def joined(device: str, tensor: int = 1) -> Iterator[World]:
    """Within the block this process is one of those that torchrun started; alone where it was not started so.

    device: "cuda" takes one GPU for each process of a machine (LOCAL_RANK), "cpu" talks over gloo. tensor: consecutive
    ranks that hold each model together. UserError where these processes cannot be grouped so."""
    started = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if started % tensor:
        raise UserError(
            f"parallel.tensor={tensor} needs a number of processes that is a multiple of it, and "
            f"{'torchrun started' if launched() else 'here is'} {started}: start them with "
            f"torchrun --nproc-per-node {tensor} -m r1fast.train ..."
        )
    if not launched():
        yield World()
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local + 1} or more processes here, but the machine has "
                f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        with grouped(device, tensor):
            yield world()
    finally:
        dist.destroy_process_group()


@contextmanager
def grouped(device: str, tensor: int) -> Iterator[None]:
    """Within the block, `tensor` consecutive ranks hold each model together; 1: each rank its own. The number of ranks
    must be a multiple of it."""
    from torch.distributed.device_mesh import init_device_mesh

    before, every = _grid.copy(), world().everyone
    if tensor == 1:
        _grid.clear()
    else:
        mesh = init_device_mesh(device, (every.size // tensor, tensor), mesh_dim_names=("data", "tensor"))
        data, peers = (World(m.get_local_rank(), m.size(), m.get_group()) for m in (mesh["data"], mesh["tensor"]))
        _grid[:] = [(World(data.rank, data.size, data.group, every, peers), mesh["tensor"])]
    try:
        yield
    finally:
        _grid[:] = before
