"""Tensors larger than the memory: address space of which only the pages that are written to are ever there (Linux)."""

import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import pytest
import torch

MAP_NORESERVE = 0x4000
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory that is not there is asked for as Linux does it")


def untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [elements]."""
    pages = mmap(-1, elements * dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(pages, dtype=dtype)
