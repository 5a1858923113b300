"""The tests that need a GPU: every op and backend against the reference, forward and backward, in every dtype; rows
beyond 2^31 elements; graphs; a whole model that samples and learns. Each file is a pytest of its own, all at once, and
what it said is read line by line, so that a kernel that takes its process down loses the verdict of one test.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.measure import DEVICE, Report, arguments

ROOT = Path(__file__).parent.parent.parent
ON_A_CARD = {
    "tests/test_kernels.py": "cuda",
    "tests/test_cuda.py": "not compiled_for_the_cpu",
    "tests/test_large_offsets.py": "cuda or triton or flash or torch",
    "tests/test_paged.py": "cuda",
    "tests/test_paged_groups.py": "cuda",
    "tests/test_graphs.py": "",
    "tests/test_device.py": "",
}
ON_THE_CPU = {"tests/test_kernels.py": "group_advantage-cpu-cpu-float32-tiny", "tests/test_device.py": "packed"}
SUITES = ON_A_CARD if DEVICE == "cuda" else ON_THE_CPU
LINE = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>PASSED|FAILED|ERROR|SKIPPED) (?P<one>tests/\S+)"
    r"|(?P<other>tests/\S+::.*?) (?P<last>PASSED|FAILED|ERROR|SKIPPED))",
    re.MULTILINE,
)
SHOWN = 20  # failures that are named


def outcome(said: str) -> dict:
    """Counts and names of the failed, of pytest's lines, with pytest-xdist or without."""
    found = {(m["one"] or m["other"]): (m["first"] or m["last"]) for m in LINE.finditer(said)}
    failed = [name for name, verdict in found.items() if verdict in ("FAILED", "ERROR")]
    counts = {kind.lower(): sum(v == kind for v in found.values()) for kind in ("PASSED", "SKIPPED")}
    return {**counts, "failed": len(failed), "names": failed[:SHOWN]}


def command(file: str, select: str) -> list[str]:
    many = DEVICE == "cuda" and file.endswith("test_kernels.py") and importlib.util.find_spec("xdist")
    spread = ["-n", "6"] if many else []
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "--tb=short", *spread, file, "-k", select]


def main() -> int:
    options = arguments("tests", __doc__).parse_args()
    report, deadline = Report("tests", options.folder), time.monotonic() + options.seconds
    running, wrong = {}, []
    for file, select in SUITES.items():
        log = (options.folder / f"{Path(file).stem}.log").open("w+")
        running[file] = log, subprocess.Popen(command(file, select), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    for file, (log, child) in running.items():
        try:
            code = child.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            code = None
        log.seek(0)
        row = {"what": file, **outcome(log.read())}
        if code is None:
            row["stopped"] = "its time was used up"
        elif code not in (0, 1, 5):  # 1: tests failed, 5: none was selected
            row["stopped"] = f"pytest ended with exit code {code}"
        report.add(**row)
        if row["failed"] or "stopped" in row:
            wrong.append(f"{file}: {row['failed']} failed" + (f", {row['stopped']}" if "stopped" in row else ""))
    if wrong:
        report.say(wrong="; ".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
