"""Log-probability and entropy of given tokens straight from hidden states: head product, softmax and gather in one op.

    z[t]       = hidden[t] @ weight.T / temperature
    logp[t]    = z[t, targets[t]] - logsumexp(z[t])
    entropy[t] = logsumexp(z[t]) - sum_v softmax(z[t])_v * z[t, v]

Logits are the largest tensor of training ([T, V] in fp32: 20 GB at 32k tokens and 152k words), so they only exist a
chunk of rows at a time, in fp32; the backward pass makes each chunk again. Weight gradients are summed in fp32, chunk
after chunk, in a fixed order: the same call gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one chunk of logits. 2^21 (8 MiB of fp32) keeps a chunk near the cache and the products efficient.
CHUNK_ELEMENTS = 1 << 21


def work_dtype(hidden: Tensor) -> torch.dtype:
    """What the arithmetic is done in: fp64 for fp64 input (tests), else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: all of them where the logits are small, else a multiple of 64 under CHUNK_ELEMENTS."""
    if rows * vocabulary <= CHUNK_ELEMENTS:
        return max(rows, 1)
    return max(CHUNK_ELEMENTS // vocabulary // 64 * 64, 64)


class RowLogits:
    """Makes log-softmax rows chunk by chunk in buffers that are reused; also holds the two gradient products."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float):
        work = work_dtype(hidden)
        self.hidden, self.weight, self.temperature = hidden.to(work), weight.to(work), temperature
        self.rows = chunk_rows(hidden.shape[0], weight.shape[0])
        shape = (min(self.rows, hidden.shape[0]), weight.shape[0])
        self.logits = hidden.new_empty(shape, dtype=work)
        self.scratch = hidden.new_empty(shape, dtype=work)

    def chunks(self) -> list[slice]:
        return [slice(s, s + self.rows) for s in range(0, self.hidden.shape[0], self.rows)]

    def log_softmax(self, chunk: slice) -> Tensor:
        """Log-probabilities [C, V] of a chunk of rows, in a buffer the next call overwrites."""
        hidden = self.hidden[chunk]
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: hidden.shape[0]])
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        out = self.scratch[: hidden.shape[0]]
        return torch._log_softmax(logits, 1, False, out=out)

    def entropy(self, logprobs: Tensor) -> Tensor:
        """Entropy [C] of those rows; overwrites the logits."""
        probabilities = torch.exp(logprobs, out=self.logits[: logprobs.shape[0]])
        return -(probabilities.mul_(logprobs)).sum(1)

    def logit_gradient(self, logprobs: Tensor, targets: Tensor, slope: Tensor) -> Tensor:
        """d/d(logits before temperature) of sum(slope * logp), [C, V], written over logprobs."""
        slope = (slope / self.temperature).unsqueeze(1)
        gradient = logprobs.exp_().mul_(-slope)
        return gradient.scatter_add_(1, targets.unsqueeze(1), slope)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        head = RowLogits(hidden, weight, temperature)
        logp = hidden.new_empty(hidden.shape[0], dtype=head.logits.dtype)
        entropy = torch.empty_like(logp)
        for chunk in head.chunks():
            logprobs = head.log_softmax(chunk)
            logp[chunk] = logprobs.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
            entropy[chunk] = head.entropy(logprobs)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, slope: Tensor, _entropy: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        head = RowLogits(hidden, weight, ctx.temperature)
        d_hidden = torch.empty_like(head.hidden)
        d_weight = torch.zeros_like(head.weight)
        for chunk in head.chunks():
            gradient = head.logit_gradient(head.log_softmax(chunk), targets[chunk], slope[chunk])
            torch.mm(gradient, head.weight, out=d_hidden[chunk])
            d_weight.addmm_(gradient.T, head.hidden[chunk])
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The truth in plain torch, all logits at once."""
    work = work_dtype(hidden)
    logprobs = torch.log_softmax(hidden.to(work) @ weight.to(work).T / temperature, 1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies of their distributions.

    hidden: float [T, H]. weight: float [V, H], the head. targets: int64 [T], in [0, V). temperature: > 0.
    Returns (logp float32 [T], entropy float32 [T]), nats (float64 for float64 input). Differentiable in hidden and weight
    through logp; entropy carries no gradient: it is a measurement.
    Raises ValueError on shapes or dtypes that do not fit, or a temperature that is not positive.
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature)
