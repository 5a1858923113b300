"""Results of benchmarks/on_gpu.sh: one JSON file a card and commit, and the short tables of it.

`python -m benchmarks.gpu_results` writes the tables of the committed files into docs/gpu.md; given a file, it prints
that one's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernels_vs_peers import slug
from r1fast.metrics import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
NOTHING = (
    "**Nothing has been measured on a GPU yet**: no results of a card are committed. What these pages say of a GPU's "
    "speed is a target or a model."
)
DRY = "A dry run on the CPU with small shapes: it shows that the parts run, and its numbers say nothing about a card."
# The columns of each part's table; of a nested value the inner ones by name.
COLUMNS = {
    "tests": ("what", "passed", "failed", "skipped", "stopped"),
    "determinism": ("what", "runs", "verdict"),
    "sanitizer": ("what", "runs", "verdict"),
    "ceilings": ("what", "per second"),
    "first_device_test": ("what", "holds", "verdict"),
    "ops": ("what", "by", "microseconds", "fraction", "MiB", "targets"),
    "exactness": ("what", "mean", "max", "zero", "cost"),
    "sampling": ("what", "by", "tokens/s", "roofline", "fraction", "fraction unshared", "target", "MiB"),
    "step": ("what", "by", "seconds", "phases", "tokens/s", "fraction", "peak MiB"),
}
SHARES = ("fraction", "fraction unshared", "target", "zero", "share")


def git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def machine(commit: str = "") -> dict:
    """What the numbers hold for. commit: where there is no git repository to ask."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    found |= {"commit": commit or git("rev-parse", "HEAD")}
    found["uncommitted"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
        found |= {"memory GiB": round(card.total_memory / 2**30, 1), "capability": f"{card.major}.{card.minor}"}
    else:
        found |= {"device": "cpu", "processor": platform.machine(), "threads": torch.get_num_threads()}
    return found


def target(where: dict, folder: Path = RESULTS) -> Path:
    device = slug(where["device"])
    return folder / f"{device}-{where['commit'][:10] or 'no-commit'}.json"


def read(path: Path) -> dict | None:
    """A JSON file's object; None where it is missing or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class Results:
    """The file of a card and commit. What is there from an earlier call is kept until its part is put again."""

    def __init__(self, path: Path, where: dict) -> None:
        self.path, before = path, read(path)
        same = before is not None and before["machine"] == where
        self.data = {"machine": where, "parts": before["parts"] if same else {}}

    def put(self, part: str, entry: dict) -> None:
        self.data["parts"][part] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")


# -- tables ---------------------------------------------------------------------------------------------------------


def _targets(found: list[dict]) -> str:
    return ", ".join(f"{one['target']}: {'met' if one['met'] else '**missed**'}" for one in found)


def cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if column == "targets":
        return _targets(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(name, inner)}" for name, inner in value.items())
    if column in SHARES:
        return f"{value:.0%}"
    if column == "per second":
        return f"{value / 1e12:.3g} T"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def rows_table(columns: tuple[str, ...], rows: list[dict]) -> list[str]:
    """Markdown; columns that no row fills are left out. What was skipped is a line below, with its reason."""
    full = [row for row in rows if "skipped" not in row or "passed" in row]
    columns = [c for c in columns if any(row.get(c) not in (None, []) for row in full)]
    lines = []
    if full:
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cell(c, row.get(c)) for c in columns)} |" for row in full]
    skipped = [f"- {row['what']}: {row['skipped']}" for row in rows if row not in full]
    return [*lines, *([""] if full and skipped else []), *skipped]


def profile_lines(rows: list[dict]) -> list[str]:
    """The tables as they are; the timelines in a block of fixed width."""
    lines = []
    for row in rows:
        if "table" in row:
            lines += [f"{row['what']}, {row['seconds']:.3g} s:", "", row["table"], ""]
        elif "line" in row:
            lines.append(f"    {row['line']} {row['what']}, busy {row['busy']:.3g} s, mostly {row['dearest']}")
        elif "share" in row:
            lines += [f"    {row['what']}: {row['seconds']:.3g} s, {row['share']:.0%} of the step", ""]
        else:
            lines.append(f"- {row['what']}: {row['skipped']}")
    return lines


def table(results: dict) -> str:
    """All parts as Markdown: how each ended, then what it measured."""
    where, parts = results["machine"], results["parts"]
    dirty = ", with uncommitted changes" if where["uncommitted"] else ""
    lines = [f"{where['device']}, torch {where['torch']}, commit {where['commit'][:10]}{dirty}."]
    lines += ["", DRY] if where["device"] == "cpu" else []
    lines += ["", "| part | how it ended | s |", "|---|---|---:|"]
    lines += [f"| {name} | {cell('state', part['state'])} | {part['seconds']:.0f} |" for name, part in parts.items()]
    for name, part in parts.items():
        body = profile_lines(part["rows"]) if name == "profile" else rows_table(COLUMNS.get(name, ()), part["rows"])
        if name not in ("checkpoints", "warm") and body:
            lines += ["", f"### {name}", "", *body]
        said = {key: value for key, value in part.items() if key not in ("state", "seconds", "rows")}
        lines += ["", *(f"- {key}: {cell(key, value)}" for key, value in said.items())] if said else []
    return "\n".join(lines).rstrip()


def page_part(folder: Path = RESULTS) -> str:
    """The tables of the committed cards, or that there are none."""
    found = [data for path in sorted(folder.glob("*.json")) if "parts" in (data := read(path) or {})]
    return "\n\n".join(f"## {data['machine']['device']}\n\n{table(data)}" for data in found) or NOTHING


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_results", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="results to print; without it docs/gpu.md is written anew")
    path = parser.parse_args().file
    if path is not None:
        results = read(path)
        if results is None or "parts" not in results:
            print(f"gpu_results: {path} holds no results of benchmarks/on_gpu.sh", file=sys.stderr)
            return 2
        print(table(results))
        return 0
    from benchmarks.readme import rewritten  # it imports this module for its part of the page

    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
