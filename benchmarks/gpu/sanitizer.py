"""compute-sanitizer's memcheck and racecheck over every CUDA kernel of ours: the tiny and ragged cases of each op.

Without the tool, or without a GPU, the same cases run by themselves and a row says why nothing was checked.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.measure import DEVICE, NO_TIME, Report, arguments, ask, in_short
from benchmarks.gpu.runs import run_of, usable
from r1fast_kernels import load_ops

MODULE = "benchmarks.gpu.sanitizer"
TOOLS = ("memcheck", "racecheck")
BACKEND = "cuda" if DEVICE == "cuda" else "cpu"
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def find() -> str | None:
    """compute-sanitizer on PATH, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    beside += ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return next(filter(None, (shutil.which("compute-sanitizer", path=path) for path in (None, *beside))), None)


def cases() -> list[str]:
    """Runs them; the names of those that ran. To stderr goes which one is next: an error is found under it."""
    ran = []
    for op in load_ops().values():
        if BACKEND not in op.backends:
            continue
        for case in (case for case in op.cases() if case.size in ("tiny", "ragged")):
            for dtype in op.tolerances:
                for backward in ("", "both") if op.gradients else ("",):
                    args = case.make(DEVICE, dtype, 0)
                    if BACKEND not in usable(op, args, bool(backward)):
                        continue
                    name = f"{op.name} {case.size} {case.name} {dtype} {backward}".strip()
                    print(name, file=sys.stderr, flush=True)
                    run_of(op, args, BACKEND, backward)()
                    ran.append(name)
    return ran


def check(sanitizer: list[str], tool: str, command: list[str], seconds: float) -> dict:
    """A row: errors or hazards that `tool` found while `command` ran. RuntimeError: it said nothing of them."""
    full = [*sanitizer, "--tool", tool, "--print-limit", "20", *command]
    try:
        child = subprocess.run(full, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(NO_TIME) from None
    said = child.stdout + child.stderr
    found = SUMMARY.search(said)
    if found is None or child.returncode:
        raise RuntimeError(f"exit code {child.returncode}: {(said.strip().splitlines() or ['not a word'])[-1]}")
    count = int(found[1] or found[2])
    ran = next(line for line in reversed(child.stdout.splitlines()) if line.startswith("["))
    names = json.loads(ran)
    found = {"what": tool, "errors": count, "holds": not count, "verdict": f"{count} found", "runs": len(names)}
    kernels = sorted(set(re.findall(r"at (.+?)\+0x", said)))
    return found | {"ops": sorted({name.split()[0] for name in names}), "at": kernels}


def main() -> int:
    if "--ask" in sys.argv:
        print(json.dumps(cases()))
        return 0
    options = arguments("sanitizer", __doc__).parse_args()
    report, sanitizer = Report("sanitizer", options.folder), find()
    if DEVICE == "cpu" or sanitizer is None:
        ran = ask(MODULE, "cases")
        report.add(what=f"{len(ran)} cases of {len({name.split()[0] for name in ran})} ops by themselves")
        for tool in TOOLS:
            report.skip(tool, "no GPU" if DEVICE == "cpu" else "compute-sanitizer is neither on PATH nor beside nvcc")
        return 0
    errors, command = 0, [sys.executable, "-m", MODULE, "--ask", "cases"]
    with ThreadPoolExecutor() as together:  # both wait for processes of their own
        checks = {tool: together.submit(check, [sanitizer], tool, command, options.seconds) for tool in TOOLS}
    for tool, found in checks.items():
        try:
            errors += report.add(**found.result())["errors"]
        except RuntimeError as error:
            report.skip(tool, in_short(error))
    if errors:
        report.say(wrong=f"compute-sanitizer found {errors} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
