"""One decoder for Llama, Qwen2/2.5 and Qwen3, with the two forwards that reinforcement learning needs.

`forward_packed` trains and scores whole sequences laid end to end; `forward_paged` generates through a paged cache.
Both run the same layers and differ in the attention call alone, so the sampler and the learner share one set of
weights and one set of formulas: there is nothing to synchronise.

For the tiny models the operators' dispatch is the run time, so the layers are plain methods over fused parameters
(q, k and v are one product, gate and up another; each residual is added inside the norm that follows it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from r1fast.model import native_forward
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.paged import PagedKV, PagedStep
from r1fast.model.recall import recalled
from r1fast.model.rope_scaling import rope_frequencies
from r1fast_kernels import (
    linear,
    memory,
    paged_attention,
    prefix_attention,
    qkv_rope,
    rms_norm,
    rope_append,
    swiglu,
    varlen_attention,
)

if TYPE_CHECKING:
    from r1fast.model.tensor_parallel import TensorParallel

__all__ = ["Decoder", "DecoderConfig", "PagedKV", "PagedStep"]

# (number of the layer, the layer, q, k and v as projected [T, Hq + 2 Hkv, D]) -> [T, Hq, D]: with the norms of q and k
# and the rotation, which generation fuses with the write into its cache
Attend = Callable[[int, "Layer", Tensor], Tensor]
Again = Callable[[], Tensor]


class Layer(nn.Module):
    """One block: attention and the gated MLP, each behind a norm that is fused with the sum of the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        tensor: TensorParallel | None = None,
    ) -> None:
        """config: with what this rank has of heads and inner units, where there are several."""
        super().__init__()
        self.tensor = tensor
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        self.split = (config.heads, config.kv_heads, config.kv_heads)
        self.head_dim = dim
        self.eps = config.norm_eps
        self.adapters: nn.ModuleDict | None = None  # lora.py's, by the name of the weight that they are beside
        heads = sum(self.split)

        def parameter(*shape: int, when: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if when else None

        self.input_norm = parameter(hidden)
        self.qkv_proj = parameter(heads * dim, hidden)  # rows of q, then of k, then of v
        self.qkv_bias = parameter(heads * dim, when=config.qkv_bias)
        self.q_norm = parameter(dim, when=config.qk_norm)
        self.k_norm = parameter(dim, when=config.qk_norm)
        self.o_proj = parameter(hidden, config.heads * dim)
        self.o_bias = parameter(hidden, when=config.output_bias)
        self.post_norm = parameter(hidden)
        self.gate_up_proj = parameter(2 * inner, hidden)  # rows of gate, then of up
        self.gate_up_bias = parameter(2 * inner, when=config.mlp_bias)
        self.down_proj = parameter(hidden, inner)
        self.down_bias = parameter(hidden, when=config.mlp_bias)

    def forward(
        self, index: int, x: Tensor | None, residual: Tensor, attend: Attend, recompute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(what the MLP gives, the residual stream without it), each [T, H], of the same two of the layer before, whose
        x is None where there is none. All weights that it reads are its own: FSDP gathers a layer around this call."""
        if recompute:
            return checkpoint(self._block, index, x, residual, attend, use_reentrant=False, preserve_rng_state=False)
        return self._block(index, x, residual, attend, recall=True)

    def _block(
        self, index: int, x: Tensor | None, residual: Tensor, attend: Attend, recall: bool = False
    ) -> tuple[Tensor, Tensor]:
        """recall: what is cheap to make again is not kept for the backward pass (recall.py)."""
        if x is None:
            x = rms_norm(residual, self.input_norm, self.eps)
        else:
            x, residual = rms_norm(x, self.input_norm, self.eps, residual=residual)
        x = self.attention(index, x, attend, self._again("input_norm", residual) if recall else None)
        x, residual = rms_norm(x, self.post_norm, self.eps, residual=residual)
        return self.mlp(x, self._again("post_norm", residual) if recall else None), residual

    def _again(self, name: str, total: Tensor) -> Again:
        """The norm `name` of a residual stream; its weight is looked up when asked for: FSDP has gathered it again."""
        total = total.detach()
        return lambda: rms_norm(total, getattr(self, name), self.eps)

    def attention(self, index: int, x: Tensor, attend: Attend, again: Again | None = None) -> Tensor:
        rows = x.shape[0]
        qkv = self.product("qkv_proj", x, self.qkv_bias, again).view(rows, -1, self.head_dim)
        return self.product("o_proj", attend(index, self, qkv).reshape(rows, -1), self.o_bias)

    def mlp(self, x: Tensor, again: Again | None = None) -> Tensor:
        halves = self.product("gate_up_proj", x, self.gate_up_bias, again)
        gate = None if again is None else partial(swiglu, halves.detach())
        return self.product("down_proj", swiglu(halves), self.down_bias, gate)

    def product(self, name: str, x: Tensor, bias: Tensor | None, again: Again | None = None) -> Tensor:
        """x times the weight `name`, with what an adapter beside it adds. again: makes x anew for the backward pass."""
        if self.tensor is not None:
            return self.tensor.product(self, name, x, bias)
        with recalled(x, again):
            y = linear(x, getattr(self, name), bias)
            adapter = self.active_adapter(name)
            return y if adapter is None else y + adapter(x)

    def active_adapter(self, name: str) -> nn.Module | None:
        """What is beside the weight `name` and not merged into it."""
        if self.adapters is None or name not in self.adapters:
            return None
        adapter = self.adapters[name]
        return adapter if adapter.active else None

    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights that q and k are normed with; every rank norms its own heads with the same."""
        if self.tensor is None or self.q_norm is None:
            return self.q_norm, self.k_norm
        return self.tensor.enter(self.q_norm), self.tensor.enter(self.k_norm)


class Decoder(nn.Module):
    """Decoder-only transformer. `weights_version` is for whoever samples: the learner bumps it at every update."""

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        head: bool = True,
        tensor: TensorParallel | None = None,
    ) -> None:
        """All weights zero until loaded or initialised. `head=False` leaves the output head out (reward models).
        `tensor`: the ranks that hold it together (tensor_parallel.py); `config` is of the whole all the same."""
        super().__init__()
        self.config = config
        self.tensor = tensor
        self.local_config = config if tensor is None else tensor.local(config)  # this rank's heads and inner units
        self.weights_version = 0
        self.recompute = False  # keep only what enters each layer for the backward pass, and compute the rest again
        words = config.vocab_size if tensor is None else len(tensor.stretch(config.vocab_size))
        table = (words, config.hidden_size)
        self.embedding = nn.Parameter(torch.zeros(table, device=device, dtype=dtype))
        self.layers = nn.ModuleList(Layer(self.local_config, device, dtype, tensor) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.zeros(config.hidden_size, device=device, dtype=dtype))
        own_head = head and not config.tie_embeddings
        self.head = nn.Parameter(torch.zeros(table, device=device, dtype=dtype)) if own_head else None
        self.register_buffer("rope_cos", None, persistent=False)
        self.register_buffer("rope_sin", None, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def head_weight(self) -> Tensor:
        """[V, H]: the head's own, or the embedding table where they are tied; of several ranks, this one's rows."""
        if self.head is not None:
            return self.head
        if self.config.tie_embeddings:
            return self.embedding
        raise RuntimeError("this decoder was built without an output head (a reward model's trunk)")

    def bump_version(self) -> int:
        """To be called after the weights changed in place; returns the new version."""
        self.weights_version += 1
        return self.weights_version

    def forward_packed(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_groups: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm, in the model's dtype; differentiable.

        tokens int64 [T]: B sequences end to end, sequence b being rows cu_seqlens[b] to cu_seqlens[b+1] (int32 [B+1]);
        none sees another. `positions` (int64 [T], from 0 in each) and `max_seqlen` are computed where not given; on a
        GPU the latter costs a synchronisation, so pass it. `cu_groups` (int32 [G+1], of sequences): all of a group but
        its first sequence see that one before themselves, and their `positions`, then to be given, count on from it.
        """
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        if positions is None:
            if cu_groups is not None:
                raise ValueError("forward_packed: groups need positions")
            positions = packed_positions(cu_seqlens, tokens.shape[0])
        cos, sin = self.rope_tables(max_seqlen if cu_groups is None else 2 * max_seqlen)

        def attend(_: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = qkv_rope(qkv, layer.split[0], cos, sin, positions, *layer.head_norms(), layer.eps)
            if cu_groups is None:
                return varlen_attention(q, k, v, cu_seqlens, max_seqlen)
            return prefix_attention(q, k, v, cu_seqlens, cu_groups, max_seqlen)

        return self._run(tokens, attend)

    forward = forward_packed  # so that a wrapper which calls the module (DDP, compile) gets the trained path

    @torch.inference_mode()
    def forward_paged(self, step: PagedStep, kv: PagedKV) -> Tensor:
        """Hidden states [T, H] of the step's tokens; their keys and values are written into `kv` first. No gradient.

        RuntimeError where the weights are shares that nobody has gathered."""
        if native_forward.takes(self, step, kv):
            return native_forward.forward(self, step, kv)
        if hasattr(self.embedding, "device_mesh"):
            raise RuntimeError("forward_paged needs whole weights: call it within model.sharding.gathered(model)")
        tables = step.block_tables
        # the tables bound every position, without asking the device for the largest one
        cos, sin = self.rope_tables(tables.shape[1] * kv.block_size)
        keys, values = kv.keys.unbind(0), kv.values.unbind(0)

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = qkv.split_with_sizes(layer.split, 1)  # `split` is Python: 5 us more
            cache = (keys[index], values[index])
            norms = (layer.q_norm, layer.k_norm, layer.eps)
            q = rope_append(q, k, v, cos, sin, step.positions, *cache, step.slots, *norms)
            return paged_attention(q, *cache, tables, step.context_lens, step.cu_seqlens_q, groups=step.groups)

        return self._run(step.tokens, attend, whole=True)

    def _run(self, tokens: Tensor, attend: Attend, whole: bool = False) -> Tensor:
        """whole: the weights of all layers are there, so that nobody is asked for them before each."""
        residual, x = self._embed(tokens), None
        recompute = self.recompute and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            call = layer.forward if whole else layer
            x, residual = call(index, x, residual, attend, recompute)
        return rms_norm(x, self.norm, self.config.norm_eps, residual=residual)[0]

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.tensor is None:
            trained = self.embedding.requires_grad and torch.is_grad_enabled()
            if trained and self.embedding.is_cpu and self.embedding.numel() >= memory.LEAST:
                return _Lookup.apply(tokens, self.embedding)
            return F.embedding(tokens, self.embedding)
        return self.tensor.embed(tokens, self.embedding, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> float32 [..., V]. For sampling and tests; training never stores them (`linear_grpo_loss`)."""
        if self.tensor is not None:
            return self.tensor.logits(hidden, self.head_weight, self.config.vocab_size)
        return linear(hidden, self.head_weight).float()

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [P, head_dim / 2] with P >= positions; grown by doubling, never beyond need by more."""
        if self.rope_cos is None or self.rope_cos.shape[0] < positions:
            # never as inference tensors: the sampler may be the first to ask, and training saves them for backward
            with torch.inference_mode(False), torch.no_grad():
                config = self.config
                rate, scale = rope_frequencies(
                    config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions
                )
                rows = 1 << (positions - 1).bit_length()
                angle = torch.arange(rows, dtype=torch.float32)[:, None] * rate
                self.rope_cos = (angle.cos() * scale).to(self.device)
                self.rope_sin = (angle.sin() * scale).to(self.device)
        return self.rope_cos, self.rope_sin

    def _apply(self, fn, recurse=True):  # .to(dtype) must not round the tables: they are made anew when asked for
        self.rope_cos = self.rope_sin = None
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def initialize(self, seed: int, embedding_std: float = 0.5) -> Decoder:
        """Random weights for training from scratch, the same on every device and in every dtype.

        Normal with std 1/sqrt(fan_in), half of that for the two products that write to the residual stream; embedding
        `embedding_std` (0.5 let tiny models learn to copy soonest); norms one, biases zero, and a zero head, so that
        training starts from the uniform distribution. A tied head cannot be zero: its table is drawn with
        std 1/sqrt(hidden), which gives logits of unit variance.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(name: str, parameter: Tensor, scale: float, fan_in: bool) -> None:
            shape = parameter.shape if self.tensor is None else self.tensor.whole_shape(name, parameter, self.config)
            whole = torch.randn(shape, generator=generator) * (scale * (shape[1] ** -0.5 if fan_in else 1.0))
            parameter.copy_(whole if self.tensor is None else self.tensor.part(name, whole, self.config))

        tied = self.config.tie_embeddings
        draw("embedding", self.embedding, 1.0 if tied else embedding_std, fan_in=tied)
        for name, parameter in self.layers.named_parameters():
            if name.endswith("_norm"):
                parameter.fill_(1.0)
            elif name.endswith("_bias"):
                parameter.zero_()
            else:
                half = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
                draw(name, parameter, half, fan_in=True)
        self.norm.fill_(1.0)
        if self.head is not None:
            self.head.zero_()
        return self


class _Lookup(torch.autograd.Function):
    """F.embedding with a gradient in the ops' memory: malloc leaves a hole of the whole table in each micro-batch."""

    @staticmethod
    def forward(ctx, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.like = table.new_empty(0), table.shape
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return None, memory.empty(*ctx.like).zero_().index_add_(0, tokens, d_rows.contiguous())


def packed_positions(cu_seqlens: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the position of each row in its sequence, from int32 cu_seqlens [B+1]."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=rows)
    return torch.arange(rows, device=cu_seqlens.device) - starts
