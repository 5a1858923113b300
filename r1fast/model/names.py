"""The decoder's weights under Hugging Face's names.

Inside, q, k and v are one tensor and gate and up another; on disk they have Hugging Face's names. `named_views` is the
one table between the two: views of the fused parameters under the names of the file, which loading copies into and
saving copies from. Of a model on several ranks they are this rank's part of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from r1fast.model.sharding import is_sharded, own_gathered
from r1fast.parallel import world

if TYPE_CHECKING:
    from r1fast.model.decoder import Decoder, Layer
    from r1fast.model.decoder_config import DecoderConfig

_SPLIT = {  # module in the files -> the dimension that is split over ranks (tensor_parallel.py's PLAN)
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


def named_views(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face's name -> view of the (fused) parameter that holds it. Writing into a view writes the model. Of a
    model on several ranks, this one's part of each: `_SPLIT` says of which dimension."""
    views = _outer_views(model)
    for index, layer in enumerate(model.layers):
        views |= _layer_views(model.local_config, index, layer)
    return views


def _outer_views(model: Decoder) -> dict[str, Tensor]:
    """Of what is in no layer."""
    views = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if model.head is not None:
        views["lm_head.weight"] = model.head
    return {name: view.detach() for name, view in views.items()}


def _layer_views(config: DecoderConfig, index: int, layer: Layer) -> dict[str, Tensor]:
    dim, inner = config.head_dim, config.intermediate_size
    qkv = (config.heads * dim, config.kv_heads * dim, config.kv_heads * dim)
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    views = {}
    for kind, projection, bias in (
        ((attention, ("q_proj", "k_proj", "v_proj"), qkv), layer.qkv_proj, layer.qkv_bias),
        ((attention, ("o_proj",), (config.hidden_size,)), layer.o_proj, layer.o_bias),
        ((mlp, ("gate_proj", "up_proj"), (inner, inner)), layer.gate_up_proj, layer.gate_up_bias),
        ((mlp, ("down_proj",), (config.hidden_size,)), layer.down_proj, layer.down_bias),
    ):
        prefix, names, rows = kind
        for suffix, fused in (("weight", projection), ("bias", bias)):
            if fused is not None:
                parts = fused.detach().split(rows)
                views |= {f"{prefix}.{name}.{suffix}": part for name, part in zip(names, parts, strict=True)}
    views[f"model.layers.{index}.input_layernorm.weight"] = layer.input_norm
    views[f"model.layers.{index}.post_attention_layernorm.weight"] = layer.post_norm
    if config.qk_norm:
        views[f"{attention}.q_norm.weight"] = layer.q_norm
        views[f"{attention}.k_norm.weight"] = layer.k_norm
    return {name: view.detach() for name, view in views.items()}


def split_dim(name: str) -> int | None:
    """The dimension of a tensor in the files that is split where several ranks hold the model."""
    words = name.split(".")
    return _SPLIT.get(words[-2]) if words[-1] == "weight" or _SPLIT.get(words[-2]) == 0 else None


def whole_views(model: Decoder, root: nn.Module | None = None) -> dict[str, Tensor]:
    """`named_views`, of a model on several ranks put together, one after the other, on the CPU of the first of them
    (the others get empty tensors, or none). A collective of these ranks. root: of a model that is a part of another,
    the one that was sharded."""
    root = root or model
    if is_sharded(root):
        return _gathered_views(model, root)
    views, tensor = named_views(model), model.tensor
    if tensor is None:
        return views
    whole = whole_rows(model.config)
    found = {}
    for name, view in views.items():
        dim = split_dim(name)
        value = view if dim is None else tensor.whole(view, dim, whole[name.split(".")[-2]])
        found[name] = value.cpu() if tensor.rank == 0 else value.new_empty(0)
    return found


def _gathered_views(model: Decoder, root: nn.Module) -> dict[str, Tensor]:
    """Of a sharded model. Gathered layer by layer: no device needs room for all of it."""
    views: dict[str, Tensor] = {}

    def keep(found: dict[str, Tensor]) -> None:
        if world().first:
            views.update({name: view.to("cpu", copy=True) for name, view in found.items()})

    with own_gathered(root):
        keep(_outer_views(model))
    for index, layer in enumerate(model.layers):
        with own_gathered(layer):
            keep(_layer_views(model.config, index, layer))
    return views


def whole_rows(config: DecoderConfig) -> dict[str, int]:
    """The whole size of the split dimension, by the module's name in the files."""
    query, key, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    sizes = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner)
    return sizes | dict.fromkeys(("embed_tokens", "lm_head"), config.vocab_size)
