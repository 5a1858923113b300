"""The README's numbers are those of the committed results, and `python -m benchmarks.readme` writes them."""

import json
import re

import pytest

from benchmarks.readme import PAGES, ROOT, TINY, rewritten, tiny_runs


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_says_what_the_results_say(path):
    page = path.read_text(encoding="utf-8")
    assert rewritten(page) == page, "run python -m benchmarks.readme"


def test_three_seeds_of_the_preset_as_it_is_committed_lie_behind_the_table():
    seeds = [json.loads((run / "summary.json").read_text(encoding="utf-8"))["seed"] for run in tiny_runs()]
    assert len(set(seeds)) == len(seeds) >= 3
    assert all((TINY / f"seed{seed}").is_dir() for seed in seeds)


def test_a_changed_number_is_found():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    wrong = re.sub(r"(\| `zero` \|.*?)(\d)", r"\g<1>\g<2>9", readme, count=1)
    assert wrong != readme and rewritten(wrong) == readme


def test_a_part_that_nothing_writes_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        rewritten("<!-- nothing:begin -->\n<!-- nothing:end -->")
