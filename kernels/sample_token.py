"""Draw the next token of every sequence, with the log-probability it was drawn at.

    p        = softmax(logits / temperature)                      temperature 0: the argmax, lowest index on ties
    top_k    keeps the k likeliest (0: all)
    top_p    then keeps, of what is left and renormalised, the smallest set of likeliest tokens whose probability reaches
             top_p (1: all); always at least one. Ties are taken in the order of the token's index.
    token    = the smallest v with  sum_{w <= v} kept p_w  >  u * sum_w kept p_w         (inverse CDF, in index order)

u is one uniform number in [0, 1) of 24 bits, from Philox4x32-10 (Salmon et al. 2011) with key (seed) and counter
(position, sequence): the same sequence draws the same token whatever else is in the batch. One number a row costs one
Philox block, where Gumbel noise would cost V / 4 of them. No row is sorted unless some row truncates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MULTIPLIER = ((0xD2511F53,), (0xCD9E8D57,))
WEYL = ((0x9E3779B9,), (0xBB67AE85,))
MASK = 0xFFFFFFFF


class SampledToken(NamedTuple):
    """token: int64 [B]. logprob: float32 [B], nats, of the distribution drawn from. logprob_full: float32 [B], of the
    untruncated one at the same temperature. Both are of the untempered softmax where the temperature is 0."""

    token: Tensor
    logprob: Tensor
    logprob_full: Tensor


def philox(even, odd, key):
    """Philox4x32-10. even: words 0 and 2 of the counter, odd: words 1 and 3, key: its two words; each int64 [2, B] of
    32-bit values, numpy's or torch's. Returns the four output words the same way, (even, odd).

    The product of two 32-bit numbers wraps in int64 and keeps its bits, so signed arithmetic and masks are enough.
    """
    number = (lambda x: torch.tensor(x, device=key.device)) if isinstance(key, Tensor) else np.array
    multiplier, weyl = number(MULTIPLIER), number(WEYL)
    for _ in range(10):
        product = (even * multiplier)[[1, 0]]
        even, odd = (product >> 32 ^ odd ^ key) & MASK, product & MASK
        key = key + weyl & MASK
    return even, odd


def uniform(seed: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """24-bit uniform numbers in [0, 1), float32 [B], one a row: the top bits of Philox's first word.

    On the CPU through numpy, whose operations on a few hundred numbers take half of torch's time to dispatch; four words
    apart instead of two by two doubled it again (256 rows: 0.07 ms, 0.12 ms).
    """
    words = torch.stack((position, sequence, seed))
    words = words.numpy() if words.device.type == "cpu" else words
    low, high = words & MASK, words >> 32 & MASK
    pair = (low[2], high[2])
    key = torch.stack(pair) if isinstance(low, Tensor) else np.stack(pair)
    bits = philox(low[:2], high[:2], key)[0][0] >> 8
    return (bits if isinstance(bits, Tensor) else torch.from_numpy(bits)).to(torch.float32) * 2.0**-24


def _descending(p: Tensor) -> Tensor:
    """Values of each row from large to small. numpy's sort has no indices to carry: 0.1 ms to torch's 2.5 (256 x 250)."""
    if p.device.type != "cpu":
        return torch.sort(p, dim=-1, descending=True).values
    return torch.from_numpy(np.sort(-p.numpy(), axis=-1)).neg_()


def kept(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens survive truncation: bool [B, V]. p: probabilities [B, V]; top_k int [B]; top_p float [B].

    What survives is a prefix of the sorted values, so its length and its last value say it all, ties apart.
    """
    ordered = _descending(p)
    size = torch.where(top_k > 0, top_k, p.shape[1]).unsqueeze(1)
    if bool((top_k > 0).any()):
        ordered = torch.where(torch.arange(p.shape[1], device=p.device) < size, ordered, 0.0)
    before = ordered.cumsum(-1) - ordered
    share = torch.where(top_p < 1, top_p.to(p.dtype), torch.inf).unsqueeze(1) * ordered.sum(-1, keepdim=True)
    count = torch.minimum((before < share).sum(-1, keepdim=True), size).clamp(min=1, max=p.shape[1])
    last = ordered.gather(1, count - 1)
    keep = p >= last
    if bool((keep.sum(-1, keepdim=True) > count).any()):
        above, equal = p > last, p == last
        keep = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return keep


def reference(
    logits: Tensor, seed: Tensor, sequence: Tensor, position: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor
) -> SampledToken:
    """Plain torch; all arguments [B]."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    greedy = temperature == 0
    some_greedy = bool(greedy.any())
    scaled = logits / (torch.where(greedy, 1.0, temperature) if some_greedy else temperature).unsqueeze(1)
    logp = torch.log_softmax(scaled, -1)
    p = logp.exp()

    truncated = (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1)) & ~greedy
    some_truncated = bool(truncated.any())
    if some_truncated:
        if bool(truncated.all()):
            p = p * kept(p, top_k, top_p)
        else:
            rows = truncated.nonzero().squeeze(1)
            some = p[rows]
            p[rows] = some * kept(some, top_k[rows], top_p[rows])
    cdf = p.cumsum(-1)
    total = cdf[:, -1]
    point = uniform(seed, sequence, position).to(p.dtype) * total
    token = torch.searchsorted(cdf, point.unsqueeze(1), right=True).clamp_(max=logits.shape[1] - 1)
    if some_greedy:
        token = torch.where(greedy.unsqueeze(1), logits.argmax(-1, keepdim=True), token)
    full = logp.gather(1, token).squeeze(1)
    logprob = torch.where(truncated, full - p.sum(-1).log(), full) if some_truncated else full
    return SampledToken(token.squeeze(1), logprob, full)


def _spread(value, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value if value.dim() else value.expand(rows)
    return torch.full((rows,), value, dtype=dtype, device=device)


def sample_token(
    logits: Tensor,
    seed: Tensor | int,
    sequence: Tensor | int,
    position: Tensor | int,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    *,
    backend: str | None = None,
) -> SampledToken:
    """One token a row.

    logits: float [B, V]. seed, sequence, position: int64 [B]. temperature: float32 [B], >= 0. top_k: int32 [B], 0 for all.
    top_p: float32 [B], in (0, 1]. A plain number stands for all rows.
    Returns SampledToken. No gradient.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    rows, device = logits.shape[0], logits.device
    with torch.no_grad():
        return reference(
            logits,
            *(_spread(x, rows, torch.int64, device) for x in (seed, sequence, position)),
            _spread(temperature, rows, torch.float32, device),
            _spread(top_k, rows, torch.int32, device),
            _spread(top_p, rows, torch.float32, device),
        )
