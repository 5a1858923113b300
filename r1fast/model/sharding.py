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


def shard(model: nn.Module) -> None:
    """Splits the weights over all ranks, in place; every rank must hold the same ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world().size,))
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
    """`tree` with every sharded tensor put together, on the CPU: what a snapshot holds for any number of ranks."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    if isinstance(tree, Tensor) and hasattr(tree, "full_tensor"):
        return tree.full_tensor().cpu()
    return tree


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of the whole tensor `value`, if `like` is sharded and of its shape; else `value`."""
    if not hasattr(like, "device_mesh") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors."""
    ours = model.state_dict()
    model.load_state_dict({name: shared_like(value, ours[name]) for name, value in state.items()})
