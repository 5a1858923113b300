"""The soak of soak.py, as much of it as fits a test run: `python tests/soak.py --requests 10000` is the whole."""

from soak import soak


def test_random_requests_and_cancels_end_with_every_block_free():
    told = soak(1000, seed=1)
    assert told["groups"] + told["cancelled"] == 1000
    assert min(told["cancelled"], told["preemptions"]) > 50
    assert told["found tokens"] > 1000
