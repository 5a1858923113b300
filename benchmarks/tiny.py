"""`python -m benchmarks.tiny`: the preset `tiny` over several seeds, for the README's table and picture.

Each seed is one `python -m r1fast.train tiny seed=N` in a process of its own. What is kept under
benchmarks/results/tiny/ is what the table and the picture are drawn from: the recipe as it ran, the summary, and the
log without samples. `python -m benchmarks.readme` then rewrites the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from r1fast.metrics import EVENTS, read_events

RESULTS = Path(__file__).parent / "results" / "tiny"
# of a training step only what is drawn is kept: the whole log is 0.5 MB a seed
STEP_KEYS = ("event", "stage", "kind", "step", "steps", "time", "response_length", "reward", "pass_rate", "loss")


def commit() -> str:
    """The checkout's commit, short; "unknown" outside of one."""
    asked = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def keep(run: Path, folder: Path, commit: str) -> None:
    """Copies what the README needs of a finished run, and says which commit ran."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "config.yaml", folder / "config.yaml")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (folder / "summary.json").write_text(json.dumps({"commit": commit, **summary}, indent=1) + "\n", encoding="utf-8")
    lines = []
    for event in read_events(run):
        if event["event"] == "step":
            event = {key: event[key] for key in STEP_KEYS if key in event}
        lines.append(json.dumps(event, ensure_ascii=False) + "\n")
    (folder / EVENTS).write_text("".join(lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep-runs", type=Path, metavar="DIR", help="leave the whole run directories there")
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="overrides of the preset")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.keep_runs or Path(scratch)
        for seed in options.seeds:
            out = runs / f"seed{seed}"
            command = [sys.executable, "-m", "r1fast.train", "tiny", f"seed={seed}", *options.settings]
            code = subprocess.call([*command, "--fresh", "--out", str(out)])
            if code:
                return code
            keep(out, RESULTS / f"seed{seed}", commit())
    return 0


if __name__ == "__main__":
    sys.exit(main())
