"""Triton where it is installed, and stand-ins where it is not, so that a kernel is written at module level either way.

A file of kernels says `from r1fast_kernels.triton_support import jit, tl, ...` and starts with
`from __future__ import annotations`: the annotation `tl.constexpr` is then never evaluated.
"""

import os

import numpy
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no triton
    triton = tl = None


def jit(function=None, **options):
    """`triton.jit`, bare or with options; the plain function where Triton is missing (nothing then calls it).

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
    if triton is None:
        return "triton is not installed"
    new_numpy = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    if new_numpy and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        # Found with 3.6: a loop bound that is an argument arrives as an array, which Python's range refuses there.
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4, and {numpy.__version__} is installed"
    return None


def triton_unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if triton is None:
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
