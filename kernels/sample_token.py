"""Draw the next token of every sequence, with the log-probability it was drawn at.

    p        = softmax(logits / temperature)                      temperature 0: the argmax, lowest index on ties
    top_k    keeps the k likeliest (0: all)
    top_p    then keeps, of what is left and renormalised, the smallest set of likeliest tokens whose probability
             reaches top_p (1: all); always at least one. Ties are taken in the order of the token's index.
    token    by halving the vocabulary: of the range [a, a + 2h), at first [0, the power of two that holds V), the upper
             half is taken where  u_l * (kept p of the range) >= kept p of the lower half, and it has any; h = .., 2, 1

u_l, a fresh number for every halving l, is uniform in [0, 1) with 24 bits: word l % 4 of Philox4x32-10 (Salmon et al.
2011) with key (seed) and counter (position + 2^32 (l // 4), sequence). So a sequence draws the same token whatever else
is in the batch, though its logits may round differently there: weights that are off by a relative 1e-6 change 1 draw in
10^6. With one number and the running sum of the weights (inverse CDF) they change 1 in 10^4 at V = 512, as the error of
every border adds up; Gumbel noise is as good as halving, but costs V / 4 Philox blocks a row where this costs 5. No row
is sorted unless some row truncates.

The Triton kernels are in sample_token_triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1fast_kernels import native, sample_token_triton
from r1fast_kernels.op import Backend, Case, Op, Tolerance, register
from r1fast_kernels.triton_support import triton_unavailable

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


def uniform(seed: Tensor, sequence: Tensor, position: Tensor, count: int) -> Tensor:
    """24-bit uniform numbers in [0, 1), float32 [count, B], those of a row from its Philox blocks in order.

    On the CPU through numpy, whose operations on a few hundred numbers take half of torch's time to dispatch, and two
    words at a time.
    """
    blocks = max(1, -(-count // 4))
    block = torch.arange(blocks, device=position.device)[:, None] << 32
    words = torch.stack([x.expand(blocks, -1).reshape(-1) for x in (position + block, sequence, seed)])
    words = words.numpy() if words.device.type == "cpu" else words
    low, high = words & MASK, words >> 32 & MASK
    pair = (low[2], high[2])
    key = torch.stack(pair) if isinstance(low, Tensor) else np.stack(pair)
    even, odd = philox(low[:2], high[:2], key)
    found = [torch.as_tensor(word >> 8).view(blocks, -1) for word in (even[0], odd[0], even[1], odd[1])]
    return torch.stack(found, 1).flatten(0, 1)[:count].to(torch.float32) * 2.0**-24


def halve(p: Tensor, seed: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """The tokens that weights p [B, V] and the rows' numbers choose, int64 [B, 1]: see the module."""
    rows, vocabulary = p.shape
    halvings = (vocabulary - 1).bit_length()
    sums = torch.zeros(rows, vocabulary + 1, dtype=torch.float64, device=p.device)
    torch.cumsum(p, 1, dtype=torch.float64, out=sums[:, 1:])
    step = torch.tensor([0, 1, 2], device=p.device)
    token = torch.zeros(rows, 1, dtype=torch.int64, device=p.device)
    for halving, number in enumerate(uniform(seed, sequence, position, halvings)):
        half = 1 << halvings - 1 - halving
        start, middle, end = sums.gather(1, (token + half * step).clamp_(max=vocabulary)).unbind(1)
        upper = (number * (end - start) >= middle - start) & (end > middle)
        token += half * upper.unsqueeze(1)
    return token


def _descending(p: Tensor) -> Tensor:
    """Values of each row, large to small. numpy's sort has no indices to carry: 0.1 ms to torch's 2.5 (256 x 250)."""
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


def check(logits, seed, sequence, position, temperature, top_k, top_p) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"sample_token: logits must be float [B, V], not {logits.dtype} {list(logits.shape)}")
    rows, device = logits.shape[:1], logits.device
    for name, value in (("seed", seed), ("sequence", sequence), ("position", position)):
        if value.dtype != torch.int64 or value.shape != rows or value.device != device:
            raise ValueError(_wrong(name, "int64", value, logits))
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not value.is_floating_point() or value.shape != rows or value.device != device:
            raise ValueError(_wrong(name, "float", value, logits))
    if top_k.dtype not in (torch.int32, torch.int64) or top_k.shape != rows or top_k.device != device:
        raise ValueError(_wrong("top_k", "int32", top_k, logits))


def _wrong(name: str, kind: str, value: Tensor, logits: Tensor) -> str:
    found = f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"sample_token: {name} must be {kind} [{logits.shape[0]}] on {logits.device}, or one number, not {found}"


def _least(name: str, values: Tensor, bound: float, inclusive: bool) -> float:
    """The smallest of a setting, which must not lie below its bound."""
    least = float(values.min())
    if not (least >= bound if inclusive else least > bound):
        raise ValueError(f"sample_token: {name} must be {'>=' if inclusive else '>'} {bound}, not {least}")
    return least


def reference(logits, seed, sequence, position, temperature, top_k, top_p) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch; all arguments [B]."""
    if not logits.shape[0]:
        empty = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        return seed.new_empty(0), empty, empty
    some_greedy = _least("temperature", temperature, 0, True) == 0
    some_truncated = _least("top_p", top_p, 0, False) < 1
    _least("top_k", top_k, 0, True)
    some_truncated |= bool(top_k.any())
    logits = logits.float() if logits.element_size() < 4 else logits
    greedy = temperature == 0
    scaled = logits / (torch.where(greedy, 1.0, temperature) if some_greedy else temperature).unsqueeze(1)
    logp = torch.log_softmax(scaled, -1)
    p = logp.exp()

    if some_truncated:
        truncated = (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1)) & ~greedy
        rows = truncated.nonzero().squeeze(1)
        if rows.shape[0] == p.shape[0]:
            p = p * kept(p, top_k, top_p)
        elif rows.shape[0]:
            some = p[rows]
            p[rows] = some * kept(some, top_k[rows], top_p[rows])
    token = halve(p, seed, sequence, position)
    if some_greedy:
        token = torch.where(greedy.unsqueeze(1), logits.argmax(-1, keepdim=True), token)
    full = logp.gather(1, token).squeeze(1)
    logprob = torch.where(truncated, full - p.sum(-1).log(), full) if some_truncated else full.clone()
    return token.squeeze(1), logprob, full


def _cpu_supports(logits, *rest) -> str | None:
    return "it computes in float32" if logits.dtype == torch.float64 else None


def _cpu_forward(logits, seed, sequence, position, temperature, top_k, top_p) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    logits = logits.float().contiguous()
    keys = [x.contiguous() for x in (seed, sequence, position)]
    settings = [temperature.float().contiguous(), top_k.int().contiguous(), top_p.float().contiguous()]
    token, logprob, full = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    tensors = (logits, *keys, *settings, token, logprob, full)
    native.cpu().sample_token(*(x.data_ptr() for x in tensors), rows, vocabulary)
    return token, logprob, full


def _cuda_supports(logits, *rest) -> str | None:
    if logits.dtype not in native.ELEMENT_TYPES:
        return f"it has no {logits.dtype}"
    limit = native.cuda().sample_token_limit
    return f"its vocabulary ends at {limit}" if logits.shape[1] > limit else None


def _cuda_forward(logits, seed, sequence, position, temperature, top_k, top_p) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    logits = logits.contiguous()
    keys = [x.contiguous() for x in (seed, sequence, position)]
    settings = [temperature.float().contiguous(), top_k.int().contiguous(), top_p.float().contiguous()]
    token = torch.empty_like(keys[0])
    logprob, full = (torch.empty_like(settings[0]) for _ in range(2))
    first, *others = (x.data_ptr() for x in (logits, *keys, *settings, token, logprob, full))
    kind = native.ELEMENT_TYPES[logits.dtype]
    native.launch(logits.device, "sample_token", first, kind, *others, rows, vocabulary)
    return token, logprob, full


def _case(size: str, rows: int, vocabulary: int, setting: str) -> Case:
    """`setting`: plain, truncated (every row by something) or mixed (greedy, truncated and plain rows)."""

    def make(device: str, dtype: torch.dtype, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
        number = torch.arange(rows)
        temperature, top_k, top_p = torch.ones(rows), torch.zeros(rows, dtype=torch.int32), torch.ones(rows)
        if setting != "plain":
            temperature = 0.5 + 0.25 * (number % 4)
            top_k = torch.where(number % 3 == 0, 5 + number % 7, 0).int()
            top_p = torch.where(number % 3 != 0, 0.9 - 0.1 * (number % 2), 1.0)
        if setting == "mixed":
            temperature[::5] = 0
            top_k[1::2], top_p[1::2] = 0, 1.0
        keys = (number * 0 + 2**40 + seed, number * 2**33 + 7, number % 50)
        return logits, *(x.to(device) for x in (*keys, temperature, top_k, top_p))

    return Case(f"{rows} rows {vocabulary} words {setting}", size, make)


def cases() -> list[Case]:
    return [
        _case("tiny", 9, 250, "plain"),
        _case("tiny", 8, 250, "truncated"),
        _case("ragged", 33, 1003, "mixed"),
        _case("ragged", 1, 7, "plain"),
        _case("ragged", 7, 9001, "mixed"),
        _case("model", 256, 250, "plain"),
        _case("model", 256, 250, "truncated"),
        _case("model", 64, 151_936, "plain"),
    ]


def invalid() -> list[tuple[str, tuple]]:
    logits, number, one, zero = torch.ones(3, 5), torch.arange(3), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    return [
        ("three dimensions", (logits[None], number, number, number, one, zero, one)),
        ("int32 seeds", (logits, number.int(), number, number, one, zero, one)),
        ("too few positions", (logits, number, number, number[:2], one, zero, one)),
        ("float top_k", (logits, number, number, number, one, one, one)),
        ("a negative temperature", (logits, number, number, number, one - 2, zero, one)),
        ("a negative top_k", (logits, number, number, number, one, zero - 1, one)),
        ("a top_p of zero", (logits, number, number, number, one, zero, one - 1)),
    ]


OP = register(
    Op(
        name="sample_token",
        check=check,
        reference=reference,
        backends={
            "cpu": Backend(_cpu_forward, unavailable=native.cpu_unavailable, supports=_cpu_supports),
            "cuda": Backend(_cuda_forward, unavailable=native.cuda_unavailable, supports=_cuda_supports),
            "triton": Backend(
                sample_token_triton.forward, unavailable=triton_unavailable, supports=sample_token_triton.supports
            ),
        },
        cases=cases,
        invalid=invalid,
        tolerances={
            torch.float32: Tolerance(
                2e-6, 1e-5, "log-probabilities down to -20 behind a float32 sum; tokens are equal"
            ),
            torch.bfloat16: Tolerance(
                2e-6, 1e-5, "the arithmetic is float32 on bf16 logits; nothing is rounded to bf16"
            ),
        },
        flops=lambda logits, *_: 4 * logits.numel(),
        bytes=lambda logits, *_: logits.numel() * logits.element_size() + logits.shape[0] * 56,
    )
)


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

    logits: float [B, V]. seed, sequence, position: int64 [B]. temperature: float32 [B], >= 0. top_k: int32 [B], >= 0, 0
    for all. top_p: float32 [B], > 0, 1 for all. A plain number stands for all rows.
    Returns SampledToken. No gradient.
    Raises ValueError on shapes, dtypes or devices that do not fit, or a setting out of its range. The kernels on a GPU
    do not make the host wait for their verdict: such a row gets token 0 and NaN for both log-probabilities.
    """
    rows, device = logits.shape[0], logits.device
    with torch.no_grad():
        drawn = OP(
            logits,
            *(_spread(x, rows, torch.int64, device) for x in (seed, sequence, position)),
            _spread(temperature, rows, torch.float32, device),
            _spread(top_k, rows, torch.int32, device),
            _spread(top_p, rows, torch.float32, device),
            backend=backend,
        )
    return SampledToken(*drawn)
