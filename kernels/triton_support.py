"""Triton where it can serve, and stand-ins where it cannot, so that a kernel is written at module level either way.

A file of kernels says `from r1fast_kernels.triton_support import jit, tl, ...` and starts with
`from __future__ import annotations`: the annotation `tl.constexpr` is then never evaluated.

Importing Triton takes 72 MB and half a second, so a torch without a GPU's code leaves it alone, unless its interpreter
is asked for or somebody has imported it already (as whoever compiles for a card that is not here).
"""

import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy
import torch


def _wanted() -> bool:
    gpu = torch.version.cuda or torch.version.hip
    return bool(gpu) or os.environ.get("TRITON_INTERPRET") == "1" or "triton" in sys.modules


triton = tl = None
if _wanted():
    try:
        import triton
        import triton.language as tl  # noqa: F401  (for the kernels)
    except ImportError:  # a CPU build of torch brings no triton
        pass


@cache
def triton_version() -> str | None:
    """Of the installed package, imported or not; None where there is none."""
    if triton is not None:
        return triton.__version__
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def jit(function=None, **options):
    """`triton.jit`, bare or with options; the plain function where Triton is not imported (nothing then calls it).

    `do_not_specialize=[names]` keeps a count that changes from call to call from compiling the kernel anew.
    """
    if function is None:
        return lambda decorated: jit(decorated, **options)
    return function if triton is None else triton.jit(function, **options)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1: tile sizes must be one."""
    return 1 << (n - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1 when Triton was imported): CPU tensors, no GPU."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_unavailable() -> str | None:
    """Why Triton's interpreter cannot run our kernels, or None."""
    if triton_version() is None:
        return "triton is not installed"
    new_numpy = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    if new_numpy and tuple(map(int, triton_version().split(".")[:2])) < (3, 9):
        # Found with 3.6: a loop bound that is an argument arrives as an array, which Python's range refuses there.
        return f"the interpreter of triton {triton_version()} needs numpy < 2.4, and {numpy.__version__} is installed"
    return None


def triton_unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if triton_version() is None:
        return "triton is not installed"
    if interpreted():
        return interpreter_unavailable()
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def where_triton_runs(*args) -> str | None:
    """`supports` of a Triton backend: tensors on the GPU, or on the CPU under the interpreter."""
    wanted = "cpu" if interpreted() else "cuda"
    for value in args:
        if isinstance(value, torch.Tensor) and value.device.type != wanted:
            return f"a tensor lives on {value.device}, not on {wanted}"
    return None
