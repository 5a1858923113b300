"""A step of generation through all layers in one native call, where that gives what the layers' own methods give.

On a CPU a step of decoding is short and its operators many: 17 calls a layer through Python and torch, each one
with memory of its own, took as long as the arithmetic (docs/log.md). The native call runs the very functions behind the
ops, so there is one formula, and one rounding, for both ways; and none of them lets a row's sums depend on the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from r1fast.model.paged import PagedKV, PagedStep
from r1fast_kernels import native
from r1fast_kernels.op import requested
from r1fast_kernels.paged_attention import WIDEST_GROUP
from r1fast_kernels.sample_token import SampledToken

if TYPE_CHECKING:
    from r1fast.model.decoder import Decoder

# The weights of csrc/cpu/ops.h's DecoderLayer, in its order.
_WEIGHTS = (
    *("input_norm", "qkv_proj", "qkv_bias", "q_norm", "k_norm", "o_proj", "o_bias", "post_norm"),
    *("gate_up_proj", "gate_up_bias", "down_proj", "down_bias"),
)
WIDEST_HEAD = 1024  # of rope_append

log = logging.getLogger("r1fast.model")


def refusal(model: Decoder, step: PagedStep, kv: PagedKV) -> str | None:
    """Why the step goes through the ops one by one, or None."""
    config = model.config
    if model.tensor is not None:
        return f"each of {model.tensor.size} ranks has a part of every layer, and they meet within it"
    if not step.tokens.is_cpu:
        return f"the step lives on {step.tokens.device}"
    if kv.keys.dtype is not torch.float32 or not (kv.keys.is_contiguous() and kv.values.is_contiguous()):
        return f"it computes over a float32 cache without gaps, and this one is {kv.keys.dtype}"
    if (asked := requested()) not in (None, "cpu"):
        return f"backend {asked} was asked for"
    if (missing := native.cpu_unavailable()) is not None:
        return missing
    if config.heads // config.kv_heads * config.head_dim > WIDEST_GROUP or config.head_dim > WIDEST_HEAD:
        return f"heads of {config.head_dim}, {config.heads // config.kv_heads} to a key head, are too wide for it"
    for layer in model.layers:
        if layer.adapters is not None and any(adapter.active for adapter in layer.adapters.values()):
            return "adapters are not merged into the weights"
    return _weights_refusal(model)


def _weights_refusal(model: Decoder) -> str | None:
    named = [("embedding", model.embedding), ("norm", model.norm), ("head", model.head)]
    for layer in model.layers:
        named += layer._parameters.items()
    for name, weight in named:
        if hasattr(weight, "device_mesh"):
            return f"{name} is spread over several processes"
        if weight is not None and not (weight.dtype is torch.float32 and weight.is_cpu and weight.is_contiguous()):
            return f"it reads float32 weights without gaps on the CPU, and {name} is not such a one"
    return None


def takes(model: Decoder, step: PagedStep, kv: PagedKV) -> bool:
    """Whether `forward` serves this step; the log says why not."""
    reason = refusal(model, step, kv)
    if reason is not None:
        log.debug("the native step is passed over: %s", reason)
    return reason is None


def forward(model: Decoder, step: PagedStep, kv: PagedKV) -> Tensor:
    """What Decoder.forward_paged returns, for a step that `refusal` has nothing against.

    Raises ValueError for a token, position, slot or block that is outside of its range.
    """
    call, _kept = _call(model, step, kv)
    out = torch.empty((step.tokens.shape[0], model.config.hidden_size))
    native.cpu().decoder_forward(call, out.data_ptr())
    return out


def decode(
    model: Decoder, step: PagedStep, kv: PagedKV, noise: Iterable[Tensor], stops: Tensor, steps: int, seconds: float
) -> SampledToken:
    """Up to `steps` tokens of every row, one step after another: [n, rows] each of what `sample_token` returns, n >= 1.

    step: the first, one token each; its rows have room for the keys and values of `steps` tokens. `refusal` has nothing
    against it. noise: seed, sequence, temperature, top_k, top_p of the rows, as `sample_token` takes them. stops: int64
    [rows, S], the tokens that end a row, -1 for none. The last step is the first in which a row ends, or that is not
    done before `seconds` have passed. A row draws what `forward`, `model.logits` and `sample_token` would give it.
    Raises ValueError as these do, and for rows without room.
    """
    call, kept = _call(model, step, kv)
    rows, head = step.tokens.shape[0], model.head_weight
    seed, sequence, temperature, top_k, top_p = noise
    kinds = (torch.int64, torch.int64, torch.float32, torch.int32, torch.float32, torch.int64)
    given = (seed, sequence, temperature, top_k, top_p, stops)
    given = [x.to(kind).contiguous() for x, kind in zip(given, kinds, strict=True)]
    token, logprob, full = torch.empty((steps, rows), dtype=torch.int64), *torch.empty((2, steps, rows))
    done = native.cpu().decoder_steps(
        call, kept[0].shape[0], head.data_ptr(), head.shape[0], *(x.data_ptr() for x in given), stops.shape[1], steps,
        seconds, token.data_ptr(), logprob.data_ptr(), full.data_ptr(),
    )  # fmt: skip
    return SampledToken(token[:done], logprob[:done], full[:done])


def _call(model: Decoder, step: PagedStep, kv: PagedKV) -> tuple[object, tuple]:
    """The step as the native side takes it, and what must live as long: it holds addresses."""
    config, tables = model.config, step.block_tables
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    arrays = (step.tokens, step.positions, step.slots, step.context_lens, step.cu_seqlens_q)
    tokens, positions, slots, contexts, starts = (None if x is None else x.contiguous() for x in arrays)
    cos, sin = model.rope_tables(tables.shape[1] * kv.block_size)
    layers = _addresses(model, kv)
    call = native.cpu().DecoderCall(
        layers.ctypes.data, len(layers), model.embedding.data_ptr(), config.vocab_size, model.norm.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), cos.shape[0], config.hidden_size, config.intermediate_size, config.heads,
        config.kv_heads, config.head_dim, kv.keys.shape[1], kv.block_size, config.norm_eps, tokens.data_ptr(),
        positions.data_ptr(), slots.data_ptr(), tables.data_ptr(), contexts.data_ptr(),
        0 if starts is None else starts.data_ptr(), tokens.shape[0], len(contexts), tables.shape[1], tables.stride(0),
    )  # fmt: skip
    return call, (cos, sin, layers, tables, tokens, positions, slots, contexts, starts)


def _addresses(model: Decoder, kv: PagedKV) -> np.ndarray:
    """int64 [layers, 14], read anew for each step (a third of a microsecond a weight): a parameter may be replaced."""
    keys, values = kv.keys.data_ptr(), kv.values.data_ptr()
    stride = kv.keys.stride(0) * kv.keys.element_size()
    rows = []
    for index, layer in enumerate(model.layers):
        weights = layer._parameters
        row = [0 if (w := weights.get(name)) is None else w.data_ptr() for name in _WEIGHTS]
        rows.append([*row, keys + index * stride, values + index * stride])
    return np.array(rows, np.int64)
