"""Results of benchmarks/on_gpu.sh: one JSON file a card and commit, and the short table of it.

`python -m benchmarks.gpu_results FOLDER` reads what the script left there (tests.xml, times.json, table.txt and, where
the peers ran, peers.txt) and writes benchmarks/results/<gpu>-<commit>.json; given such a file it prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def machine() -> dict:
    """What the numbers hold for."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "commit": git("rev-parse", "HEAD")}
    found["uncommitted"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
        found |= {"memory GiB": round(card.total_memory / 2**30, 1), "capability": f"{card.major}.{card.minor}"}
    else:
        found |= {"device": "cpu", "processor": platform.machine(), "threads": torch.get_num_threads()}
    return found


def tests(path: Path) -> dict:
    """How many ran, and the names of those that failed."""
    if not path.exists():
        return {"passed": 0, "skipped": 0, "failed": ["the test run did not finish"]}
    cases = ElementTree.parse(path).getroot().iter("testcase")
    outcome = {"passed": 0, "skipped": 0, "failed": []}
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            outcome["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            outcome["skipped" if case.find("skipped") is not None else "passed"] += 1
    return outcome


def times(path: Path) -> list[dict]:
    """One row a benchmark: what, backend, median microseconds, the rate reached and its fraction of the ceiling."""
    if not path.exists():
        return []
    rows = []
    for found in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        named = re.search(r"\[(?P<what>.*) \[(?P<backend>\w+)\]\]$", found["name"])
        if named is None:  # not one of bench_kernels.py's
            continue
        extra, bound = found["extra_info"], found["extra_info"]["bound"]
        rows.append(
            {
                **named.groupdict(),
                "microseconds": round(found["stats"]["median"] * 1e6, 2),
                "bound": bound,
                "rate": extra[bound],
                "ceiling": extra[f"ceiling {bound}"],
                "fraction": extra["fraction of ceiling"],
            }
        )
    return rows


def collect(folder: Path) -> dict:
    texts = {name: folder / f"{name}.txt" for name in ("table", "peers")}
    return {
        "machine": machine(),
        "tests": tests(folder / "tests.xml"),
        "times": times(folder / "times.json"),
        **{name: path.read_text(encoding="utf-8") for name, path in texts.items() if path.exists()},
    }


def target(results: dict) -> Path:
    where = results["machine"]
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    return RESULTS / f"{device}-{where['commit'][:10] or 'no-commit'}.json"


def table(results: dict) -> str:
    """The times as Markdown, fastest backend of each op and case first, and one line about the tests."""
    where, outcome = results["machine"], results["tests"]
    lines = [f"{where['device']}, torch {where['torch']}, commit {where['commit'][:10]}", ""]
    lines += ["| op | backend | µs | reached | of the ceiling |", "|---|---|---:|---:|---:|"]
    order = list(dict.fromkeys(row["what"] for row in results["times"]))
    for row in sorted(results["times"], key=lambda row: (order.index(row["what"]), row["microseconds"])):
        reached = f"{row['rate']:.0f} {row['bound']}"
        lines.append(
            f"| {row['what']} | {row['backend']} | {row['microseconds']:.1f} | {reached} | {row['fraction']:.0%} |"
        )
    failed = outcome["failed"]
    lines += ["", f"Tests: {outcome['passed']} passed, {len(failed)} failed, {outcome['skipped']} skipped."]
    return "\n".join(lines + [f"- failed: {name}" for name in failed])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_results", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="the folder that on_gpu.sh filled, or a file of benchmarks/results")
    source = parser.parse_args().source
    if source.is_file():
        print(table(json.loads(source.read_text(encoding="utf-8"))))
        return 0
    results = collect(source)
    if not results["times"]:
        print(f"gpu_results: {source} holds no times; did pytest --benchmark run?", file=sys.stderr)
        return 1
    path = target(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results))
    print(f"\nwritten to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
