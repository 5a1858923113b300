"""docs/kernels.md: its example runs, and its table is the registry's."""

import re
import subprocess
import sys

from benchmarks.readme import ROOT, rewritten
from r1fast_kernels import load_ops

PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_example_runs_and_learns_something(clean_environment, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    command = [sys.executable, "-c", example]
    child = subprocess.run(command, env=clean_environment, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    loss, entropy, clipped, gradient = map(float, child.stdout.split())
    assert abs(loss) < 1 and 0 < entropy < 7 and clipped == 0 and gradient > 0


def test_the_table_names_the_backends_of_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+?) \|", PAGE, re.MULTILINE)
    named = {op: set(found.split(", ")) for op, found in rows}
    assert named == {name: set(op.backends) - {"reference"} for name, op in load_ops().items()}


def test_the_measured_part_is_that_of_the_results():
    assert rewritten(PAGE) == PAGE, "run python -m benchmarks.readme"
