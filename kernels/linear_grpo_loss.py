"""The head and the loss as one op: hidden states in, scalar loss and its gradients out, no [T, V] ever kept.

    linear_grpo_loss     loss = sum_t grpo_loss(linear_logprob(hidden, weight, targets, temperature), old, ref, A, w)[t]
    linear_cross_entropy loss = sum_t -w[t] * linear_logprob(hidden, weight, targets)[t]

A loss that is a sum over rows has its gradient the moment a row's log-probability is known. So both are taken in the
forward pass, chunk by chunk: three products (6 T V H FLOPs) instead of the four of an op that makes its logits again in
the backward pass. Backward only scales what is there. Rows whose slope d(loss)/d(logp) is exactly zero (no advantage
and no KL term, clipped, or weight 0) are left out of the two gradient products, which changes nothing.

The Triton kernels are in linear_head_triton.py. There the rows to leave out are chosen before any product, so clipped
ones stay in: looking at the slopes would stop the host at every chunk. The C++ is in linear_head_cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1fast_kernels import linear_head_cpu, native
from r1fast_kernels import linear_head_triton as head_triton
from r1fast_kernels.grpo_loss import GRPOStats, check_settings, check_streams, loss_and_slope
from r1fast_kernels.linear_logprob import Head, check_head, head_case, work_dtype
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import triton_unavailable


class LinearGRPOStats(NamedTuple):
    """GRPOStats' sums (0-d, over rows of weight != 0), and every row's logp and entropy, float32 [T]; no gradient."""

    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    count: Tensor
    logp: Tensor
    entropy: Tensor


# Given a chunk and its logp [C]: the loss of its rows, the slope d(loss)/d(logp) of its rows.
RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


class _LinearLoss(torch.autograd.Function):
    """Any per-row loss of logp behind the head, its gradients taken in forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, row_loss, want_entropy: bool):
        head = Head(hidden, weight, temperature)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        logp = hidden.new_empty(hidden.shape[0], dtype=head.logits.dtype)
        entropy = torch.empty_like(logp) if want_entropy else logp.new_empty(0)
        loss = logp.new_zeros(())
        d_hidden, d_weight = head.gradients(wants_hidden, wants_weight)
        for chunk in head.chunks():
            logp[chunk], measured, probabilities = head.distribution(chunk, targets[chunk], want_entropy)
            if want_entropy:
                entropy[chunk] = measured
            rows, slope = row_loss(chunk, logp[chunk])
            loss += rows.sum()
            if wants_hidden or wants_weight:
                _add_gradients(head, chunk, probabilities, targets[chunk], slope, d_hidden, d_weight)
        ctx.gradients = (d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _logp: Tensor, _entropy: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a fused linear loss keeps its gradients for one backward pass: call it again instead")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _add_gradients(head, chunk, probabilities, targets, slope, d_hidden, d_weight) -> None:
    """The two gradient products of a chunk, over its rows with a slope."""
    live = slope.nonzero().squeeze(1)
    every = live.shape[0] == slope.shape[0]
    hidden = head.hidden[chunk]
    if not every:
        probabilities, targets, slope, hidden = (x[live] for x in (probabilities, targets, slope, hidden))
    gradient = head.logit_gradient(probabilities, targets, slope)
    if d_weight is not None:
        d_weight.addmm_(gradient.T, hidden)
    if d_hidden is not None:
        if every:
            torch.mm(gradient, head.weight, out=d_hidden[chunk])
        else:
            d_hidden[chunk] = 0
            d_hidden[chunk].index_copy_(0, live, gradient @ head.weight)


def _fused(hidden, weight, targets, temperature, row_loss: RowLoss, want_entropy: bool):
    if not torch.is_grad_enabled():  # needs_input_grad looks at the tensors, not at the mode
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLoss.apply(hidden, weight, targets, temperature, row_loss, want_entropy)


def _cut(stream: Tensor | None, chunk: slice) -> Tensor | None:
    return None if stream is None else stream[chunk]


def _merge(parts: list[GRPOStats]) -> tuple[Tensor, ...]:
    """Statistics of all chunks from those of each."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(GRPOStats._fields, (torch.stack(column) for column in zip(*parts, strict=True)), strict=True)
    return tuple(column.amax() if name == "ratio_max" else column.sum() for name, column in columns)


def check(
    hidden, weight, targets, old_logp, ref_logp, advantages, weights, temperature, clip_low, clip_high, kl_coef, kl_kind
) -> None:
    check_head("linear_grpo_loss", hidden, weight, targets, temperature)
    check_streams("linear_grpo_loss", hidden[:, 0], old_logp, ref_logp, advantages, weights)
    check_settings("linear_grpo_loss", ref_logp, clip_low, clip_high, kl_coef, kl_kind)


def reference(
    hidden, weight, targets, old_logp, ref_logp, advantages, weights, temperature, clip_low, clip_high, kl_coef, kl_kind
) -> tuple[Tensor, ...]:
    """Plain torch, a chunk of rows at a time. Returns the loss and the fields of LinearGRPOStats."""
    parts: list[GRPOStats] = []

    def row_loss(chunk: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        streams = (_cut(s, chunk) for s in (old_logp, ref_logp, advantages, weights))
        rows, slope, stats = loss_and_slope(logp, *streams, clip_low, clip_high, kl_coef, kl_kind, None)
        parts.append(stats)
        return rows, slope

    loss, logp, entropy = _fused(hidden, weight, targets, temperature, row_loss, True)
    if not parts:
        row_loss(slice(0, 0), logp)
    return loss, *_merge(parts), logp, entropy


def check_cross_entropy(hidden, weight, targets, weights) -> None:
    check_head("linear_cross_entropy", hidden, weight, targets, 1.0)
    if weights.shape != targets.shape or weights.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy: weights must be [{hidden.shape[0]}] on {hidden.device}, "
            f"not {list(weights.shape)} on {weights.device}"
        )


def reference_cross_entropy(hidden, weight, targets, weights) -> tuple[Tensor, Tensor]:
    """Plain torch, a chunk of rows at a time."""
    slope = -weights.detach().to(work_dtype(hidden))

    def row_loss(chunk: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        return slope[chunk] * logp, slope[chunk]

    loss, logp, _ = _fused(hidden, weight, targets, 1.0, row_loss, False)
    return loss, logp


def _triton_run(head, loss: int, trained, streams, settings, wants) -> tuple[head_triton.Measured, tuple]:
    """Measure all rows; take the gradients of those in `trained`. (what was measured, what backward needs)"""
    found = head.measure()
    if not any(wants):
        head.run(head.every, found, loss, streams, settings, None)
        return found, ()
    live, rest = head.split(trained)
    into = head_triton.Gradients(head, live, wants)
    head.run(live, found, loss, streams, settings, into)
    head.run(rest, found, loss, streams, settings, None)
    return found, (into.d_hidden, into.d_weight, head.weight.dtype)


def _triton_backward(saved, grads, needs) -> tuple[Tensor | None, ...]:
    """The gradients of forward times that of the loss, rounded here; they are kept, so backward may run again."""
    *gradients, dtype = saved
    return tuple(None if g is None else torch.mul(g, grads[0], out=torch.empty_like(g, dtype=dtype)) for g in gradients)


def _triton_grpo(
    hidden, weight, targets, old_logp, ref_logp, advantages, weights, temperature, clip_low, clip_high, kl_coef,
    kl_kind, wants=None,
) -> tuple[tuple[Tensor, ...], tuple]:  # fmt: skip
    named = (None, old_logp, ref_logp, advantages, weights)
    streams = head_triton.Streams(*(None if x is None else x.detach().float().contiguous() for x in named))
    settings = head_triton.Settings(clip_low, clip_high, kl_coef, "none" if ref_logp is None else kl_kind)
    used = streams.weights != 0
    trained = used if kl_coef and ref_logp is not None else used & (streams.advantages != 0)
    head = head_triton.Head(hidden, weight, targets, temperature)
    wants = (hidden.requires_grad, weight.requires_grad) if wants is None else wants
    found, saved = _triton_run(head, head_triton.GRPO, trained, streams, settings, wants)
    loss, kl, clipped, ratio = found.stats
    largest = ratio.amax() if ratio.numel() else ratio.sum()
    sums = (kl.sum(), clipped.sum(), ratio.sum(), largest, used.sum(dtype=torch.float32))
    return (loss.sum(), *sums, found.logp, found.entropy), saved


def _triton_cross_entropy(hidden, weight, targets, weights, wants=None) -> tuple[tuple[Tensor, Tensor], tuple]:
    slopes = -weights.detach().float().contiguous()
    head = head_triton.Head(hidden, weight, targets, 1.0)
    wants = (hidden.requires_grad, weight.requires_grad) if wants is None else wants
    settings = (head_triton.Streams(slopes), head_triton.Settings())
    found, saved = _triton_run(head, head_triton.GIVEN_SLOPE, slopes != 0, *settings, wants)
    return (slopes @ found.logp, found.logp), saved


def _backends(cpu: Callable, triton: Callable) -> dict[str, Backend]:
    """Of an op whose forwards take their gradients, which `wants` turns off."""
    parts = {
        "cpu": (cpu, linear_head_cpu.scaled_backward, native.cpu_unavailable, linear_head_cpu.supports),
        "triton": (triton, _triton_backward, triton_unavailable, head_triton.supports),
    }
    return {
        name: Backend(
            forward,
            backward,
            inference=lambda *args, forward=forward: forward(*args, wants=(False, False))[0],
            unavailable=unavailable,
            supports=supports,
        )
        for name, (forward, backward, unavailable, supports) in parts.items()
    }


def _case(size: str, shape: tuple[int, int, int], temperature: float, *settings, on_policy=False, kl=True) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        h, w, targets = head_case(size, *shape, device, dtype, generator)
        old, ref, advantages, weights, drop = torch.randn(5, shape[0], generator=generator).to(device)
        logp = torch.log_softmax(h.float() @ w.float().T / temperature, 1).gather(1, targets[:, None])[:, 0]
        advantages = torch.where(advantages.abs() < 0.3, 0.0, advantages)  # as groups without variance have
        weights = torch.where(drop < -0.8, 0.0, weights.abs() + 0.1)
        streams = None if on_policy else logp + 0.3 * old, logp + 0.5 * ref if kl else None, advantages, weights
        return h, w, targets, *streams, temperature, *settings

    words = [f"{shape[0]} rows {shape[1]} hidden {shape[2]} words T {temperature}", settings[3] if kl else "no kl"]
    return Case(" ".join(words + ["on policy"] * on_policy), size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", (37, 64, 250), 1.0, 0.2, 0.2, 0.04, "k3"),
        _case("tiny", (40, 64, 250), 1.0, 0.2, 0.28, 0.0, "k3", kl=False),
        _case("ragged", (1301, 33, 1003), 0.7, 10.0, 0.2, 0.1, "k2"),
        _case("ragged", (70, 24, 5003), 1.3, 0.2, 0.2, 0.0, "k3", kl=False, on_policy=True),
        _case("model", (4096, 512, 8192), 1.0, 0.2, 0.2, 0.04, "k3"),
    ]


def _case_cross_entropy(size: str, *shape: int) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        head = head_case(size, *shape, device, dtype, generator)
        weights = torch.randn(shape[0], generator=generator)
        return *head, torch.where(weights < -0.5, 0.0, weights.abs() + 0.1).to(device)

    return Case(f"{shape[0]} rows {shape[1]} hidden {shape[2]} words", size, make)


def cases_cross_entropy() -> list[Case]:
    return [
        _case_cross_entropy("tiny", 37, 64, 250),
        _case_cross_entropy("ragged", 1301, 33, 1003),
        _case_cross_entropy("ragged", 70, 24, 5003),
        _case_cross_entropy("model", 4096, 512, 8192),
    ]


def invalid() -> list[tuple[str, tuple]]:
    h, w, targets, x = torch.ones(3, 8), torch.ones(5, 8), torch.arange(3), torch.ones(3)
    settings = (1.0, 0.2, 0.2, 0.0, "k3")
    return [
        ("another width", (h, w[:, :4], targets, x, None, x, x, *settings)),
        ("a target past the vocabulary", (h, w, targets + 3, x, None, x, x, *settings)),
        ("advantages of another length", (h, w, targets, x, None, x[:2], x, *settings)),
        ("kl without a reference", (h, w, targets, x, None, x, x, 1.0, 0.2, 0.2, 0.1, "k3")),
        ("a temperature of zero", (h, w, targets, x, None, x, x, 0.0, 0.2, 0.2, 0.0, "k3")),
    ]


def invalid_cross_entropy() -> list[tuple[str, tuple]]:
    h, w, targets, x = torch.ones(3, 8), torch.ones(5, 8), torch.arange(3), torch.ones(3)
    return [
        ("another width", (h, w[:, :4], targets, x)),
        ("a target past the vocabulary", (h, w, targets + 3, x)),
        ("weights of another length", (h, w, targets, x[:2])),
    ]


_DESCRIPTION = {
    "gradients": (0, 1),
    "tolerances": {
        torch.float32: Tolerance(1e-5, 1e-5, "as linear_logprob; the sum over rows keeps 1e-6 of itself"),
        torch.bfloat16: Tolerance(1e-5, 1e-5, "the arithmetic is float32 on bf16 input; nothing is rounded to bf16"),
    },
    "gradient_tolerances": {
        torch.float32: Tolerance(1e-5, 2e-5, "float32 products over V and over T"),
        torch.bfloat16: Tolerance(
            2**-7, 2**-4, "8 bits of each logit's gradient, which then sum over rows and words: 0.4% of the whole"
        ),
    },
    "flops": lambda hidden, weight, *_: 2 * hidden.numel() * weight.shape[0],
    "bytes": lambda hidden, weight, *_: (hidden.numel() + weight.numel()) * hidden.element_size(),
}
OP = register(
    Op(
        name="linear_grpo_loss",
        check=check,
        reference=reference,
        backends=_backends(linear_head_cpu.grpo_forward, _triton_grpo),
        cases=cases,
        invalid=invalid,
        **_DESCRIPTION,
    )
)
OP_CROSS_ENTROPY = register(
    Op(
        name="linear_cross_entropy",
        check=check_cross_entropy,
        reference=reference_cross_entropy,
        backends=_backends(linear_head_cpu.cross_entropy_forward, _triton_cross_entropy),
        cases=cases_cross_entropy,
        invalid=invalid_cross_entropy,
        **_DESCRIPTION,
    )
)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    *,
    backend: str | None = None,
) -> tuple[Tensor, LinearGRPOStats]:
    """GRPO's loss from hidden states; see grpo_loss for the formula and linear_logprob for logp.

    hidden: float [T, H]. weight: float [V, H]. targets: int64 [T], in [0, V). old_logp: float [T], or None for exactly
    on-policy rows (old = logp, detached). ref_logp: float [T] or None. advantages, weights: float [T].
    temperature: > 0.
    Returns (loss: float32 scalar, the sum over rows; LinearGRPOStats). Differentiable once in hidden and weight.
    Raises ValueError as grpo_loss and linear_logprob do; RuntimeError on a second backward through one loss.
    """
    loss, *stats = OP(
        hidden,
        weight,
        targets,
        old_logp,
        ref_logp,
        advantages,
        weights,
        temperature,
        clip_low,
        clip_high,
        kl_coef,
        kl_kind,
        backend=backend,
    )
    return loss, LinearGRPOStats(*stats)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The supervised form: loss = sum_t -weights[t] * logp[t].

    hidden: float [T, H]. weight: float [V, H]. targets: int64 [T], in [0, V). weights: float [T].
    Returns (loss: float32 scalar, logp: float32 [T] without gradient). Differentiable once in hidden and weight.
    Raises ValueError as linear_logprob does; RuntimeError on a second backward through one loss.
    """
    return OP_CROSS_ENTROPY(hidden, weight, targets, weights, backend=backend)
