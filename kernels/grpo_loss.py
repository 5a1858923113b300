"""GRPO's per-token loss: clipped ratio, advantage, and the KL penalty to a reference policy.

For row t with ratio r, advantage A and weight w (DeepSeekMath, eq. 3 and 4; the sign turned, so that it is minimised):

    out[t] = w * ( -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) + kl_coef * kl )
    r      = exp(logp - old_logp)
    kl     = k1: logp - ref     k2: (logp - ref)^2 / 2     k3: exp(ref - logp) - (ref - logp) - 1

The gradient goes to logp alone, through r and through the value of kl. With `sequence_ids` the ratio is GSPO's
(Zheng et al. 2025, eq. 7): exp of the mean of (logp - old_logp) over the rows of the sequence whose weight is not zero,
and the gradient goes through that mean. The clip bounds may have any size: with clip_low >= 1 the lower one is negative
and never binds. Every denominator (1/|o|, 1/G, ...) is in the weights, so that the scalar loss is the plain sum.

Rows of weight 0 give exactly 0 and take no part in the statistics or in a sequence's mean, whatever their other
values are: they may be masked rows with no log-probabilities at all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from r1fast_kernels import native
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import jit, tl, triton_unavailable, where_triton_runs

KL_KINDS = ("k1", "k2", "k3")


class GRPOStats(NamedTuple):
    """Sums over the rows of weight != 0, as 0-d tensors: no host synchronisation, and micro-batches add up.

    kl_sum: of the estimate `kl_kind` names, nats; 0 without a reference. clipped_sum: rows whose policy gradient the
    clip removed (A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low). ratio_max: 0 where there is no row.
    """

    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    count: Tensor


def _sequence_mean(log_ratio: Tensor, live: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean of log_ratio over each run of equal ids, given back to every row of the run."""
    run = torch.zeros_like(sequence_ids)
    torch.cumsum(sequence_ids[1:] != sequence_ids[:-1], 0, out=run[1:])
    zeros = log_ratio.new_zeros(log_ratio.shape)
    total = zeros.index_add(0, run, log_ratio)
    count = zeros.index_add(0, run, live.to(log_ratio.dtype))
    return (total / count.clamp(min=1.0)).index_select(0, run)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Schulman's three estimators of KL(policy || reference) from one sample, per row."""
    if kind == "k3":
        difference = ref_logp - logp
        return torch.expm1(difference) - difference
    difference = logp - ref_logp
    return difference if kind == "k1" else 0.5 * difference.square()


def check_streams(op, logp, old_logp, ref_logp, advantages, weights) -> None:
    """One number a row, all on logp's device."""
    named = (("old_logp", old_logp), ("ref_logp", ref_logp), ("advantages", advantages), ("weights", weights))
    if logp.dim() != 1 or not logp.is_floating_point():
        raise ValueError(f"{op}: logp must be float [T], not {logp.dtype} {list(logp.shape)}")
    for name, stream in named:
        if stream is None and name.endswith("logp"):
            continue
        if not isinstance(stream, Tensor) or stream.shape != logp.shape or stream.device != logp.device:
            found = f"{list(stream.shape)} on {stream.device}" if isinstance(stream, Tensor) else repr(stream)
            raise ValueError(f"{op}: {name} must be [{logp.shape[0]}] on {logp.device}, not {found}")


def check_settings(op, ref_logp, clip_low, clip_high, kl_coef, kl_kind) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"{op}: clip_low and clip_high must be >= 0, not {clip_low} and {clip_high}")
    if kl_kind not in KL_KINDS:
        raise ValueError(f"{op}: kl_kind must be one of {', '.join(KL_KINDS)}, not {kl_kind!r}")
    if kl_coef and ref_logp is None:
        raise ValueError(f"{op}: kl_coef is {kl_coef}, which needs ref_logp")


def check(logp, old_logp, ref_logp, advantages, weights, clip_low, clip_high, kl_coef, kl_kind, sequence_ids) -> None:
    check_streams("grpo_loss", logp, old_logp, ref_logp, advantages, weights)
    check_settings("grpo_loss", ref_logp, clip_low, clip_high, kl_coef, kl_kind)
    if sequence_ids is not None and (sequence_ids.dtype != torch.int64 or sequence_ids.shape != logp.shape):
        raise ValueError(
            f"grpo_loss: sequence_ids must be int64 [{logp.shape[0]}], "
            f"not {sequence_ids.dtype} {list(sequence_ids.shape)}"
        )


def reference(
    logp, old_logp, ref_logp, advantages, weights, clip_low, clip_high, kl_coef, kl_kind, sequence_ids
) -> tuple[Tensor, ...]:
    """Plain torch, differentiated by autograd; the one place where the formula is written in torch.

    Returns the loss [T] and the fields of GRPOStats.
    """
    work = logp.dtype if logp.dtype == torch.float64 else torch.float32
    live = weights != 0
    logp = torch.where(live, logp.to(work), 0.0)
    old_logp = logp.detach() if old_logp is None else torch.where(live, old_logp.to(work), 0.0)
    advantages, weights = advantages.to(work), weights.to(work)

    log_ratio = logp - old_logp
    if sequence_ids is not None:
        log_ratio = _sequence_mean(log_ratio, live, sequence_ids)
    ratio = torch.exp(log_ratio)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    row = -torch.minimum(surrogate, clipped)

    kl_sum = None
    if ref_logp is not None:
        kl = kl_estimate(logp, torch.where(live, ref_logp.to(work), 0.0), kl_kind)
        kl_sum = kl.detach().sum()
        if kl_coef != 0.0:
            row = row + kl_coef * kl
    loss = weights * torch.where(live, row, 0.0)

    with torch.no_grad():
        held = torch.where(live, ratio, 0.0)
        zero = held.new_zeros(())
        clip_count = ((clipped < surrogate) & live).sum(dtype=work)
        largest = held.max() if held.numel() else zero
        return loss, zero if kl_sum is None else kl_sum, clip_count, held.sum(), largest, live.sum(dtype=work)


def loss_and_slope(logp: Tensor, *args) -> tuple[Tensor, Tensor, GRPOStats]:
    """`reference` on per-row arguments: each row's loss, its slope d(loss)/d(logp), the statistics; without gradient.

    For ops that take the gradient in their forward pass: the formula stays the reference's.
    """
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        loss, *stats = reference(leaf, *args)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope, GRPOStats(*stats)


KIND_NUMBER = {"none": 0, "k1": 1, "k2": 2, "k3": 3}
BLOCK = 1024


@jit
def row_loss(logp, old_logp, ref_logp, advantage, low, high, kl_coef, KIND: tl.constexpr):
    """(loss, slope d(loss)/d(logp), ratio, whether the clip removed the gradient, kl) of rows, before their weights.

    The formula's one place in Triton; the ops behind the head share it. On policy, old_logp is logp itself.
    """
    ratio = tl.exp(logp - old_logp)
    surrogate = ratio * advantage
    held = tl.minimum(tl.maximum(ratio, low), high) * advantage
    clipped = held < surrogate
    loss = -tl.minimum(surrogate, held)
    slope = tl.where(clipped, 0.0, -surrogate)
    kl = tl.zeros_like(ratio)
    if KIND > 0:
        d = ref_logp - logp
        if KIND == 1:
            kl = -d
            slope += kl_coef
        elif KIND == 2:
            kl = 0.5 * d * d
            slope -= kl_coef * d
        else:
            e = tl.exp(d)
            kl = e - d - 1.0
            slope += kl_coef * (1.0 - e)
        loss += kl_coef * kl
    return loss, slope, ratio, clipped, kl


@jit
def _loss_rows(
    logp, old_logp, ref_logp, advantages, weights, loss, slope, partial, rows, low, high, kl_coef,
    ON_POLICY: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows a program: their loss, slope d(loss)/d(logp), and five statistics into `partial` [5, programs]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights + row, mask=row < rows, other=0.0)
    live = weight != 0.0
    p = tl.load(logp + row, mask=live, other=0.0)
    old = p if ON_POLICY else tl.load(old_logp + row, mask=live, other=0.0)
    ref = p if KIND == 0 else tl.load(ref_logp + row, mask=live, other=0.0)
    advantage = tl.load(advantages + row, mask=live, other=0.0)
    value, gradient, ratio, clipped, kl = row_loss(p, old, ref, advantage, low, high, kl_coef, KIND)
    ratio = tl.where(live, ratio, 0.0)
    tl.store(loss + row, tl.where(live, weight * value, 0.0), mask=row < rows)
    tl.store(slope + row, tl.where(live, weight * gradient, 0.0), mask=row < rows)
    own = partial + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(own, tl.sum(tl.where(live, kl, 0.0), 0))
    tl.store(own + programs, tl.sum((clipped & live).to(tl.float32), 0))
    tl.store(own + 2 * programs, tl.sum(ratio, 0))
    tl.store(own + 3 * programs, tl.sum(live.to(tl.float32), 0))
    tl.store(own + 4 * programs, tl.max(ratio, 0))


def _supports(logp, *rest) -> str | None:
    if logp.dtype == torch.float64:
        return "logp is float64, which only the reference keeps"
    return None if rest[-1] is None else "it has no ratio over sequences (GSPO)"


def _triton_supports(*args) -> str | None:
    return _supports(*args) or where_triton_runs(*args[:5])


def _float_streams(*streams) -> list[Tensor]:
    """The five streams of rows as a kernel reads them; logp stands in for what is not given."""
    logp = streams[0].detach().float().contiguous()
    return [logp, *(logp if x is None else x.detach().float().contiguous() for x in streams[1:])]


def _triton_forward(
    logp, old_logp, ref_logp, advantages, weights, clip_low, clip_high, kl_coef, kl_kind, sequence_ids
) -> tuple:
    streams = _float_streams(logp, old_logp, ref_logp, advantages, weights)
    rows, programs = logp.shape[0], -(-logp.shape[0] // BLOCK)
    loss, slope = torch.empty(2, rows, dtype=torch.float32, device=logp.device)
    partial = torch.empty(5, max(programs, 1), dtype=torch.float32, device=logp.device)
    if rows:
        kind = KIND_NUMBER["none" if ref_logp is None else kl_kind]
        settings = (float(1 - clip_low), float(1 + clip_high), float(kl_coef), old_logp is None, kind, BLOCK)
        _loss_rows[(programs,)](*streams, loss, slope, partial, rows, *settings, num_warps=8)  # 4 spill 8 bytes
    else:
        partial.zero_()
    kl_sum, clipped, ratio_sum, count = partial[:4].sum(1).unbind()
    return (loss, kl_sum, clipped, ratio_sum, partial[4].amax(), count), (slope, logp.dtype)


def _backward(saved, grads, needs) -> tuple:
    slope, dtype = saved
    return ((grads[0] * slope).to(dtype),)


def _native_forward(
    run, scratch, logp, old_logp, ref_logp, advantages, weights, clip_low, clip_high, kl_coef, kl_kind, sequence_ids
) -> tuple:
    """`run(name, *arguments)` calls the native function; `scratch` floats are what its blocks leave to be merged."""
    streams = _float_streams(logp, old_logp, ref_logp, advantages, weights)
    rows, kind = logp.shape[0], KIND_NUMBER["none" if ref_logp is None else kl_kind]
    results = [streams[0].new_empty(n) for n in (rows, rows, *scratch, 5)]
    settings = (1 - clip_low, 1 + clip_high, kl_coef, kind)
    run("grpo_loss", *(x.data_ptr() for x in streams), rows, *settings, *(x.data_ptr() for x in results))
    kl_sum, clipped, ratio_sum, count, largest = results[-1].unbind()
    return (results[0], kl_sum, clipped, ratio_sum, largest, count), (results[1], logp.dtype)


def _cpu_forward(*args) -> tuple:
    return _native_forward(native.call_cpu, (), *args)


def _cuda_forward(*args) -> tuple:
    partial_sums = 5 * native.cuda().grpo_loss_blocks(args[0].shape[0])
    return _native_forward(functools.partial(native.launch, args[0].device), (partial_sums,), *args)


def _case(size: str, rows: int, *settings, on_policy=False, masked=0.0, gspo=False, kl=True) -> Case:
    """Ratios on both sides of both bounds, none so near that float32 and float64 could disagree about the side;
    `settings` are clip_low, clip_high, kl_coef, kl_kind."""

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        logp, noise, drift, advantages, weights, drop = torch.randn(6, rows, generator=generator, dtype=torch.float64)
        logp = -2 * logp.abs()
        old = logp + (0.05 if gspo else 0.3) * noise
        for bound in (1 - settings[0], 1 + settings[1]):
            old = torch.where(((logp - old).exp() - bound).abs() < 1e-5, logp, old)
        weights = torch.where(drop > masked, weights.abs() + 0.1, 0.0) if masked else weights.abs() + 0.1
        advantages = torch.where(advantages.abs() < 0.1, 0.0, advantages)
        ids = (torch.arange(rows) * 7 // 60 * 3 + 11).to(device) if gspo else None
        logp, old = (torch.where(weights == 0, torch.nan, x) for x in (logp, old))  # no one may look at masked rows
        streams = [x.to(device, dtype) for x in (logp, old, logp + 0.5 * drift, advantages, weights)]
        if on_policy:
            streams[1] = None
        if not kl:
            streams[2] = None
        return *streams, *settings, ids

    words = [f"{rows} rows", settings[3] if kl else "no kl", f"clip {settings[0]} {settings[1]}"]
    words += ["on policy"] * on_policy + ["masked"] * bool(masked) + ["gspo"] * gspo
    return Case(" ".join(words), size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 13, 0.2, 0.2, 0.04, "k3"),
        _case("tiny", 40, 0.2, 0.28, 0.0, "k3", kl=False, masked=0.5),
        _case("ragged", 1001, 10.0, 10.0, 0.1, "k1", masked=0.3),
        _case("ragged", 257, 0.2, 0.2, 0.1, "k2", on_policy=True),
        _case("ragged", 333, 0.02, 0.03, 0.05, "k3", gspo=True, masked=0.5),
        _case("model", 1 << 20, 0.2, 0.2, 0.04, "k3"),
    ]


def invalid() -> list[tuple[str, tuple]]:
    x = torch.ones(4)
    settings = (0.2, 0.2, 0.0, "k3", None)
    return [
        ("two dimensions", (x.view(2, 2), x, None, x, x, *settings)),
        ("a short old_logp", (x, x[:3], None, x, x, *settings)),
        ("no advantages", (x, x, None, None, x, *settings)),
        ("weights of another length", (x, x, None, x, x[:2], *settings)),
        ("a negative clip", (x, x, None, x, x, -0.1, 0.2, 0.0, "k3", None)),
        ("an unknown kl", (x, x, x, x, x, 0.2, 0.2, 0.1, "k4", None)),
        ("kl without a reference", (x, x, None, x, x, 0.2, 0.2, 0.1, "k3", None)),
        ("float sequence_ids", (x, x, None, x, x, 0.2, 0.2, 0.0, "k3", x)),
    ]


def _bytes(logp, old_logp, ref_logp, advantages, weights, *_) -> int:
    return 4 * logp.numel() + sum(
        s.numel() * s.element_size() for s in (logp, old_logp, ref_logp, advantages, weights) if s is not None
    )


OP = register(
    Op(
        name="grpo_loss",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, _backward, unavailable=native.cpu_unavailable, supports=_supports),
            "cuda": Backend(_cuda_forward, _backward, unavailable=native.cuda_unavailable, supports=_supports),
            "triton": Backend(_triton_forward, _backward, unavailable=triton_unavailable, supports=_triton_supports),
        },
        cases=cases,
        invalid=invalid,
        gradients=(0,),
        tolerances={
            torch.float32: Tolerance(
                4e-6, 4e-6, "differences of logp of order ten keep 1e-6; sums over a million rows keep 1e-6 of the sum"
            ),
        },
        gradient_tolerances={torch.float32: Tolerance(4e-6, 4e-6, "the same differences behind the same exp")},
        flops=lambda logp, *_: 20 * logp.numel(),
        bytes=_bytes,
    )
)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    sequence_ids: Tensor | None = None,
    *,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, GRPOStats]:
    """Per-token GRPO (or GSPO) loss, weighted; its sum is the scalar loss.

    logp: float [T], nats. old_logp: float [T], or None for exactly on-policy rows (logp.detach()). ref_logp: float [T]
    or None. advantages: float [T]. weights: float [T] (or a mask), 0 where the row is not trained on. clip_low,
    clip_high: >= 0, any size. kl_kind: "k1", "k2" or "k3". sequence_ids: int64 [T], sorted; makes the ratio GSPO's.
    Returns float32 [T] (float64 for float64 logp); with return_stats, (loss, GRPOStats).
    Raises ValueError on shapes, dtypes or devices that do not fit, a negative clip, an unknown kl_kind, or a kl_coef
    without ref_logp.
    """
    loss, *stats = OP(
        logp,
        old_logp,
        ref_logp,
        advantages,
        weights,
        clip_low,
        clip_high,
        kl_coef,
        kl_kind,
        sequence_ids,
        backend=backend,
    )
    return (loss, GRPOStats(*stats)) if return_stats else loss
