"""C++ for the ops that begin with the head on a CPU; their contracts are in linear_logprob.py and linear_grpo_loss.py.

csrc/cpu/linear_head.cpp takes a chunk of rows through everything while it is in the cache: logits, softmax, the loss,
its slope, d(logits) over the logits, and both gradient products, in float32. Of memory it takes one chunk of logits and
no copy of the head. Rows that cannot have a gradient (weight 0, or no advantage and no KL term) are put behind the
others and left out of the two gradient products; clipped ones, which are known too late for that, stay in.

The same bits for any number of threads. On one thread of a Zen 4, loss and gradients run at 82 GFLOP/s (6000 rows x 64
x 280 words) and 96 (960 x 512 x 8192) of the 117 that its registers can do. From one row on, no size was found where
the reference is faster, so `supports` asks for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels import memory, native
from r1fast_kernels.grpo_loss import KIND_NUMBER

NO_LOSS, GIVEN_SLOPE, GRPO = 0, 1, 2  # HeadCall::Loss
NO_STREAMS = (None, None, None, None)
NO_POLICY = (0.0, 0.0, 0.0, 0)


def supports(hidden, weight, *_) -> str | None:
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, and the input is {hidden.dtype}"
    return None if hidden.shape[1] else "the hidden states have no width"


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _plain(x: Tensor | None) -> Tensor | None:
    """As native code reads it: float32 without gaps."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


class Found:
    """What a call computed: per row logp and entropy [T]; stats [6] of GRPO; gradients, None where not wanted."""

    __slots__ = ("d_hidden", "d_weight", "entropy", "logp", "stats")


def run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    wants: tuple[bool, bool] = (False, False),
    loss: int = NO_LOSS,
    slopes: Tensor | None = None,
    streams: tuple[Tensor | None, ...] = NO_STREAMS,
    policy: tuple[float, float, float, int] = NO_POLICY,
    entropy: bool = True,
) -> Found:
    """One native call. `streams`: old_logp, ref_logp, advantages, weights; `policy`: lowest and highest ratio, kl_coef,
    number of the KL kind; `wants`: gradients of hidden and weight, float32."""
    hidden, weight, targets = _plain(hidden), _plain(weight), targets.contiguous()
    given = [_plain(x) for x in (slopes, *streams)]
    rows = hidden.shape[0]
    found = Found()
    found.logp = hidden.new_empty(rows)
    found.entropy = hidden.new_empty(rows) if entropy else None
    found.d_hidden = memory.empty(hidden, hidden.shape) if wants[0] else None
    found.d_weight = memory.empty(weight, weight.shape) if wants[1] else None
    found.stats = hidden.new_empty(6) if loss == GRPO else None
    native.cpu().linear_head(
        *(x.data_ptr() for x in (hidden, weight, targets)), rows, hidden.shape[1], weight.shape[0], 1.0 / temperature,
        loss, *map(_address, given), *policy,
        *map(_address, (found.logp, found.entropy, found.d_hidden, found.d_weight, found.stats)),
    )  # fmt: skip
    return found


def kept(found: Found, hidden: Tensor, weight: Tensor) -> tuple:
    """What `scaled_backward` needs."""
    return found.d_hidden, found.d_weight, hidden.dtype, weight.dtype


def scaled_backward(saved, grads, needs) -> tuple[Tensor | None, ...]:
    """The gradients of forward times that of the loss, in the dtype of what they are gradients of.

    A loss that is differentiated as it is has a gradient of exactly 1 and its gradients need no copy: they are given
    out once as they are, and a second backward through the same loss gets them again.
    """
    gradients, dtypes = saved[:2], saved[2:]
    one = bool(grads[0] == 1)
    return tuple(
        None if g is None else (g if one else g * grads[0]).to(dtype)
        for g, dtype in zip(gradients, dtypes, strict=True)
    )


def logprob_forward(hidden, weight, targets, temperature) -> tuple[tuple[Tensor, Tensor], tuple]:
    found = run(hidden, weight, targets, temperature)
    return (found.logp, found.entropy), (hidden, weight, targets, temperature)


def logprob_backward(saved, grads, needs) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, targets, temperature = saved
    found = run(hidden, weight, targets, temperature, needs, GIVEN_SLOPE, grads[0], entropy=False)
    return tuple(None if g is None else g.to(hidden.dtype) for g in (found.d_hidden, found.d_weight))


def _wants(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    return hidden.requires_grad, weight.requires_grad


def grpo_forward(
    hidden, weight, targets, old_logp, ref_logp, advantages, weights, temperature, clip_low, clip_high, kl_coef,
    kl_kind, wants=None,
) -> tuple[tuple[Tensor, ...], tuple]:  # fmt: skip
    kind = KIND_NUMBER["none" if ref_logp is None else kl_kind]
    found = run(
        hidden, weight, targets, temperature, _wants(hidden, weight) if wants is None else wants, GRPO,
        streams=(old_logp, ref_logp, advantages, weights), policy=(1 - clip_low, 1 + clip_high, kl_coef, kind),
    )  # fmt: skip
    return (*found.stats.unbind(), found.logp, found.entropy), kept(found, hidden, weight)


def cross_entropy_forward(hidden, weight, targets, weights, wants=None) -> tuple[tuple[Tensor, Tensor], tuple]:
    slopes = -_plain(weights)
    wants = _wants(hidden, weight) if wants is None else wants
    found = run(hidden, weight, targets, 1.0, wants, GIVEN_SLOPE, slopes, entropy=False)
    return (slopes @ found.logp, found.logp), kept(found, hidden, weight)
