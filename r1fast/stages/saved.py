"""What a snapshot's files hold: one `state.pt`, and the shards of a run whose weights lie on many ranks.

State that no rank holds whole is never put together: torch.distributed.checkpoint has each rank write its own shards,
as safetensors, and any number of ranks, or one, reads from them the parts it needs. `state.pt` then says where they
belong. Neither format runs code on reading: `weights_only`, and no pickle for the shards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1fast.config import UserError
from r1fast.model.tensor_parallel import PARTS
from r1fast.parallel import World

STATE = "state.pt"
# Key of a dict that stands in state.pt for a sharded tensor: [name, shape], and of tensor parallelism which dimension.
_STANDS_FOR = "tensor in the shards"


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """`tree` with a mark for every sharded tensor, and those by the mark's name. Every rank finds the same names."""
    shards: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: visit(one, f"{path}.{key}") for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(visit(one, f"{path}.{i}") for i, one in enumerate(value))
        if not _is_sharded(value):
            return value
        shards[path[1:]] = value.detach()
        dim = [value.placements[0].dim] if _is_part(path) else []
        return {_STANDS_FOR: [path[1:], list(value.shape), *dim]}

    return visit(tree, ""), shards


def join(tree: Any, shards: dict[str, Tensor]) -> Any:
    """The tree that was split."""
    if isinstance(tree, dict):
        if tree.keys() == {_STANDS_FOR}:
            return shards[tree[_STANDS_FOR][0]]
        return {key: join(one, shards) for key, one in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(join(one, shards) for one in tree)
    return tree


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _is_part(name: str) -> bool:
    """Whether the tensor is a piece of a weight that several ranks hold together (model/tensor_parallel.py)."""
    return name.rpartition(".")[0].endswith(f".{PARTS}")


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree."""
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from leaves(value)


def copied(tree: Any) -> Any:
    """A copy on the CPU that the next steps do not change, of a tree without sharded tensors."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return type(tree)(copied(value) for value in tree) if isinstance(tree, list | tuple) else tree


# -- shards -------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: dict[str, Tensor], place: World, background: bool) -> Callable[[], list[str]]:
    """Begins to write every rank's shards into `folder`. Where it is done in the background they are copied at once, so
    that they may change. What is returned waits for the writing and gives the names of this rank's files; it raises
    what failed. A collective of `place`, which must have a group of its own where it is done in the background."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    if background:
        under_way = dcp.async_save(shards, storage_writer=writer, process_group=place.group)
    else:
        with _first_cause():
            dcp.save(shards, storage_writer=writer, process_group=place.group)
        under_way = Future()
        under_way.set_result(None)

    def finished() -> list[str]:
        with _first_cause():
            under_way.result()
        return sorted(path.name for path in folder.glob(f"shard-{place.rank + 1:05d}-*.safetensors"))

    return finished


class _first_cause:
    """Raises the first rank's own error in place of the one that says that some failed (not an Exception even)."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failures = getattr(error, "failures", None)
        if isinstance(failures, dict) and failures:
            raise next(iter(failures.values()))[0] from None


def read(folder: Path, mesh: tuple[Any, Any] | None, parts: Any = None) -> dict[str, Any]:
    """The state in a snapshot's folder. Sharded tensors are cut for `mesh` (a device mesh and the placements of this
    run's own; see mesh_of), each rank reading its part alone; whole on the CPU where it is None.

    parts: the keys that are wanted; default: all. UserError where the shards are not all there."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=parts is not None)
    state = state if parts is None else {name: state[name] for name in parts if name in state}
    wanted = {name: (tuple(shape), dim[0] if dim else None) for name, shape, *dim in _marks(state)}
    return join(state, _read_shards(folder, wanted, mesh)) if wanted else state


def _marks(tree: Any) -> Iterator[list[Any]]:
    if isinstance(tree, dict):
        if tree.keys() == {_STANDS_FOR}:
            yield tree[_STANDS_FOR]
            return
        tree = tree.values()
    if not isinstance(tree, str | bytes) and hasattr(tree, "__iter__") and not isinstance(tree, Tensor):
        for value in tree:
            yield from _marks(value)


def _read_shards(
    folder: Path, wanted: dict[str, tuple[tuple[int, ...], int | None]], mesh: tuple[Any, Any] | None
) -> dict[str, Tensor]:
    """Cut where this run is split in the way of the run that wrote them; else whole, for who then takes its part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, empty

    reader = dcp.HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {}
    for name, (size, dim) in wanted.items():
        held = found.get(name)
        if held is None or tuple(held.size) != size or sum(math.prod(c.sizes) for c in held.chunks) != math.prod(size):
            raise UserError(f"{folder}: the shards do not hold all of {name!r}; --fresh starts the stage again")
        dtype = held.properties.dtype
        placements = None if mesh is None else mesh[1]
        if mesh is not None and placements is None and dim is not None:
            placements = [Shard(dim)]
        elif dim is not None:
            placements = None
        if placements is None:
            targets[name] = torch.empty(size, dtype=dtype)
        else:
            targets[name] = empty(size, dtype=dtype, device_mesh=mesh[0], placements=placements)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads for itself
        dcp.load(targets, storage_reader=reader, no_dist=True)
    return targets


def mesh_of(tree: Any) -> tuple[Any, Any] | None:
    """(device mesh, placements) of the sharded tensors in `tree`; None where there is none. Placements are None where
    they are each weight's own (tensor parallelism)."""
    name, found = next(iter(split(tree)[1].items()), ("", None))
    return None if found is None else (found.device_mesh, None if _is_part(name) else found.placements)
