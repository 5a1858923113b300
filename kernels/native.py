"""Loads the compiled modules `_cpu` and `_cuda` on first use and says why one is missing.

torch is imported first on purpose: it brings its libgomp, the extension asks for the same SONAME, and so both share one
thread pool. Native functions take raw pointers (`tensor.data_ptr()`), sizes and, on CUDA, a stream: no torch headers.
"""

from functools import cache
from importlib import import_module

import torch


@cache
def _load(name: str):
    try:
        module = import_module(f"r1fast_kernels.{name}")
    except ImportError as error:
        return error

    def missing(attribute: str):  # asked for what the module has not (PEP 562)
        raise AttributeError(
            f"the compiled module {name} has no {attribute!r}: it is older than the sources; build it anew with "
            f"pip install -e ."
        )

    module.__getattr__ = missing
    return module


_PIECES = {"highest": 3, "high": 2, "medium": 1}  # bfloat16 numbers that stand for a float32: csrc/cpu/matrix_tiles.h
_pieces = 3


def _wanted_pieces() -> int:
    """As torch.set_float32_matmul_precision says; all where it is set for each backend apart, which torch answers with
    an error when it is asked for the one setting."""
    try:
        return _PIECES[torch.get_float32_matmul_precision()]
    except RuntimeError:
        return _PIECES["highest"]


def cpu():
    """The compiled CPU module. Raises ImportError when it was not built.

    Where the processor has matrix tiles, products follow torch.set_float32_matmul_precision: "highest" is as exact as
    float32 sums are, "high" has errors of about 5e-6, "medium" of 2e-3 of a product's size."""
    global _pieces
    module = _module("_cpu")
    if module.has_matrix_tiles and (wanted := _wanted_pieces()) != _pieces:
        module.matrix_tiles(wanted)
        _pieces = wanted
    return module


def cuda():
    """The compiled CUDA module. Raises ImportError when it was not built."""
    return _module("_cuda")


def _module(name: str):
    found = _load(name)
    if isinstance(found, ImportError):
        raise found
    return found


def cpu_unavailable() -> str | None:
    """Why the CPU extension cannot be used, or None."""
    found = _load("_cpu")
    if isinstance(found, ImportError):
        return f"the CPU extension cannot be imported ({found}); pip install -e . builds it"
    return None


def cuda_unavailable() -> str | None:
    """Why the CUDA extension cannot be used, or None."""
    if isinstance(_load("_cuda"), ImportError):
        return "the CUDA extension was not built: no nvcc when r1fast was installed, or it failed (pip -v shows which)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA kernels need compute capability 8.0 or newer"
    return None


def only_float32(x, *_) -> str | None:
    """`supports` of a backend that computes in float32; the op has checked that its other tensors are like x."""
    return None if x.dtype is torch.float32 else f"it computes in float32, and the input is {x.dtype}"


def without_gaps(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, whose last dimension is contiguous: the other strides native code takes as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def packed_heads(x: torch.Tensor) -> torch.Tensor:
    """x itself where each [heads, width] is contiguous, as in a slice of the joint projection; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def place(x: torch.Tensor) -> tuple[int, int, int]:
    """Address and strides (in elements) of x [rows, heads, width]: what native code calls Strided."""
    return x.data_ptr(), x.stride(0), x.stride(1)


# The numbers of csrc/cuda/ops.h's R1Type.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def call_cpu(name: str, *arguments):
    """Function `name` of the CPU module; what it raises for bad values comes through."""
    return getattr(cpu(), name)(*arguments)


def launch(device: torch.device, name: str, *arguments) -> None:
    """Launcher `name` of the CUDA module, on torch's current stream of `device`; it waits for nothing.

    Raises RuntimeError, with CUDA's words, when a launch fails.
    """
    with torch.cuda.device(device):
        getattr(cuda(), name)(*arguments, torch.cuda.current_stream().cuda_stream)
