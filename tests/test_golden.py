"""The preset `tiny` gives the numbers it gave: ten steps of pretraining and ten of RL against a committed file.

Tolerance: another CPU or another backend adds in another order. Pretraining then differs by 1e-6 a step; in RL a
sampled token may flip once in 1e5, so rewards have the width of one sample in 256.
"""

import json

import pytest
from golden.make_tiny_losses import FILE, ten_steps


@pytest.fixture(scope="module")
def both():
    return json.loads(FILE.read_text(encoding="utf-8")), ten_steps()


def test_ten_steps_of_pretraining(both):
    golden, now = both
    assert len(now["base"]) == len(golden["base"]) == 10
    for expected, got in zip(golden["base"], now["base"], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)
    losses = [step["loss"] for step in golden["base"]]
    assert losses[-1] < losses[0]


def test_ten_steps_of_rl(both):
    golden, now = both
    assert len(now["zero"]) == len(golden["zero"]) == 10
    for expected, got in zip(golden["zero"], now["zero"], strict=True):
        assert got["reward"] == pytest.approx(expected["reward"], abs=8e-3)
        assert got["entropy"] == pytest.approx(expected["entropy"], rel=5e-3)
        assert got["kl"] == pytest.approx(expected["kl"], rel=5e-2, abs=1e-4)
        assert got["response_length"] == pytest.approx(expected["response_length"], abs=0.2)
    rewards = [step["reward"] for step in golden["zero"]]
    assert max(rewards) - min(rewards) > 0.05  # the samples differ and something is learned, so something is compared
