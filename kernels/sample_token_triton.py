"""Triton for sample_token; the contract is in sample_token.py.

One pass over the logits makes a maximum and a sum of exponentials for every fixed tile of the vocabulary; a second
kernel, a program a row, halves its way to a tile by these sums, and then to a token in that tile, which it reads again.
Tiles go by the vocabulary only, so a row's token does not depend on its batch. Rows that truncate are drawn by a third
kernel, which the others leave at once: no setting is looked at on the host, so all of it can be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1fast_kernels.triton_support import jit, next_power_of_2, tl, where_triton_runs

FAR = 0x7FFFFFFF  # larger than any token
LARGEST_TILE = 4096
# Bounds that one pass of a truncating row tries: a third of the search's passes more than with 16, each of half the
# work; and with 16 the compiler of Triton 3.6 spills 108 bytes (sm_80) where it now needs 64 registers of 16 warps.
WAYS = 8


@jit
def _tile_sums(logits, temperature, maxima, sums, width, tiles, TILE: tl.constexpr):
    """Of one tile of a row: the largest logit, and the sum of e^((x - largest) / temperature)."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * width + place, mask=place < width, other=float("-inf")).to(tl.float32)
    t = tl.load(temperature + row)
    largest = tl.max(x, 0)
    e = tl.exp((x - tl.where(largest == float("-inf"), 0.0, largest)) * (1.0 / tl.where(t == 0.0, 1.0, t)))
    own = row * tiles + tl.program_id(1)
    tl.store(maxima + own, largest)
    tl.store(sums + own, tl.sum(e, 0))


@jit
def _tile_masses(maxima, sums, row, tiles, inverse, TILES: tl.constexpr):
    """(maxima, masses relative to the row's largest logit in double, that largest logit) of a row's tiles."""
    tile = tl.arange(0, TILES)
    m = tl.load(maxima + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    s = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0)
    top = tl.max(m, 0)
    return m, (s * tl.exp((m - top) * inverse)).to(tl.float64), top


@jit
def _number(seed, sequence, position, row, halving):
    """The row's uniform number for a halving: word halving % 4 of the Philox block halving // 4. Key: seed; counter:
    position and sequence, low words first, the block added to position's high word."""
    p = tl.load(position + row)
    q = tl.load(sequence + row)
    high = (p >> 32).to(tl.int32) + halving // 4
    a, b, c, d = tl.philox(tl.load(seed + row), p.to(tl.int32), high, q.to(tl.int32), (q >> 32).to(tl.int32))
    word = halving % 4
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return ((bits >> 8).to(tl.float32) * 5.9604644775390625e-08).to(tl.float64)


@jit
def _halve(place, mass, start, half, least, halving, seed, sequence, position, row):
    """Where the row's numbers lead from [start, start + 2 half) among `mass` at `place`, by halving until `half` is
    below `least`: (start, half, halving) of what is left."""
    while half >= least:
        lower = tl.sum(tl.where((place >= start) & (place < start + half), mass, 0.0), 0)
        upper = tl.sum(tl.where((place >= start + half) & (place < start + 2 * half), mass, 0.0), 0)
        number = _number(seed, sequence, position, row, halving)
        start += tl.where((number * (lower + upper) >= lower) & (upper > 0.0), half, 0)
        half //= 2
        halving += 1
    return start, half, halving


@jit
def _valid(t, k, p):
    return (t >= 0.0) & (k >= 0) & (p > 0.0)


@jit
def _truncates(t, k, p, width):
    return _valid(t, k, p) & (t != 0.0) & (((k > 0) & (k < width)) | (p < 1.0))


@jit
def _draw(
    logits, seed, sequence, position, temperature, top_k, top_p, maxima, sums, token, logprob, full, width, tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """A row that keeps its whole distribution, or is greedy; or one with settings out of range: token 0 and NaN."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    if not _truncates(t, k, p, width):
        inverse = 1.0 / tl.where(t == 0.0, 1.0, t)
        m, mass, top = _tile_masses(maxima, sums, row, tiles, inverse, TILES)
        tile = tl.arange(0, TILES)
        total = tl.sum(mass, 0)
        zero = tl.full([], 0, tl.int32)
        start, half, halving = _halve(tile * TILE, mass, zero, zero + HALF, TILE, zero, seed, sequence, position, row)
        best = tl.minimum(tl.min(tl.where(m == top, tile, FAR), 0), tiles - 1)
        start = tl.where(t == 0.0, best * TILE, start)

        place = start + tl.arange(0, TILE)
        x = tl.load(logits + row * width + place, mask=place < width, other=float("-inf")).to(tl.float32)
        # Before the halving, which would keep x alive: 24 bytes spilled for sm_80 by Triton 3.6.
        first = tl.min(tl.where((place < width) & (x == top), place, FAR), 0)
        e = tl.exp((x - top) * inverse).to(tl.float64)
        drawn, _half, _halving = _halve(place, e, start, half, 1, halving, seed, sequence, position, row)
        found = tl.where(t == 0.0, tl.minimum(first, width - 1), drawn)
        found = tl.where(_valid(t, k, p), found, 0)
        own = tl.load(logits + row * width + found).to(tl.float32)
        value = (own - top) * inverse - tl.log(total.to(tl.float32))
        value = tl.where(_valid(t, k, p), value, float("nan"))
        tl.store(token + row, found.to(tl.int64))
        tl.store(logprob + row, value)
        tl.store(full + row, value)


@jit
def _weights(logits, start, width, top, inverse, BLOCK: tl.constexpr):
    """(tokens, which exist, their e^((x - top) / temperature)); 0 past the end."""
    place = start + tl.arange(0, BLOCK)
    live = place < width
    x = tl.load(logits + place, mask=live, other=float("-inf")).to(tl.float32)
    return place, live, tl.exp((x - top) * inverse)


@jit
def _above(logits, width, top, inverse, bounds, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """Number and sum of the weights above each of the bounds [WAYS]. Both fall as a bound rises, also in floating
    point: rounding is monotonic, and the order of addition is fixed."""
    count = tl.zeros([BLOCK, WAYS], tl.int32)
    total = tl.zeros([BLOCK, WAYS], tl.float32)
    for start in range(0, width, BLOCK):
        w = _weights(logits, start, width, top, inverse, BLOCK)[2]
        above = w[:, None] > bounds[None, :]
        count += above.to(tl.int32)
        total += tl.where(above, w[:, None], 0.0)
    return tl.sum(count, 0), tl.sum(total, 0).to(tl.float64)


@jit
def _cut(logits, width, top, inverse, most, share, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """The longest prefix of the weights in descending order that has at most `most` members and whose sum without its
    last member is below `share`: (smallest weight kept, how many of those equal to it, the sum of all kept).

    Nothing is sorted. A bound b keeps when the weights above it are fewer than `most` and sum to less than `share`; the
    smallest such b is the weight looked for. Its bits are found WAYS at a time, until one weight is left in between:
    a handful of passes over a row that the second-level cache holds.
    """
    low = tl.full([], 0, tl.int32)  # does not keep, unless every weight is kept
    high = tl.full([], 0x3F800000, tl.int32)  # 1.0, the likeliest token's weight: keeps
    low_count = tl.full([], 0, tl.int32) + width
    high_count = tl.full([], 0, tl.int32)
    larger = tl.full([], 0.0, tl.float64)  # sum of the weights above `high`
    while (high - low > 1) & (low_count - high_count > 1):
        bits = tl.minimum(low + (high - low + WAYS - 1) // WAYS * (1 + tl.arange(0, WAYS)), high)
        count, total = _above(logits, width, top, inverse, bits.to(tl.float32, bitcast=True), BLOCK, WAYS)
        keeps = (count < most) & (total < share)
        low_count = tl.min(tl.where(keeps, low_count, count), 0)
        high_count = tl.max(tl.where(keeps, count, high_count), 0)
        larger = tl.max(tl.where(keeps, total, larger), 0)
        low = tl.max(tl.where(keeps, low, bits), 0)
        high = tl.min(tl.where(keeps, bits, high), 0)
    bound = high.to(tl.float32, bitcast=True)
    best = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        w = _weights(logits, start, width, top, inverse, BLOCK)[2]
        best = tl.maximum(best, tl.where(w <= bound, w, 0.0))
    least = tl.max(best, 0)
    room = (tl.minimum(low_count, most) - high_count).to(tl.float64)
    ties = tl.maximum(tl.minimum(tl.ceil((share - larger) / least.to(tl.float64)), room), 1.0)
    return least, ties.to(tl.int32), larger + ties * least.to(tl.float64)


@jit
def _held(logits, start, width, top, inverse, least, ties, BLOCK: tl.constexpr):
    """(kept weights of a block in double, 0 for the others; how many equal `least`, of which `ties` are kept)"""
    _place, live, w = _weights(logits, start, width, top, inverse, BLOCK)
    equal = (live & (w == least)).to(tl.int32)
    keep = (w > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))
    return tl.where(keep, w, 0.0).to(tl.float64), tl.sum(equal, 0)


@jit
def _draw_truncated(
    logits, seed, sequence, position, temperature, top_k, top_p, maxima, sums, token, logprob, full, width, tiles,
    TILES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """A row that keeps its likeliest tokens alone."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row).to(tl.int32)
    p = tl.load(top_p + row)
    if _truncates(t, k, p, width):
        inverse = 1.0 / t
        _maxima, mass, top = _tile_masses(maxima, sums, row, tiles, inverse, TILES)
        total = tl.sum(mass, 0)
        # Only the logarithm lives on: with the sum in double, registers were spilled. NaN where a logit is not finite.
        log_total = tl.log(total.to(tl.float32)) + (total - total).to(tl.float32)
        own = logits + row * width
        most = tl.where((k > 0) & (k < width), k, width)
        share = tl.where(p < 1.0, p.to(tl.float64) * total, float("inf")).to(tl.float64)
        if (most < width) & (p < 1.0):
            none = tl.full([], float("inf"), tl.float64)
            share = p.to(tl.float64) * _cut(own, width, top, inverse, most, none, BLOCK, WAYS)[2]
        least, ties, kept = _cut(own, width, top, inverse, most, share, BLOCK, WAYS)
        log_kept = tl.log(kept.to(tl.float32)) + (log_total - log_total)
        block = tl.arange(0, BLOCKS)  # what is kept of each, and the ties that are left for it
        mass = tl.zeros([BLOCKS], tl.float64)
        left = tl.zeros([BLOCKS], tl.int32)
        for start in range(0, width, BLOCK):
            held, equal = _held(own, start, width, top, inverse, least, ties, BLOCK)
            mass = tl.where(block == start // BLOCK, tl.sum(held, 0), mass)
            left = tl.where(block == start // BLOCK, ties, left)
            ties -= equal
        zero = tl.full([], 0, tl.int32)
        start, half, halving = _halve(
            block * BLOCK, mass, zero, zero + HALF, BLOCK, zero, seed, sequence, position, row
        )
        ties = tl.sum(tl.where(block == start // BLOCK, left, 0), 0)
        held, _equal = _held(own, start, width, top, inverse, least, ties, BLOCK)
        place = start + tl.arange(0, BLOCK)
        found, _half, _halving = _halve(place, held, start, half, 1, halving, seed, sequence, position, row)
        value = (tl.load(own + found).to(tl.float32) - top) * inverse
        tl.store(token + row, found.to(tl.int64))
        tl.store(logprob + row, value - log_kept)
        tl.store(full + row, value - log_total)


def supports(logits, *rest) -> str | None:
    if logits.dtype == torch.float64:
        return "it computes in float32"
    return where_triton_runs(logits, *rest)


def forward(logits, seed, sequence, position, temperature, top_k, top_p) -> tuple[Tensor, Tensor, Tensor]:
    """A setting out of its range is not refused, which would stop the host: such a row gets token 0 and NaN."""
    rows, width = logits.shape
    logits = logits.contiguous()
    given = [x.contiguous() for x in (seed, sequence, position, temperature.float(), top_k, top_p.float())]
    tile = max(min(next_power_of_2(width), LARGEST_TILE), 16)
    tiles = -(-width // tile)
    new = {"dtype": torch.float32, "device": logits.device}
    maxima, sums = torch.empty(2, rows, tiles, **new)
    token, found = torch.empty_like(given[0]), torch.empty(2, rows, **new)
    if rows:
        _tile_sums[(rows, tiles)](logits, given[3], maxima, sums, width, tiles, tile, num_warps=8)
        shared = (logits, *given, maxima, sums, token, found[0], found[1], width, tiles)
        half = next_power_of_2(width) // 2
        _draw[(rows,)](*shared, tile, next_power_of_2(tiles), half, FAR, num_warps=16 if tile > 1024 else 8)
        block = min(tile, 512)
        warps = max(1, block // 32)  # a thread holds WAYS pairs of a weight and a bound
        blocks = next_power_of_2(-(-width // block))
        _draw_truncated[(rows,)](*shared, next_power_of_2(tiles), half, block, blocks, WAYS, num_warps=warps)
    return token, found[0], found[1]
