"""Log-probability and entropy of given tokens straight from hidden states: head product, softmax and gather in one op.

    z[t]       = hidden[t] @ weight.T / temperature
    logp[t]    = z[t, targets[t]] - logsumexp(z[t])
    entropy[t] = logsumexp(z[t]) - sum_v softmax(z[t])_v * z[t, v]

Logits are the largest tensor of training ([T, V] in fp32: 20 GB at 32k tokens and 152k words), so they only exist a
chunk of rows at a time, in fp32; the backward pass makes each chunk again. Weight gradients are summed in fp32, chunk
after chunk, in a fixed order: the same call gives the same bits.

The Triton kernels, which linear_grpo_loss.py uses too, are in linear_head_triton.py, the C++ in linear_head_cpu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1fast_kernels import linear_head_cpu, native
from r1fast_kernels import linear_head_triton as head_triton
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import triton_unavailable


def check_head(op, hidden, weight, targets, temperature) -> None:
    """Shared by the ops that begin with the head."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: hidden must be [T, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"{op}: hidden and weight must be float tensors of one dtype and device, "
            f"not {hidden.dtype} on {hidden.device} and {weight.dtype} on {weight.device}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(
            f"{op}: targets must be int64 [{hidden.shape[0]}] on {hidden.device}, "
            f"not {targets.dtype} {list(targets.shape)} on {targets.device}"
        )
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, not {temperature}")
    if targets.device.type == "cpu" and targets.shape[0]:  # 4 us at 7k rows; on a GPU it would wait for the queue
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"{op}: targets go from {low} to {high}, outside a vocabulary of {weight.shape[0]}")


def check(hidden, weight, targets, temperature) -> None:
    check_head("linear_logprob", hidden, weight, targets, temperature)


def work_dtype(hidden: Tensor) -> torch.dtype:
    """What the arithmetic is done in: fp64 for fp64 input (tests), else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk of logits: 1 MiB of fp32, or up to 512 rows of up to 32 MiB; never fewer than 64.

    Fewer rows make the products slow, more make the buffers' first touch and the cache's misses dear. One core, forward
    and backward of the GRPO loss: 7000 x 64 x 250 words takes 28 ms at 256 rows, 18 at 1024, 21 at all 7000;
    4096 x 512 x 8192 takes 1.45 s at 64 rows, 1.19 at 256, 0.97 at 512 and at 1024.
    """
    return max((1 << 18) // vocabulary, min(512, (1 << 23) // vocabulary), 64)


class Head:
    """The distributions of rows behind the head, a chunk at a time in two buffers that are reused."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float):
        work = work_dtype(hidden)
        self.hidden, self.weight, self.temperature = hidden.to(work), weight.to(work), temperature
        self.rows = chunk_rows(weight.shape[0])
        shape = (min(self.rows, hidden.shape[0]), weight.shape[0])
        self.logits = hidden.new_empty(shape, dtype=work)
        self.logprobs = hidden.new_empty(shape, dtype=work)

    def chunks(self) -> list[slice]:
        return [slice(s, s + self.rows) for s in range(0, self.hidden.shape[0], self.rows)]

    def distribution(self, chunk: slice, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(logp [C], entropy [C] or None, probabilities [C, V]) of a chunk; the next call overwrites the last."""
        hidden = self.hidden[chunk]
        logits, logprobs = self.logits[: hidden.shape[0]], self.logprobs[: hidden.shape[0]]
        torch.mm(hidden, self.weight.T, out=logits)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        torch._log_softmax(logits, 1, False, out=logprobs)
        logp = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)
        probabilities = torch.exp(logprobs, out=logits)
        return logp, -logprobs.mul_(probabilities).sum(1) if entropy else None, probabilities

    def gradients(self, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the gradients of hidden (to be written) and weight (to be added to) go into."""
        d_hidden = self.hidden.new_empty(self.hidden.shape) if wants_hidden else None
        return d_hidden, self.weight.new_zeros(self.weight.shape) if wants_weight else None

    def logit_gradient(self, probabilities: Tensor, targets: Tensor, slope: Tensor) -> Tensor:
        """d/d(logits before temperature) of sum(slope * logp), [C, V], written over the probabilities."""
        slope = (slope / self.temperature).unsqueeze(1)
        return probabilities.mul_(-slope).scatter_add_(1, targets.unsqueeze(1), slope)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        head = Head(hidden, weight, temperature)
        logp = hidden.new_empty(hidden.shape[0], dtype=head.logits.dtype)
        entropy = torch.empty_like(logp)
        for chunk in head.chunks():
            logp[chunk], entropy[chunk], _ = head.distribution(chunk, targets[chunk], True)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor, _entropy: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        head = Head(hidden, weight, ctx.temperature)
        d_hidden, d_weight = head.gradients(*ctx.needs_input_grad[:2])
        for chunk in head.chunks():
            _, _, probabilities = head.distribution(chunk, targets[chunk], False)
            gradient = head.logit_gradient(probabilities, targets[chunk], slope[chunk])
            if d_hidden is not None:
                torch.mm(gradient, head.weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(gradient.T, head.hidden[chunk])
        found = (None if d is None else d.to(hidden.dtype) for d in (d_hidden, d_weight))
        return *found, None, None


def reference(hidden, weight, targets, temperature) -> tuple[Tensor, Tensor]:
    """Plain torch, a chunk of rows at a time; tests/test_reference_ops.py holds it against all logits at once."""
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


def _triton_forward(hidden, weight, targets, temperature) -> tuple[tuple[Tensor, Tensor], tuple]:
    head = head_triton.Head(hidden, weight, targets, temperature)
    found = head.measure()
    head.run(head.every, found, head_triton.NO_LOSS, head_triton.Streams(), head_triton.Settings(), None)
    return (found.logp, found.entropy), (hidden, weight, targets, found.lse, temperature)


def _triton_backward(saved, grads, needs) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, targets, lse, temperature = saved
    head = head_triton.Head(hidden, weight, targets, temperature)
    slopes = grads[0].contiguous()
    trained, _ = head.split(slopes != 0)
    into = head_triton.Gradients(head, trained, needs)
    head.run_gradient(trained, lse, slopes, into)
    return into.d_hidden, None if into.d_weight is None else into.d_weight.to(weight.dtype)


def head_case(size: str, rows: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype, generator) -> tuple:
    """(hidden, weight, targets) with logits of standard deviation 2 and likely targets among them."""
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float32)
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float32) * (2 / hidden**0.5)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    h[::2] += w[targets[::2]] / 2
    return h.to(device, dtype), w.to(device, dtype), targets.to(device)


def _case(size: str, rows: int, hidden: int, vocabulary: int, temperature: float) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        return *head_case(size, rows, hidden, vocabulary, device, dtype, generator), temperature

    return Case(f"{rows} rows {hidden} hidden {vocabulary} words T {temperature}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 37, 64, 250, 1.0),
        _case("ragged", 1301, 33, 1003, 0.7),  # more than one chunk
        _case("ragged", 70, 24, 5003, 1.3),
        _case("model", 4096, 512, 8192, 1.0),
    ]


def invalid() -> list[tuple[str, tuple]]:
    h, w, targets = torch.ones(3, 8), torch.ones(5, 8), torch.arange(3)
    return [
        ("another width", (h, w[:, :4], targets, 1.0)),
        ("two dtypes", (h, w.double(), targets, 1.0)),
        ("int32 targets", (h, w, targets.int(), 1.0)),
        ("too few targets", (h, w, targets[:2], 1.0)),
        ("a target past the vocabulary", (h, w, targets + 3, 1.0)),
        ("a negative target", (h, w, targets - 1, 1.0)),
        ("a temperature of zero", (h, w, targets, 0.0)),
    ]


OP = register(
    Op(
        name="linear_logprob",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(
                linear_head_cpu.logprob_forward,
                linear_head_cpu.logprob_backward,
                unavailable=native.cpu_unavailable,
                supports=linear_head_cpu.supports,
            ),
            "triton": Backend(
                _triton_forward, _triton_backward, unavailable=triton_unavailable, supports=head_triton.supports
            ),
        },
        cases=cases,
        invalid=invalid,
        gradients=(0, 1),
        tolerances={
            torch.float32: Tolerance(1e-5, 1e-5, "float32 products over H, a sum of V exponentials"),
            torch.bfloat16: Tolerance(
                1e-5, 1e-5, "the arithmetic is float32 on bf16 input; nothing is rounded to bf16"
            ),
        },
        gradient_tolerances={
            torch.float32: Tolerance(1e-5, 2e-5, "float32 products over V and over T"),
            torch.bfloat16: Tolerance(
                2**-7, 2**-4, "8 bits of each logit's gradient, which then sum over rows and words: 0.4% of the whole"
            ),
        },
        flops=lambda hidden, weight, *_: 2 * hidden.numel() * weight.shape[0],
        bytes=lambda hidden, weight, *_: (
            (hidden.numel() + weight.numel()) * hidden.element_size() + hidden.shape[0] * 16
        ),
    )
)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies of their distributions.

    hidden: float [T, H]. weight: float [V, H], the head. targets: int64 [T], in [0, V). temperature: > 0.
    Returns (logp float32 [T], entropy float32 [T]), nats (float64 for float64 input). Differentiable in hidden and
    weight through logp; entropy carries no gradient: it is a measurement.
    Raises ValueError on shapes, dtypes or devices that do not fit, a temperature that is not positive, or (looked at on
    the CPU) a target outside the vocabulary.
    """
    return OP(hidden, weight, targets, temperature, backend=backend)
