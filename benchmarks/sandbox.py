"""`python -m benchmarks.sandbox`: what hostile programs cost honest ones in the same pool.

Honest programs alone, then as many with hostile ones spread among them, then alone again; the time counts until the
last honest one is scored. Nine rounds, each with a ninth of tests/hostile, so that load by others, which comes and
goes, falls on both. One JSON a machine under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels_vs_peers import RESULTS, processor, slug
from r1fast.rewards.pool import RewardPool

ROOT = Path(__file__).parent.parent
HOSTILE = sorted((ROOT / "tests" / "hostile").glob("*/*.py"))
ROUNDS = 9
HONEST = "n = int(input())\nprint(sum(i * i for i in range(n)) % 1000007, {mark!r})"


class Timed(RewardPool):
    """A pool that notes when the last of its `watched` items was scored."""

    watched: frozenset[int] = frozenset()
    done = 0.0

    def _collect(self, waiting, scores):
        super()._collect(waiting, scores)
        if not self.done and all(scores[i] is not None for i in self.watched):
            self.done = time.perf_counter()


def honest(mark: str) -> tuple:
    n = 20_000
    right = f"{sum(i * i for i in range(n)) % 1000007} {mark}"
    return "code", HONEST.format(mark=mark), {"tests": [{"input": str(n), "output": right}]}


def hostile(path: Path, mark: str) -> tuple:
    kind, call = path.parent.name, {"function": "f", "tests": [{"input": [3], "output": mark}]}
    forms = {"stdio": {"tests": [{"input": "3", "output": mark}]}, "call": call}
    check = {"prompt": "", "entry_point": "f", "test": f"def check(c):\n    assert c(3) == {mark!r}"}
    return "code", f"```python\n{path.read_text()}```", forms.get(kind, check)


def seconds(pool: Timed, count: int, mark: str, among: Sequence[Path] = ()) -> float:
    """Until `count` honest programs are scored, with the hostile ones of `among` spread between them."""
    items = [honest(f"{mark}-{i}") for i in range(count)]
    for number, path in reversed(list(enumerate(among))):
        items.insert(number * count // len(among), hostile(path, f"{mark} {number}"))
    pool.watched, pool.done = frozenset(i for i, item in enumerate(items) if "range(n)" in item[1]), 0.0
    began = time.perf_counter()
    scores = pool.run(items)
    right = [scores[i].value for i in pool.watched]
    if sum(right) != count or sum(score.value for score in scores) != count:
        raise SystemExit("an honest program failed, or a hostile one passed")
    return pool.done - began


def measured(pool: Timed, one_in: int) -> dict:
    """Times with one program in `one_in` hostile, and how much longer the honest ones wait: each round against the mean
    of the times alone before and after it. Times of rounds are per honest program."""
    alone, beside = [], []
    for turn in range(ROUNDS):
        among = HOSTILE[turn::ROUNDS]
        count = (one_in - 1) * len(among)
        if not alone:
            alone.append(seconds(pool, count, f"{one_in} before") / count)
        beside.append(seconds(pool, count, f"{one_in} {turn} beside", among) / count)
        alone.append(seconds(pool, count, f"{one_in} {turn} after") / count)
    ratios = [2 * among / (alone[turn] + alone[turn + 1]) for turn, among in enumerate(beside)]
    return {
        "honest": (one_in - 1) * len(HOSTILE),
        "alone_ms": [1e3 * each for each in alone],
        "beside_ms": [1e3 * each for each in beside],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "honest_per_second": {"alone": 1 / statistics.median(alone), "beside": 1 / statistics.median(beside)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-in", type=int, nargs="+", default=[13, 7], help="of so many programs one is hostile")
    args = parser.parse_args()
    file = RESULTS / f"{slug(processor())}-sandbox.json"
    with Timed() as pool:
        seconds(pool, 50, "warm")
        found = {f"one_in_{one_in}": measured(pool, one_in) for one_in in args.one_in}
        lanes = pool.size
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    known = json.loads(file.read_text()) if file.exists() else {}
    known = known if known.get("commit") == commit.strip() else {}  # what was measured of it in another call stays
    found = {**known, "commit": commit.strip(), "lanes": lanes, "hostile": len(HOSTILE), **found}
    print(json.dumps(found, indent=1))
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
