"""Are results the same bits in a second process? Every op, backend and dtype, forward and backward.

Within a process the tests ask that; between two, settings that were found by trying, or memory that happened to hold
zeros, could still differ.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from benchmarks.gpu.measure import DEVICE, SMALL, Report, arguments, ask
from benchmarks.gpu.runs import run_of, usable
from r1fast_kernels import load_ops

MODULE = "benchmarks.gpu.determinism"
SIZES = ("tiny",) if SMALL else ("ragged", "model")


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def digests() -> dict[str, str]:
    """Of what every run leaves, by the run's name."""
    found = {}
    for op in load_ops().values():
        for case in (case for case in op.cases() if case.size in SIZES):
            for dtype in op.tolerances:
                for backward in ("", "both") if op.gradients else ("",):
                    args = case.make(DEVICE, dtype, 0)
                    for backend in usable(op, args, bool(backward)):
                        if backward and not op.backends[backend].deterministic:
                            continue
                        args = case.make(DEVICE, dtype, 0)
                        left = run_of(op, args, backend, backward)() + [args[i] for i in op.mutates]
                        name = f"{op.name} {case.size} {case.name} {dtype} {backend} {backward}".strip()
                        found[name] = digest(left)
    return found


def main() -> int:
    if "--ask" in sys.argv:
        print(json.dumps(digests()))
        return 0
    report = Report("determinism", arguments("determinism", __doc__).parse_args().folder)
    first, second = (ask(MODULE, "digests") for _ in range(2))
    other = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    verdict = f"{len(other)} of {len(first)} differ"
    report.add(what="a second process", runs=len(first), holds=not other, verdict=verdict, differ=other)
    if other:
        report.say(wrong=f"{len(other)} runs differ in a second process, {other[0]} first")
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())
