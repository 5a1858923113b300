"""Compiles what the part `ops` times: every backend and peer once, on the card's widths with few rows.

Nothing is measured, so it runs beside the tests; what lies compiled on the disk costs the timed parts nothing.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from benchmarks.gpu.measure import NO_TIME, Report, arguments, in_short, settle
from benchmarks.gpu.runs import run_of, usable
from benchmarks.gpu.shapes import SIZES
from benchmarks.gpu.works import Works
from r1fast_kernels import load_ops

FEW = replace(SIZES, tokens=64, length=32, sequences=4, rewards={"1M": 1 << 10})


def main() -> int:
    options = arguments("warm", __doc__).parse_args()
    report, deadline = Report("warm", options.folder), time.monotonic() + options.seconds
    for work in Works(FEW):
        if time.monotonic() > deadline:
            report.skip(work.what, NO_TIME)
            continue
        op, args, start = load_ops()[work.op], work.args(), time.monotonic()
        runs = {name: (lambda peer=peer, args=args: peer(args)) for name, peer in work.peers.items()}
        for name in usable(op, args, bool(work.backward)):
            runs[name] = lambda name=name, op=op, args=args, work=work: run_of(op, args, name, work.backward)
        wrong = {}
        for name, ready in runs.items():
            try:
                ready()()
                settle()
            except Exception as error:  # whatever is wrong, the part that times it says so again
                wrong[name] = in_short(error)
        report.add(what=work.what, seconds=round(time.monotonic() - start, 2), **({"wrong": wrong} if wrong else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
