"""Low-rank adapters (LoRA, Hu et al. 2021) on a frozen decoder: for training a model whose full gradient does not fit.

    y = W x + (alpha / r) B A x,   A [r, in] drawn, B [out, r] zero at first

Inside, q, k and v are one weight and so are gate and up; their adapters are kept apart all the same, because that is
how peft's files have them: what `save_adapter` writes, peft loads.

Sampling reads merged weights: `merged` adds the product to the very tensors that the sampler holds and puts the old
values back from a copy, so that leaving it is exact; of a sharded model it adds to what was gathered, and the shares
stay as they are. The reference policy is the base, `BasePolicy`: no second model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from r1fast.model.decoder import Decoder, Layer
from r1fast.model.sharding import gathered, own_gathered, shared_like
from r1fast.model.tensor_parallel import split_of
from r1fast.parallel import world

if TYPE_CHECKING:
    from r1fast.model.decoder_config import DecoderConfig
    from r1fast.schema import LoRAConfig

_FUSED = {  # our weight -> (Hugging Face's module, its parts by the order of their rows)
    "qkv_proj": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o_proj": ("self_attn", ("o_proj",)),
    "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
    "down_proj": ("mlp", ("down_proj",)),
}


class Adapter(nn.Module):
    """The adapters of one of our weights: one for each part that is targeted."""

    def __init__(self, weight: Tensor, rows: list[int], targeted: list[bool], rank: int, scale: float) -> None:
        super().__init__()
        self.rank, self.scale, self.rows, self.targeted = rank, scale, rows, targeted
        self.active = True
        count = sum(targeted)
        self.a = nn.Parameter(weight.new_zeros((count * rank, weight.shape[1])))
        self.b = nn.ParameterList(
            nn.Parameter(weight.new_zeros((n, rank))) for n, is_target in zip(rows, targeted, strict=True) if is_target
        )

    def forward(self, x: Tensor, between: Callable[[Tensor], Tensor] = lambda low: low) -> Tensor:
        """What the adapters add to W x, [..., all rows]; zeros for parts without one. between: done to A x."""
        low = iter(between(F.linear(x, self.a)).split(self.rank, -1))
        b = iter(self.b)
        parts = [
            F.linear(next(low), next(b)) if is_target else x.new_zeros((*x.shape[:-1], n))
            for n, is_target in zip(self.rows, self.targeted, strict=True)
        ]
        return self.scale * (torch.cat(parts, -1) if len(parts) > 1 else parts[0])

    def delta(self) -> Tensor:
        """The same as a matrix, float32 [all rows, in]."""
        a, b = iter(self.a.float().split(self.rank)), iter(self.b)
        parts = [
            next(b).float() @ next(a) if is_target else self.a.new_zeros((n, self.a.shape[1]), dtype=torch.float32)
            for n, is_target in zip(self.rows, self.targeted, strict=True)
        ]
        return self.scale * torch.cat(parts)


def add_adapters(model: Decoder, config: LoRAConfig, seed: int) -> None:
    """Freezes the model's own weights and puts adapters beside those that `config.targets` names; A is uniform in
    +-1/sqrt(in), as peft draws it, B zero: the model computes what it did."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    sizes = model.local_config
    rows = {
        "qkv_proj": [sizes.heads * sizes.head_dim, *[sizes.kv_heads * sizes.head_dim] * 2],
        "o_proj": [sizes.hidden_size],
        "gate_up_proj": [sizes.intermediate_size] * 2,
        "down_proj": [sizes.hidden_size],
    }
    for layer in model.layers:
        layer.adapters = nn.ModuleDict()
        for name, (_, parts) in _FUSED.items():
            targeted = [part in config.targets for part in parts]
            if not any(targeted):
                continue
            weight = getattr(layer, name)
            adapter = Adapter(weight, rows[name], targeted, config.rank, config.alpha / config.rank)
            _draw(model, f"adapters.{name}.a", adapter.a, generator)
            layer.adapters[name] = adapter


@torch.no_grad()
def _draw(model: Decoder, name: str, a: Tensor, generator: torch.Generator) -> None:
    """The same A however many ranks hold the model."""
    tensor = model.tensor
    shape = a.shape if tensor is None else tensor.whole_shape(name, a, model.config)
    whole = (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5
    a.copy_(whole if tensor is None else tensor.part(name, whole, model.config))


def _whole(model: Decoder, name: str, own: Tensor) -> Tensor:
    split = None if model.tensor is None else split_of(name, model.config)
    return own if split is None else model.tensor.whole(own, split[0], own.shape[split[0]] * model.tensor.size)


def adapters(model: Decoder) -> Iterator[tuple[Layer, str, Adapter]]:
    """(layer, name of its weight, adapter) of every adapter; none where the model has none."""
    for layer in model.layers:
        for name, adapter in (layer.adapters or {}).items():
            yield layer, name, adapter


@contextmanager
def merged(model: Decoder) -> Iterator[None]:
    """Within the block the model's weights are W + (alpha / r) B A, rounded once to their dtype, in the same tensors,
    and whole; after it they are W to the bit. Costs a copy of the adapted weights, unless they are gathered here;
    nothing without adapters."""
    found = list(adapters(model))
    if not found:
        yield
        return
    with gathered(model) as gone_after:
        kept = [None if gone_after else getattr(layer, name).detach().clone() for layer, name, _ in found]
        try:
            with torch.no_grad():
                for layer, name, adapter in found:
                    weight = getattr(layer, name)
                    weight.copy_(weight.float() + adapter.delta())
                    adapter.active = False
            yield
        finally:
            with torch.no_grad():
                for (layer, name, adapter), weight in zip(found, kept, strict=True):
                    if weight is not None:
                        getattr(layer, name).copy_(weight)
                    adapter.active = True


def fold(model: Decoder) -> None:
    """Merges for good: the model has no adapters after it, and computes what it did but for one rounding."""
    for layer in model.layers:
        if layer.adapters is None:
            continue
        with torch.no_grad():
            with own_gathered(layer):
                added = {name: adapter.delta() for name, adapter in layer.adapters.items()}
            for name, delta in added.items():
                weight = getattr(layer, name)
                weight.copy_(weight.float() + shared_like(delta, weight))
        del layer.adapters
        layer.adapters = None
    model.bump_version()


def adapter_parameters(config: DecoderConfig, lora: LoRAConfig) -> int:
    """How many parameters `add_adapters` trains."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.heads * dim, config.kv_heads * dim
    sides = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    return config.layers * lora.rank * sum(sides[target] for target in set(lora.targets))


@contextmanager
def base_only(model: Decoder) -> Iterator[None]:
    """Within the block the adapters add nothing."""
    found = [adapter for _, _, adapter in adapters(model)]
    for adapter in found:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.active = True


class BasePolicy:
    """The model without its adapters, as the reference policy of a KL term; all but its forward is the model's own."""

    def __init__(self, model: Decoder) -> None:
        self._model = model

    def forward_packed(self, *arguments) -> Tensor:
        with base_only(self._model):
            return self._model.forward_packed(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def save_adapter(model: Decoder, config: LoRAConfig, base: str, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors as peft writes them. `base`: the checkpoint they belong to.
    Every rank calls it, the first one writes."""
    tensors, whole = {}, partial(_whole, model)
    for index, layer in enumerate(model.layers):
        with own_gathered(layer):
            for name, adapter in (layer.adapters or {}).items():
                module, parts = _FUSED[name]
                targeted = [part for part, is_target in zip(parts, adapter.targeted, strict=True) if is_target]
                both = whole(f"adapters.{name}.a", adapter.a), [whole(f"adapters.{name}.b", b) for b in adapter.b]
                for part, a, b in zip(targeted, both[0].split(adapter.rank), both[1], strict=True):
                    prefix = f"base_model.model.model.layers.{index}.{module}.{part}"
                    tensors[f"{prefix}.lora_A.weight"] = a.detach().to("cpu", copy=True)
                    tensors[f"{prefix}.lora_B.weight"] = b.detach().to("cpu", copy=True)
    if not world().first:
        return
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
