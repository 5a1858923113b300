"""What benchmarks of kernels time is what they say it is, and their tables say what was measured."""

import pytest
import torch

from benchmarks import draws, kernels_vs_peers, row_kernels
from r1fast_kernels import sample_token


def test_what_is_timed_of_a_backward_are_the_gradients():
    jobs = row_kernels.jobs(rows=6, width=192)
    assert {name for name, (_, size) in jobs.items() if size <= 0} == set()
    names = [name for name in jobs if name.endswith("backward")]
    assert names == [f"{name}, backward" for name in ("rms_norm", "rms_norm + residual", "rope", "swiglu")]
    for name in names:
        first, again = (jobs[name][0]() for _ in range(2))  # the graph is kept
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b) and a.abs().sum() > 0, name


def test_a_share_is_of_the_copy_of_the_same_turn():
    rows = row_kernels.measure(3, row_kernels.jobs(rows=4, width=192))
    assert rows[0]["op"] == "copy" and rows[0]["share"] == [1, 1, 1]
    results = {"rows": [{"op": "copy", "GB/s": 16.0, "share": [1, 1, 1]}, {"op": "rope", "GB/s": 12.0}]}
    results["rows"][1]["share"] = [0.75, 0.7, 0.8]
    results |= {"MiB": 24, "machine": "p", "threads": 2, "torch": "t", "commit": "c", "turns": 3}
    assert "| rope | 12.0 | 0.75 (0.70–0.80) |" in row_kernels.table(results)


@pytest.mark.parametrize(("top_k", "top_p", "left"), [(0, 1.0, 5), (3, 1.0, 3), (0, 0.8, 2), (3, 0.9, 2)])
def test_torchs_draw_is_of_the_distribution_that_ours_is_of(top_k, top_p, left):
    """Probabilities 0.64, 0.24, 0.09, 0.03; of the first three alone 0.67, 0.24, 0.09."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -9.0])
    token, logprob = draws.theirs(logits.expand(2000, 5), top_k, top_p)
    kept = logits[:left].log_softmax(0)
    assert 1 <= int(token.max()) < left
    torch.testing.assert_close(logprob, kept[token], rtol=0, atol=1e-5)
    rows = torch.arange(2000)
    settings = (1.0, torch.full((2000,), top_k, dtype=torch.int32), torch.full((2000,), top_p))
    ours = sample_token(logits.expand(2000, 5), rows, rows, rows, *settings)
    torch.testing.assert_close(ours.logprob, kept[ours.token], rtol=0, atol=1e-5)


def test_the_table_of_draws_says_what_was_measured():
    rows = draws.measure(1, words=(64,), rows=3)
    assert [(row["top_k"], row["top_p"]) for row in rows] == list(draws.CUTS)
    row = {"rows": 64, "words": 8192, "top_k": 50, "top_p": 1.0, "ms": [2.0, 20.0], "ratio": [10.0, 9.0, 11.0]}
    assert "| 64 x 8,192 | 50 | – | 2.00 | 20.00 | 10.0 (9.0–11.0) |" in draws.table([row])


def test_the_three_products_are_those_of_the_gradients():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    found = torch.autograd.grad(kernels_vs_peers.contender(kernels_vs_peers.PRODUCTS)(hidden, weight), (hidden, weight))
    logits = (hidden @ weight.T).detach()
    expected = torch.autograd.grad((0.5 * (hidden @ weight.T) ** 2).sum(), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].shape == hidden.shape and logits.abs().sum() > 0
