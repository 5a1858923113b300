"""What the card can do at most: bytes moved by a copy (read and written), and FLOP/s of a large product on random data.

Fractions in the other parts are of these, not of a data sheet.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.measure import DEVICE, SMALL, Report, arguments, seconds

SIZE = 512 if SMALL else 8192
COPIED = 1 << (22 if SMALL else 32)  # bytes


def copy() -> float:
    source = torch.empty(COPIED // 4, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source))


def product(dtype: torch.dtype) -> float:
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SIZE**3 / seconds(lambda: torch.mm(a, b, out=out))


def main() -> int:
    options = arguments("ceilings", __doc__).parse_args()
    report = Report("ceilings", options.folder)
    report.add(what="copy", **{"per second": copy()})
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        report.add(what=name, **{"per second": product(dtype)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
