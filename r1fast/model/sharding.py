"""A model's weights over many ranks: FSDP2, layer by layer, and whole where they are sampled with.

Each rank holds a share of every weight, and so of its gradient and optimizer state (Rajbhandari et al. 2020, ZeRO). A
pass through the layers gathers one at a time and gives it back after it, in the backward pass too, whose gradients are
added up and scattered layer by layer; the embedding, the last norm and the head stay for the length of a pass. So no
rank ever needs room for the model, only for what it is working on. Sampling is the exception: every token needs all of
the weights, which are `gathered` once for many tokens.

Half weights that are trained are float32 in their shares, and are rounded as they are gathered: the shares are the
masters, and no rank holds both. Frozen ones are kept as they are.

Everything here does nothing to a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from r1fast.model.decoder import Layer
from r1fast.parallel import world

HALF = (torch.bfloat16, torch.float16)


def shard(model: nn.Module, within: int | None = None, device: str | None = None) -> None:
    """Splits the weights over all ranks, in place; every rank must hold the same ones. What is to be trained must be
    known (`requires_grad`). `model.forward_packed` is then a collective: every rank must call it as often.

    within: over groups of so many consecutive ranks, each of which holds all of them (HSDP): weights are then gathered
    within a group, where links are fast, and only shares of the gradient are added up between the groups.
    device: where the shares are to lie; default: where the model is. Only a share of it ever is there, so that a model
    which no device could hold is loaded on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    size, dtype = world().size, next(model.parameters()).dtype
    device = device or next(model.parameters()).device.type
    if within in (None, size):
        mesh = init_device_mesh(device, (size,))
    else:
        mesh = init_device_mesh(device, (size // within, within), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy()
    if dtype in HALF:
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*(module for module in model.modules() if isinstance(module, Layer)), model):
        for p in unit.parameters():  # of the model itself those that no layer has: the others are shares already
            if p.requires_grad and p.dtype in HALF:
                p.data = p.data.float()
        # the root stays for the backward pass, which begins with it and with what follows it (the head)
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not model, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)  # denominators are global already: gradients are added, not averaged
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, "forward_packed")
    model.gathered_dtype = dtype


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "gathered_dtype")


def used_in(model: nn.Module) -> torch.dtype:
    """The dtype that the weights are multiplied in, whatever their shares are kept in."""
    return model.gathered_dtype if is_sharded(model) else next(model.parameters()).dtype


def shards_of(model: nn.Module) -> int:
    """Ranks that hold the model together; 1 where it is whole."""
    mesh = getattr(next(filter(is_share, model.parameters()), None), "device_mesh", None)
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


def _units(model: nn.Module) -> list[Any]:
    """What is gathered as one: each layer, and the rest."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Within the block every weight is whole on this rank, also after a forward pass. A collective, like all that
    follows. True where it was this block that gathered them: what is written into them is then gone after it."""
    if not is_sharded(model) or not any(is_share(p) for p in model.parameters()):
        yield False
        return
    units = _units(model)
    with torch.inference_mode(False):
        for unit in units:
            unit.unshard()
    model.set_reshard_after_forward(False)
    try:
        yield True
    finally:
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)
        for unit in units:
            unit.reshard()


@contextmanager
def own_gathered(unit: nn.Module) -> Iterator[None]:
    """Within the block a layer's weights are whole on this rank; of a model, those that are in no layer."""
    if not any(is_share(p) for p in unit.parameters(recurse=False)):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def release(model: nn.Module) -> None:
    """After passes without a gradient: what the last of them left gathered is given back."""
    if is_sharded(model):
        model.reshard()
        if hasattr(model, "reset_iter_state"):  # torch >= 2.12; before, the order of passes grew by an entry a layer
            model.reset_iter_state()


def synchronise(model: nn.Module, last: bool) -> None:
    """Before a micro-batch's forward: whether its backward is the step's last one, after which the gradients, so far
    added up within each replica, are added up between the replicas."""
    if is_sharded(model):
        model.set_requires_all_reduce(last)


def is_share(value: Any) -> bool:
    """Whether it is a tensor of which this rank holds a part."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def own(value: Tensor) -> Tensor:
    """The part of it that this rank holds; all of it where it is whole. No copy."""
    return value.to_local() if is_share(value) else value


def place_of_share(value: Tensor) -> int:
    """Where the first of this rank's values lies in the whole tensor, flattened: shares are of consecutive rows."""
    if not is_share(value) or not value.numel():
        return 0
    mesh, rows = value.device_mesh, value.shape[0]
    each = -(-rows // mesh.size(mesh.ndim - 1))
    return min(rows, each * mesh.get_coordinate()[-1]) * (value.numel() // rows)


def whole(tree: Any) -> Any:
    """`tree` with every sharded tensor put together, on the CPU."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree.full_tensor().cpu() if is_share(tree) else tree


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of the whole tensor `value`, if `like` is sharded and of its shape; else, and where `value` is
    a share already, `value`. The dtype stays."""
    if not is_share(like) or is_share(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as of a model that is not sharded: in the dtype that the weights are used in."""
    return {name: value.to(used_in(model)) for name, value in model.state_dict().items()}


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors, or of shares."""
    ours = model.state_dict()
    model.load_state_dict({name: shared_like(value, ours[name]) for name, value in state.items()})
