"""Sampling held to the truth: Random123's known answers, exact truncation, and the distribution that is drawn.

The reference and the CPU kernel both go through it: a distribution can be tested without trusting either.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import r1fast_kernels as k

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
# counter (0, 1, 2, 3), key (0, 1), output: kat_vectors of Random123, philox4x32 with 10 rounds
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.fixture(params=["reference", "cpu"])
def each_backend(request: pytest.FixtureRequest):
    with k.use_backend(request.param):
        yield request.param


def module():
    import sys

    k.sample_token.__doc__  # noqa: B018  the module is imported with the first use of its op
    return sys.modules["r1fast_kernels.sample_token"]


def draw(rows: int, logits: Tensor = LOGITS, **settings) -> k.sample_token:
    """One token for each of `rows` sequences with the same logits."""
    return k.sample_token(logits.expand(rows, -1), seed=11, sequence=torch.arange(rows), position=3, **settings)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_philox_known_answers(kind):
    number = np.array if kind == "numpy" else torch.tensor
    counters, keys, expected = (number(column).T for column in zip(*KNOWN, strict=True))
    even, odd = module().philox(counters[0::2], counters[1::2], keys)
    found = [even[0], odd[0], even[1], odd[1]]
    assert all((f == e).all() for f, e in zip(found, expected, strict=True))


def test_uniform_is_a_function_of_seed_sequence_and_position_with_all_their_bits():
    one = torch.tensor([5])
    base = module().uniform(one, one, one, 9)
    assert base.shape == (9, 1) and len(base.unique()) == 9
    for i in range(3):
        for bit in (0, 31, 32, 62):
            changed = [one.clone() for _ in range(3)]
            changed[i] ^= 1 << bit
            assert (module().uniform(*changed, 3) != base[:3]).all(), (i, bit)
    nothing, rows = torch.zeros(50_000).long(), torch.arange(50_000)
    many = module().uniform(nothing, rows, nothing, 6)
    assert many.min() >= 0 and many.max() < 1
    for numbers in (many[0], many[5], (many[0] + many[1]) % 1, (many[3] - many[4]) % 1):
        counts = torch.histc(numbers, 50, 0, 1)
        assert ((counts - 1000).square() / 1000).sum() < 86  # chi-square, 49 degrees of freedom, p = 0.001


def test_numbers_are_the_words_of_philox_blocks_in_order():
    seed, sequence, position = torch.tensor([7, 1 << 40]), torch.tensor([3, -5]), torch.tensor([9, (1 << 33) + 2])
    found = module().uniform(seed, sequence, position, 7)
    for row in range(2):
        for number in range(7):
            place = int(position[row]) + (number // 4 << 32)
            words = [int(x) >> shift & 0xFFFFFFFF for x in (place, sequence[row], seed[row]) for shift in (0, 32)]
            counter, key = np.array(words[:4]).reshape(4, 1), np.array(words[4:]).reshape(2, 1)
            even, odd = module().philox(counter[0::2], counter[1::2], key)
            expected = [even[0], odd[0], even[1], odd[1]][number % 4][0] >> 8
            assert found[number, row] * 2**24 == expected


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Statistic over the tokens of probability > 0; none of the others may occur."""
    counts = torch.bincount(tokens, minlength=p.shape[0]).double()
    assert counts[p == 0].sum() == 0
    counts, expected = counts[p > 0], p[p > 0].double() * tokens.shape[0]
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 2.0}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.7}, 2),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.8}, 3),
    ],
)
@pytest.mark.usefixtures("each_backend")
def test_the_drawn_distribution(settings, kept):
    """20,000 sequences; `kept` likeliest tokens survive, as worked out by hand from the softmax."""
    full = torch.softmax(LOGITS / settings.get("temperature", 1.0), 0)
    p = torch.where(torch.arange(6) < kept, full, 0.0)
    p = p / p.sum()
    drawn = draw(20_000, **settings)
    assert chi_square(drawn.token, p) < 20.5  # 5 degrees of freedom, p = 0.001
    torch.testing.assert_close(drawn.logprob, p.log()[drawn.token])
    torch.testing.assert_close(drawn.logprob_full, full.log()[drawn.token])


def kept_by_sorting(p: Tensor, top_k: int, top_p: float) -> set[int]:
    """The contract, on Python numbers: by probability and then index; top_k, then the smallest set reaching top_p."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = order[:top_k] if top_k else order
    total, reached, kept = sum(p[i] for i in order), 0.0, set()
    for i in order:
        if kept and reached >= top_p * total and top_p < 1:
            break
        kept.add(i)
        reached += p[i]
    return kept


def test_truncation_keeps_exactly_the_smallest_set_ties_by_index():
    """Probabilities are multiples of 1/64 with many ties, so that sums are exact and every boundary is hit."""
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        cuts = torch.randint(1, 5, (12,), generator=generator).double()
        p = cuts / 64
        p[-1] += 1 - p.sum()
        p = p[torch.randperm(12, generator=generator)]
        top_k = [0, 1, 3, 5, 12, 40][case % 6]
        top_p = [1.0, 0.25, 0.5, 1e-9, 0.75][case % 5]
        keep = module().kept(p[None], torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))
        assert set(keep[0].nonzero()[:, 0].tolist()) == kept_by_sorting(p.tolist(), top_k, top_p), (p, top_k, top_p)


@pytest.mark.usefixtures("each_backend")
def test_a_sequence_draws_the_same_whatever_the_batch():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(64, 50, generator=generator)
    number = torch.arange(64)
    temperature = torch.where(number % 5 == 0, 0.0, 0.6 + 0.1 * (number % 3))
    top_k = torch.where(number % 4 == 1, 7, 0).int()
    top_p = torch.where(number % 4 == 2, 0.8, 1.0)
    settings = (torch.full((64,), 9), number + 100, number // 2, temperature, top_k, top_p)
    together = k.sample_token(logits, *settings)
    order = torch.randperm(64, generator=generator)
    for rows in (order, order[:7], number[3:4], number[6:7], number[5:6]):
        apart = k.sample_token(logits[rows], *(x[rows] for x in settings))
        for a, b in zip(apart, together, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.usefixtures("each_backend")
def test_greedy_takes_the_first_of_the_largest_and_says_its_untempered_probability():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, -1.0, 0.0, 3.0]])
    drawn = k.sample_token(logits, 0, torch.arange(2), 0, temperature=0.0, top_k=1, top_p=0.1)
    assert drawn.token.tolist() == [1, 0]
    expected = torch.log_softmax(logits, -1)[torch.arange(2), drawn.token]
    torch.testing.assert_close(drawn.logprob, expected)
    torch.testing.assert_close(drawn.logprob_full, expected)


@pytest.mark.usefixtures("each_backend")
def test_impossible_tokens_are_never_drawn():
    """-inf logits at both ends, where a uniform of 0 or nearly 1 would land."""
    logits = torch.full((8,), -math.inf)
    logits[2:5] = torch.tensor([0.0, -30.0, 1.0])
    assert set(draw(5000, logits).token.tolist()) == {2, 4}
    for words in (1, 2, 3, 33, 64, 65, 1000):
        lonely = torch.full((words,), -math.inf)
        lonely[words // 2] = -3.0
        assert set(draw(50, lonely).token.tolist()) == {words // 2}


@pytest.mark.usefixtures("each_backend")
def test_logits_that_round_differently_hardly_ever_change_a_token():
    """As they do in another batch, by a hundredth of this noise. One number a row and the running sum of the weights
    (inverse CDF) changes 40 of these 4,096 draws."""
    generator = torch.Generator().manual_seed(5)
    logits, rows, changed = 2 * torch.randn(128, 8192, generator=generator), torch.arange(128), 0
    noisy = logits + 1e-4 * torch.randn(128, 8192, generator=generator)
    for position in range(32):
        a, b = (k.sample_token(x, 5, rows, position).token for x in (logits, noisy))
        changed += int((a != b).sum())
    assert changed <= 5


@pytest.mark.usefixtures("each_backend")
def test_nothing_to_draw():
    empty = torch.zeros(0, dtype=torch.int64)
    assert k.sample_token(torch.zeros(0, 5), empty, empty, empty).token.shape == (0,)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 0.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3, 20])
def test_logits_that_are_no_numbers_show_in_the_log_probability(settings, bad, place):
    """A sampler sees by it that the model is broken; the other rows are as without."""
    logits = torch.linspace(-2, 1, 21).repeat(3, 1)
    right = k.sample_token(logits, 0, torch.arange(3), 0, **settings)
    logits[1, place] = bad
    drawn = k.sample_token(logits, 0, torch.arange(3), 0, **settings)
    assert drawn.logprob.isnan().tolist() == [False, True, False]
    assert torch.equal(drawn.token[::2], right.token[::2]) and torch.equal(drawn.logprob[::2], right.logprob[::2])


def test_the_kernel_truncates_as_the_reference_does():
    """Ties, sets of one, k beyond the vocabulary, and rows of every length around a vector of 16."""
    generator = torch.Generator().manual_seed(3)
    for words in (1, 2, 15, 16, 17, 63, 64, 65, 100, 1000):
        logits = torch.randint(-6, 3, (200, words), generator=generator).float() / 2
        number = torch.arange(200)
        top_k = torch.tensor([0, 1, 2, 7, 5000])[number % 5].int()
        top_p = torch.tensor([1.0, 0.31, 0.77, 1e-12, 0.999, 0.5])[number % 6]
        keys = (number + 5, number * 3, number)
        apart = [k.sample_token(logits, *keys, 0.7, top_k, top_p, backend=name) for name in ("reference", "cpu")]
        assert (apart[0].token == apart[1].token).float().mean() > 0.98  # ties are exact, sums that meet a share not
        same = apart[0].token == apart[1].token
        torch.testing.assert_close(apart[0].logprob_full[same], apart[1].logprob_full[same], rtol=1e-5, atol=1e-5)
        close = (apart[0].logprob - apart[1].logprob).abs() < 1e-5
        assert (close & same).float().mean() > 0.98
