"""`python -m benchmarks.sandbox`: what hostile programs cost honest ones in the same pool.

Honest programs alone, then as many with every program of tests/hostile spread among them, then alone again, several
times; the time counts until the last honest one is scored. One JSON a machine under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.kernels_vs_peers import RESULTS, processor
from r1fast.rewards.pool import RewardPool

ROOT = Path(__file__).parent.parent
HOSTILE = sorted((ROOT / "tests" / "hostile").glob("*/*.py"))
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


def seconds(pool: Timed, count: int, mark: str, beside: bool) -> float:
    """Until `count` honest programs are scored, with or without the hostile ones among them."""
    items = [honest(f"{mark}-{i}") for i in range(count)]
    if beside:
        every = count // len(HOSTILE)
        for number, path in reversed(list(enumerate(HOSTILE))):
            items.insert(number * every, hostile(path, f"{mark} {number}"))
    pool.watched, pool.done = frozenset(i for i, item in enumerate(items) if "range(n)" in item[1]), 0.0
    began = time.perf_counter()
    scores = pool.run(items)
    right = [scores[i].value for i in pool.watched]
    if sum(right) != count or sum(score.value for score in scores) != count:
        raise SystemExit("an honest program failed, or a hostile one passed")
    return pool.done - began


def measured(pool: Timed, one_in: int, rounds: int) -> dict:
    """Times with one program in `one_in` hostile, and ratios of the rounds: each to the mean before and after it."""
    count = (one_in - 1) * len(HOSTILE)
    alone, beside = [seconds(pool, count, f"{one_in} alone", False)], []
    for turn in range(rounds):
        beside.append(seconds(pool, count, f"{one_in} beside {turn}", True))
        alone.append(seconds(pool, count, f"{one_in} after {turn}", False))
    ratios = [among * 2 / (alone[i] + alone[i + 1]) for i, among in enumerate(beside)]
    return {
        "honest": count,
        "alone_s": alone,
        "beside_s": beside,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "honest_per_second": {
            "alone": count / statistics.median(alone),
            "beside": count / statistics.median(beside),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-in", type=int, nargs="+", default=[13, 7], help="of so many programs one is hostile")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    name = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    file = RESULTS / f"{name}-sandbox.json"
    with Timed() as pool:
        seconds(pool, len(HOSTILE), "warm", False)
        found = {f"one_in_{one_in}": measured(pool, one_in, args.rounds) for one_in in args.one_in}
        lanes = pool.size
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    known = json.loads(file.read_text()) if file.exists() else {}
    known = known if known.get("commit") == commit.strip() else {}  # what was measured of it in another call stays
    found = {**known, "commit": commit.strip(), "lanes": lanes, "hostile": len(HOSTILE), **found}
    print(json.dumps(found, indent=1))
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
