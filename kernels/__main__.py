"""`python -m r1fast_kernels`: which ops there are, which backends each has here, and why one is missing."""

import platform
import sys

import torch

from r1fast_kernels import load_ops, native
from r1fast_kernels.op import AUTOMATIC, BACKENDS, LIBRARIES, VARIABLE, Op
from r1fast_kernels.triton_support import triton_version

OURS = tuple(name for name in BACKENDS if name not in LIBRARIES)


def table() -> tuple[list[list[str]], list[str]]:
    """Rows of (op, mark per backend, libraries, automatic choice), and the reasons for absence that marks number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, reasons = [], []

    def mark(op: Op, name: str) -> str:
        reason = op.reason(name)
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"({reasons.index(reason) + 1})"

    for op in load_ops().values():
        own = [mark(op, name) if name in op.backends else "-" for name in OURS]
        libraries = [f"{name} {mark(op, name)}" for name in LIBRARIES if name in op.backends]
        usable = (name for name in AUTOMATIC[device] if name in op.backends and op.reason(name) is None)
        rows.append([op.name, *own, ", ".join(libraries) or "-", next(usable)])
    return rows, reasons


def versions() -> str:
    parts = [f"torch {torch.__version__}", f"triton {triton_version() or 'not installed'}"]
    if native.cpu_unavailable() is None:
        parts.append(f"CPU kernels {native.cpu().isa}, {torch.get_num_threads()} threads")
    parts.append(torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, no CUDA device")
    return " · ".join(parts)


def main() -> int:
    rows, reasons = table()
    rows.insert(0, ["op", *OURS, "of libraries", "automatic"])
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
