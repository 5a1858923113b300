"""benchmarks/sampling.py: contenders compute the same thing, and the limit and the table say what was measured."""

import checkpoints
import pytest

from benchmarks import readme, sampling
from benchmarks.sampling_contenders import NAMES, Case, contender, prompts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.make(folder, "Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_draws_the_same_greedy_tokens_to_their_full_length(folder, name):
    case = Case(prompt=11, group=2, batch=4, new=5)
    prompts = prompts_of(case, checkpoints.VOCAB)
    expected = contender("generate", folder)(prompts, case, True)
    assert len({tuple(tokens) for tokens in expected}) == 2  # two prompts, of which each sample says the same
    assert contender(name, folder)(prompts, case, True) == expected


def test_samples_of_a_prompt_differ_when_they_are_drawn(folder):
    case = Case(prompt=11, group=4, batch=4, new=8)
    for name in NAMES[:2]:
        tokens = contender(name, folder)(prompts_of(case, checkpoints.VOCAB), case, False)
        assert [len(t) for t in tokens] == [8] * 4 and len(set(map(tuple, tokens))) > 1, name


def test_the_limit_counts_each_prompt_once_and_the_slower_of_products_and_reading():
    c = sampling.config("3M")
    inner = 4 * (256 * (512 + 256) + 3 * 256 * 640)
    assert sampling.weights(c) == inner + 512 * 256
    rate = {"product": 1e9, "3M": 1e15}
    prefill = 2 * (2 * inner * 32 + 2 * 512 * 256 + 4 * 4 * 256 * 32**2 / 2)
    decode = 15 * 8 * (2 * (inner + 512 * 256) + 4 * 4 * 256 * (32 + 8))
    case = Case(prompt=32, group=4, batch=8, new=16)
    assert sampling.limit("3M", case, rate) == pytest.approx((prefill + decode) / 1e9)
    read = 15 * (4 * sampling.weights(c) + 8 * 4 * 128 * (2 * 32 + 8 * 8))
    assert sampling.limit("3M", case, {"product": 1e18, "3M": 1e6}) == pytest.approx(read / 1e6)


def test_the_table_and_the_picture_of_what_was_measured(tmp_path):
    def by(rate: float, times: float) -> dict:
        return {"tokens_per_s": rate, "times_ours": [times, times - 0.1, times + 0.1], "MiB": 7, "turns": 3}

    row = {"model": "3M", "prompt": 32, "group": 8, "batch": 64, "new": 100, "limit_s": 0.5}
    row["by"] = {"r1fast": by(6400, 1.0), "generate": by(1600, 4.0)}
    machine = {"processor": "p", "threads": 2, "torch": "t", "transformers": "f", "commit": "c" * 40}
    curves = [
        {"model": "3M", "shared": shared, "context": context, "batch": 8, "tokens_per_s": 1e5 / context}
        for shared in (True, False)
        for context in (64, 256)
    ]
    rates = {"product": 1e11, "3M": 2e10, "30M": 1e10}
    results = {"machine": machine, "new": {"3M": 100}, "rates": rates, "rows": [row], "curves": curves}
    found = sampling.table(results)
    assert "| 3M | 32 | 8 | 64 | 6,400 | 50% | 7 | 1,600 [**4.00x** (3.90–4.10), 7 MiB] |" in found
    assert "100 GFLOP/s" in found and "20 GB/s over the weights of 3M" in found
    sampling.picture(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_page_of_the_sampler_says_what_the_results_say():
    page = (readme.ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    assert readme.rewritten(page) == page, "run python -m benchmarks.readme"
    assert "sampling:begin" in page and "exact:begin" in page
    assert readme.CURVES.is_file() or "(sampling.png)" not in page
