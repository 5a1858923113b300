"""`python -m r1fast_kernels`: which ops there are, which backends each has here, and why one is missing."""

import platform
import sys

import torch

from r1fast_kernels import load_ops, native
from r1fast_kernels.op import AUTOMATIC, BACKENDS, VARIABLE
from r1fast_kernels.triton_support import triton


def table() -> tuple[list[list[str]], list[str]]:
    """Rows of (op, mark per backend, automatic choice), and the reasons for absence that the marks number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, reasons = [], []
    for op in load_ops().values():
        row = [op.name]
        for name in BACKENDS:
            reason = op.reason(name) if name in op.backends else None
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            row.append(
                "-" if name not in op.backends else "yes" if reason is None else f"({reasons.index(reason) + 1})"
            )
        usable = (name for name in AUTOMATIC[device] if name in op.backends and op.reason(name) is None)
        rows.append([*row, next(usable)])
    return rows, reasons


def versions() -> str:
    parts = [f"torch {torch.__version__}", f"triton {triton.__version__ if triton else 'not installed'}"]
    if native.cpu_unavailable() is None:
        parts.append(f"CPU kernels {native.cpu().isa}, {torch.get_num_threads()} threads")
    parts.append(torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, no CUDA device")
    return " · ".join(parts)


def main() -> int:
    rows, reasons = table()
    rows.insert(0, ["op", *BACKENDS, "automatic"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(versions())
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    print("-  not written; the reference serves")
    for number, reason in enumerate(reasons, 1):
        print(f"({number})  {reason}")
    print(f"Choose with op(..., backend=...), with use_backend(...), or {VARIABLE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
