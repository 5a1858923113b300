"""`python -m benchmarks.readme`: writes the measured parts of the pages anew from benchmarks/results/.

A measured part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. `--check` writes nothing and exits 1
where a page differs from what the results say; tests/test_readme.py runs it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

from benchmarks import (
    exact,
    gpu_results,
    kernels_vs_peers,
    row_kernels,
    sampling,
    scaling,
    snapshots,
    step_profile,
    tensor_scaling,
    vs_trl,
)
from r1fast.report import markdown_table, write_picture

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TINY = RESULTS / "tiny"
PICTURE = ROOT / "docs" / "tiny.png"
CURVES = ROOT / "docs" / "sampling.png"


def tiny_runs() -> list[Path]:
    return sorted(TINY.glob("seed*"))


def tiny_part() -> str:
    """The stage table of the seeds, and what it was measured on."""
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in tiny_runs()]
    first = summaries[0]
    seconds = sorted(s["seconds"] for s in summaries)
    spread = f"{median(seconds):.0f} s a run ({seconds[0]:.0f}–{seconds[-1]:.0f})"
    where = f"{first['machine']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, torch {first['torch']}"
    commits = ", ".join(sorted({s["commit"] for s in summaries}))
    measured = f"Measured with `python -m benchmarks.tiny` at {commits}: {where}; {spread}."
    return f"{markdown_table(tiny_runs())}\n\n{measured}"


def peers_part() -> str:
    """What benchmarks.kernels_vs_peers left, one table a file: an old one is removed when a new one is committed."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-kernels_vs_peers.json")))
    tables = "\n\n".join(map(kernels_vs_peers.table, found))
    return tables or "No results are committed yet; docs/log.md has first numbers."


def rows_part() -> str:
    """What benchmarks.row_kernels left."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-row_kernels.json")))
    return "\n\n".join(map(row_kernels.table, found)) or "No results are committed yet; docs/log.md has first numbers."


def exact_part() -> str:
    """What benchmarks.exact left."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-exact.json")))
    return "\n\n".join(map(exact.table, found))


def snapshots_part() -> str:
    """What benchmarks.snapshots left."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-snapshots.json")))
    return "\n\n".join(map(snapshots.table, found))


def sampling_results() -> list[dict]:
    """What benchmarks.sampling left, one file a machine: an old one is removed when a new one is committed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-sampling.json"))]


def sampling_part() -> str:
    """The tables, and the picture of the first file that has curves."""
    found = sampling_results()
    if not found:
        return "No results are committed yet; docs/log.md has first numbers."
    picture = "\n\n![tokens/s of decoding against context and batch](sampling.png)"
    return "\n\n".join(map(sampling.table, found)) + (picture if any(one["curves"] for one in found) else "")


def vs_trl_part() -> str:
    """What benchmarks.vs_trl left, one file a machine."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-vs_trl.json")))
    return "\n\n".join(map(vs_trl.table, found))


def profile_part() -> str:
    """What benchmarks.step_profile left."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-step_profile.json")))
    return "\n\n".join(map(step_profile.table, found)) or "No results are committed yet; docs/log.md has first numbers."


def scaling_part() -> str:
    """What benchmarks.scaling measured."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-scaling.json")))
    return "\n\n".join(map(scaling.measured_table, found))


PARTS = {
    "tiny": tiny_part,
    "sampling": sampling_part,
    "peers": peers_part,
    "rows": rows_part,
    "exact": exact_part,
    "gpu": gpu_results.page_part,
    "snapshots": snapshots_part,
    "scaling": scaling_part,
    "vs_trl": vs_trl_part,
    "profile": profile_part,
    "predicted": scaling.predicted_table,
    "tensor": tensor_scaling.tensor_table,
}
PAGE_NAMES = ("kernels", "learning", "sampling", "gpu", "reliability", "scaling")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGE_NAMES))


def rewritten(readme: str) -> str:
    """The README with every measured part written anew. KeyError: a part that nothing here writes."""

    def part(found: re.Match) -> str:
        name = found["name"]
        return f"<!-- {name}:begin -->\n{PARTS[name]()}\n<!-- {name}:end -->"

    return re.sub(r"<!-- (?P<name>\w+):begin -->.*?<!-- (?P=name):end -->", part, readme, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the README is out of date")
    options = parser.parse_args()
    stale = []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if before != after:
            stale.append(path.name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if options.check:
        if stale:
            print(f"{' and '.join(stale)}: old; run python -m benchmarks.readme", file=sys.stderr)
        return int(bool(stale))
    print(write_picture(tiny_runs()[0], PICTURE))
    for results in sampling_results():
        if results["curves"]:
            sampling.picture(results, CURVES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
