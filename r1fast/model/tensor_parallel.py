"""One model over several ranks, each with a part of every layer: for a model that one card can't hold.

A rank has some of the heads (with their rows of q, k and v, and their columns of o), some of the MLP's inner units, and
some of the vocabulary (rows of the embedding and of the head): Megatron's split (Shoeybi et al. 2020, section 3), in
the terms of torch's DTensor: `PLAN` says which dimension of a weight is `Shard`ed over the mesh of the peers; all else
is `Replicate`d, which is norms and a few biases. The parameters are plain tensors, this rank's part, in the same fused
layout as a whole model's, so that every op and every kernel serves as it is, and optimizer, masters and adapters know
nothing of it. What is said of a weight to the world outside (files, snapshots) are its pieces as DTensors: q, k and v
each by itself, because rows of a rank are no stretch of the fused weight.

A layer costs two all-reduces of [tokens, hidden] forward and two backward, the embedding one, the head one backward.
Sums over ranks are `Partial` -> `Replicate`; on the way back a replicated input's gradient is. While sampling, logits
are gathered: each comes from one rank, so all ranks see the same bits, and draw the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.config import UserError
from r1fast.parallel import tensor_mesh
from r1fast_kernels import linear, linear_logprob

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from r1fast.model.decoder import Layer
    from r1fast.model.decoder_config import DecoderConfig
    from r1fast.schema import ShapeConfig

# weight -> the dimension that is split over the ranks; whatever is not named here is whole on each of them
PLAN = {
    "embedding": 0,
    "head": 0,
    **dict.fromkeys(("qkv_proj", "qkv_bias", "gate_up_proj", "gate_up_bias"), 0),  # column-parallel: outputs are split
    **dict.fromkeys(("o_proj", "down_proj"), 1),  # row-parallel: inputs are
}
PARTS = "tensor_parts"  # key of a dict that stands for a split weight: its pieces in order, DTensors or whole


class TensorParallel:
    """This rank's part in the models that `size` ranks hold together. All calls are collectives of these ranks."""

    def __init__(self, mesh: Any) -> None:
        """mesh: a DeviceMesh of one dimension."""
        import torch.distributed.tensor as d  # half a second, which only a run over several ranks pays

        self._d = d
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def __deepcopy__(self, memo: dict) -> TensorParallel:
        return self  # a copy of a model lies on the same ranks

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def local(self, config: DecoderConfig) -> DecoderConfig:
        """What this rank has of heads and inner units; the vocabulary stays whole. UserError as of `check_split`."""
        check_split(config, self.size)
        counts = {name: getattr(config, name) // self.size for name in ("heads", "kv_heads", "intermediate_size")}
        return replace(config, **counts)

    def stretch(self, size: int) -> range:
        """This rank's part of a dimension that is split, of `size` in all: of equal parts the last (of the vocabulary,
        nothing else) may be shorter."""
        part = -(-size // self.size)
        return range(self.rank * part, min(size, (self.rank + 1) * part))

    # -- a layer -------------------------------------------------------------------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """x, the same on every rank, before each rank goes on with its own part: gradients are added up."""
        if not torch.is_grad_enabled():
            return x
        d = self._d
        found = d.DTensor.from_local(x, self.mesh, [d.Replicate()], run_check=False)
        return found.to_local(grad_placements=[d.Partial()])

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on each; x is used up."""
        if torch.is_grad_enabled():
            d = self._d
            found = d.DTensor.from_local(x, self.mesh, [d.Partial()], run_check=False)
            return found.redistribute(placements=[d.Replicate()]).to_local()
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def product(self, layer: Layer, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight `name` of a layer: for a column-parallel one this rank's outputs, for a row-parallel one
        the whole sum. An adapter's short side is where the ranks meet: [tokens, rank] and not [tokens, hidden]."""
        adapter = layer.active_adapter(name)
        if PLAN[name] == 0:
            y = linear(self.enter(x), getattr(layer, name), bias)
            return y if adapter is None else y + adapter(x, self.enter)
        y = self.leave(linear(x, getattr(layer, name), None))
        if adapter is not None:
            y = y + adapter(x, self.leave)
        return y if bias is None else y + bias

    # -- embedding and head --------------------------------------------------------------------------------------------

    def _own(self, tokens: Tensor, table: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(row of this rank's table, whether it is there) of each token; row 0 where it is not."""
        row = tokens - self.stretch(vocabulary).start
        mine = (row >= 0) & (row < table.shape[0])
        return row.where(mine, 0), mine

    def embed(self, tokens: Tensor, table: Tensor, vocabulary: int) -> Tensor:
        """[T, H] of int64 tokens [T]: each row comes from one rank, zeros from the others."""
        row, mine = self._own(tokens, table, vocabulary)
        return self.leave(F.embedding(row, table).masked_fill(~mine.unsqueeze(-1), 0.0))

    @torch.no_grad()
    def logits(self, hidden: Tensor, table: Tensor, vocabulary: int) -> Tensor:
        """float32 [..., V], the same bits on every rank. No gradient."""
        part = -(-vocabulary // self.size)
        own = F.pad(linear(hidden, table).float(), (0, part - table.shape[0])).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, -1)[..., :vocabulary]

    def logprob(
        self, hidden: Tensor, table: Tensor, targets: Tensor, temperature: float, vocabulary: int
    ) -> tuple[Tensor, Tensor]:
        """`linear_logprob` over the whole vocabulary: (logp [T], entropy [T] without gradient).

        The op gives log p within this rank's words, log p = z - log Z, of the target, or of any word where the target
        is another rank's; with that word's logit z, log Z of this rank is known, and the ranks' Z add up."""
        hidden = self.enter(hidden)
        row, mine = self._own(targets, table, vocabulary)
        logp, entropy = linear_logprob(hidden, table, row, temperature)
        z = (hidden.to(logp.dtype) * F.embedding(row, table).to(logp.dtype)).sum(-1) / temperature
        total = z - logp  # log Z of this rank
        greatest = total.detach().clone()
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.group)
        share = torch.exp(total - greatest)
        mean = share.detach() * (total.detach() - entropy)  # Z / e^greatest times the mean logit within this rank
        sums = self.leave(torch.stack([share, torch.where(mine, z, 0.0), mean]))
        log_total = greatest + sums[0].log()
        return sums[1] - log_total, (log_total - sums[2] / sums[0]).detach()

    # -- sums over the ranks -------------------------------------------------------------------------------------------

    def total_norm(self, gradients: Sequence[Tensor], split: Sequence[bool]) -> Tensor:
        """The norm of the whole gradient. split: which are this rank's part; the others are the same on every rank."""
        of_parts, of_whole = (
            torch.nn.utils.get_total_norm([g for g, s in zip(gradients, split, strict=True) if s is side])
            for side in (True, False)
        )
        squares = of_parts.square().to(gradients[0].device)
        dist.all_reduce(squares, group=self.group)
        return (squares + of_whole.square().to(squares)).sqrt()

    def least(self, value: int) -> int:
        """The least of the ranks' values: what each of them has room for."""
        device = self.mesh.device_type
        found = torch.tensor(value, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    # -- whole weights, and this rank's part of them -------------------------------------------------------------------

    def _placed(self, piece: Tensor, dim: int, size: int) -> DTensor:
        shape = [*piece.shape]
        shape[dim] = size
        stride = torch.empty(shape, device="meta").stride()
        local = piece.detach().contiguous()
        if local.storage_offset():  # of which a DTensor cannot be copied (torch 2.13)
            local = local.clone()
        how = {"run_check": False, "shape": torch.Size(shape), "stride": stride}
        return self._d.DTensor.from_local(local, self.mesh, [self._d.Shard(dim)], **how)

    def whole_shape(self, name: str, own: Tensor, config: DecoderConfig) -> list[int]:
        """Of the weight of which `own` is this rank's part."""
        found, shape = split_of(name, config), [*own.shape]
        if found is not None:
            shape[found[0]] = sum(found[1]) if found[1] else shape[found[0]] * self.size
        return shape

    def pieces(self, name: str, own: Tensor, config: DecoderConfig) -> dict[str, list[DTensor]] | Tensor:
        """What stands for this rank's part `own` of the weight `name` (or of a moment of it) in a snapshot."""
        found = split_of(name, config)
        if found is None or own.dim() <= found[0]:  # a counter beside the moments has no dimension
            return own
        dim, sizes = found[0], found[1] or (own.shape[found[0]] * self.size,)
        parts = own.split([len(self.stretch(size)) for size in sizes], dim)
        return {PARTS: [self._placed(part, dim, size) for part, size in zip(parts, sizes, strict=True)]}

    def part(self, name: str, value: Any, config: DecoderConfig) -> Any:
        """This rank's part of the weight `name`, of what `pieces` gave, of whole pieces, or of a whole fused tensor."""
        found = split_of(name, config)
        if found is None or (isinstance(value, Tensor) and value.dim() <= found[0]):
            return value
        dim = found[0]
        parts = value[PARTS] if isinstance(value, dict) else [value]
        sizes = found[1] or [part.shape[dim] for part in parts]
        if len(parts) < len(sizes):
            parts = value.split(list(sizes), dim)
        own = [
            p.to_local() if isinstance(p, self._d.DTensor) else p.narrow(dim, (r := self.stretch(size)).start, len(r))
            for p, size in zip(parts, sizes, strict=True)
        ]
        # contiguous: torch's fused AdamW takes the moments for laid out as the weights, and is silently wrong else
        return torch.cat(own, dim) if len(own) > 1 else own[0].contiguous()

    def whole(self, view: Tensor, dim: int, size: int) -> Tensor:
        """All of a weight in a file of which `view` is this rank's part."""
        return self._placed(view, dim, size).full_tensor()


def peers() -> TensorParallel | None:
    """Of this process's run; None where each rank holds its own models."""
    mesh = tensor_mesh()
    return None if mesh is None else TensorParallel(mesh)


def tensor_of(model: nn.Module) -> TensorParallel | None:
    """How the model is split; None where it is whole."""
    return getattr(model, "tensor", None)


def check_split(config: DecoderConfig | ShapeConfig, size: int, what: str = "the model") -> None:
    """UserError where `size` ranks cannot hold the model together."""
    for name, count in (("key-value heads", config.kv_heads), ("inner units of its MLP", config.intermediate_size)):
        if count % size:
            raise UserError(
                f"parallel.tensor={size} must divide the {count} {name} of {what}: set it to "
                f"{' or '.join(map(str, _divisors(config)))}"
            )
    words = getattr(config, "vocab_size", size * size)  # of a model from scratch: as many as its tasks have
    if (size - 1) * -(-words // size) >= words:
        raise UserError(f"parallel.tensor={size} leaves a rank without one of the {words} words of {what}: lower it")


def _divisors(config: DecoderConfig) -> Iterator[int]:
    return (n for n in range(1, config.kv_heads + 1) if config.kv_heads % n == 0 and config.intermediate_size % n == 0)


def part_of(config: DecoderConfig, size: int) -> DecoderConfig:
    """A model as large as the largest part that one of `size` ranks has: for estimates. UserError as of
    `check_split`."""
    check_split(config, size)
    names = ("heads", "kv_heads", "intermediate_size", "vocab_size")
    return replace(config, **{name: -(-getattr(config, name) // size) for name in names})


def parameters_of(model: nn.Module) -> int:
    """How many parameters the model has, wherever they are."""
    tensor = tensor_of(model)
    if tensor is None:
        return sum(p.numel() for p in model.parameters())
    return sum(math.prod(tensor.whole_shape(name, p, model.config)) for name, p in model.named_parameters())


# -- state that any number of ranks can go on with -------------------------------------------------------------------


def spread_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state_dict whose split weights are their pieces; as it is where the model is whole."""
    tensor = tensor_of(model)
    return dict(state) if tensor is None else {k: tensor.pieces(k, v, model.config) for k, v in state.items()}


def own_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `spread_state` gave, on any number of ranks, as this one's tensors."""
    tensor = tensor_of(model)
    if tensor is None:
        return {name: joined(value) for name, value in state.items()}
    return {name: tensor.part(name, value, model.config) for name, value in state.items()}


def joined(value: Any) -> Any:
    """A tensor of whole pieces; anything else as it is."""
    if not (isinstance(value, dict) and value.keys() == {PARTS}):
        return value
    parts = value[PARTS]
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # what has several pieces has them in its rows


def split_of(name: str, config: DecoderConfig) -> tuple[int, tuple[int, ...] | None] | None:
    """(dimension, whole size of each piece) of a parameter by its name; None where it is whole on every rank.

    An adapter's B is split as its column-parallel weight, its A as its row-parallel one; each is one piece (None)."""
    if not is_split(name):
        return None
    words = name.split(".")
    if "adapters" in words:
        return PLAN[words[words.index("adapters") + 1]], None
    weight = words[-1]
    query, key, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    sizes = {"embedding": (config.vocab_size,), "head": (config.vocab_size,), "o_proj": (query,), "down_proj": (inner,)}
    sizes |= dict.fromkeys(("qkv_proj", "qkv_bias"), (query, key, key))
    sizes |= dict.fromkeys(("gate_up_proj", "gate_up_bias"), (inner, inner))
    return PLAN[weight], sizes[weight]


def is_split(name: str) -> bool:
    """Whether ranks hold different parts of the parameter of that name."""
    words = name.split(".")
    if "adapters" not in words:
        return words[-1] in PLAN
    weight, side = words[words.index("adapters") + 1 :][:2]
    return (side == "b") == (PLAN[weight] == 0)
