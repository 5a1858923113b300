"""A model's weights over many ranks: FSDP2, with the weights gathered once where they are used many times.

Each rank holds a share of every weight, and so of its gradient and optimizer state (Rajbhandari et al. 2020, ZeRO). The
weights are one group: they are gathered once before sampling, once before a step's micro-batches, and given back after
the backward of the last one, when the gradients are added up and scattered. That costs a rank the full weights and the
full gradient while they are in use, and a share of the rest.

Everything here does nothing to a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from r1fast.parallel import world

# What is called from outside; FSDP gathers the weights before each of them.
_FORWARDS = ("forward_packed", "forward_paged", "logits")


def shard(model: nn.Module, within: int | None = None) -> None:
    """Splits the weights over all ranks, in place; every rank must hold the same ones.

    within: over groups of so many consecutive ranks, each of which holds all of them (HSDP): weights are then gathered
    within a group, where links are fast, and only shares of the gradient are added up between the groups."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device, size = next(model.parameters()).device.type, world().size
    if within in (None, size):
        mesh = init_device_mesh(device, (size,))
    else:
        mesh = init_device_mesh(device, (size // within, within), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.set_gradient_divide_factor(1.0)  # denominators are global already: gradients are added, not averaged
    model.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for name in _FORWARDS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block every weight is whole on this rank. A collective, like all that follows."""
    if not is_sharded(model):
        yield
        return
    with torch.inference_mode(False):
        model.unshard()
    try:
        yield
    finally:
        model.reshard()


def synchronise(model: nn.Module, last: bool) -> None:
    """Before a micro-batch's forward: whether its backward is the step's last one, in which the gradients are added up
    and the weights given back."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def whole(tree: Any) -> Any:
    """`tree` with every sharded tensor put together, on the CPU."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    if isinstance(tree, Tensor) and hasattr(tree, "full_tensor"):
        return tree.full_tensor().cpu()
    return tree


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of the whole tensor `value`, if `like` is sharded and of its shape; else, and where `value` is
    a share already, `value`."""
    if not hasattr(like, "device_mesh") or hasattr(value, "device_mesh") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors, or of shares."""
    ours = model.state_dict()
    model.load_state_dict({name: shared_like(value, ours[name]) for name, value in state.items()})
