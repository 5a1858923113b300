"""Expected lengths: even shares of what is dear, the same on every rank, and the same draws whoever makes them."""

import random

import pytest

from r1fast.parallel import World
from r1fast.stages.lengths import Lengths
from r1fast.types import Prompt


def prompts(count):
    return [Prompt(str(i), (1,) * (5 + i % 3), "", None, "t") for i in range(count)]


def test_what_was_not_seen_costs_its_prompt_and_the_mean():
    some, lengths = prompts(3), Lengths()
    assert lengths.costs(some, 4) == [5, 6, 7]
    lengths.seen(some[:2], [10.0, 30.0])
    assert lengths.costs(some, 4) == [5 + 4 * 10, 6 + 4 * 30, 7 + 4 * 20]


def test_lengths_are_remembered_beside_the_others_and_follow_the_policy():
    some, lengths = prompts(3), Lengths()
    lengths.seen(some[:2], [10.0, 30.0])
    lengths.seen(some[2:], [200.0])  # all are ten times as long now
    assert lengths.costs(some[:2], 1) == [5 + 100, 6 + 300]
    lengths.seen(some[:2], [100.0, 100.0])
    assert lengths.costs(some[:2], 1) == [5 + 75, 6 + 125]


def test_a_resumed_one_goes_on_and_an_empty_draw_is_none():
    some, lengths = prompts(4), Lengths()
    lengths.seen(some, [1.0, 2.0, 3.0, 4.0])
    lengths.seen([], [])
    lengths.seen(some[:1], [0.0])
    again = Lengths()
    again.load_state_dict(lengths.state_dict())
    assert again.costs(some, 2) == lengths.costs(some, 2) == [5 + 2, 6 + 4, 7 + 6, 5 + 8]


def heaviest(shares, real):
    """The dearest rank's load over the mean: what all wait for."""
    loads = [sum(real[i] for i in share) for share in shares]
    return max(loads) / (sum(loads) / len(loads))


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_wait_less_for_each_other(ranks):
    """Prompts whose lengths differ tenfold and wobble by a fifth from epoch to epoch: with what one epoch taught, the
    dearest rank is nearer the mean than with equal counts."""
    draw, lengths, some = random.Random(3), Lengths(), prompts(64)
    typical = [draw.lognormvariate(4, 0.8) for _ in some]
    place, before, after = World(0, ranks), [], []
    for epoch in range(6):
        real = [t * draw.lognormvariate(0.1 * epoch, 0.2) for t in typical]
        shares = place.share(lengths.costs(some, 8))
        assert sorted(i for share in shares for i in share) == list(range(64))
        if epoch:
            before.append(heaviest(place.share([1.0] * 64), real))
            after.append(heaviest(shares, real))
        lengths.seen(some, real)
    assert sum(after) / 5 - 1 < (sum(before) / 5 - 1) / 2
