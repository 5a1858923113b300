"""The emulation of tensor cores against the PTX ISA's own words for where the elements lie, which are written here a
second time: a kernel that packs its factors as csrc/cuda/fragments.h says, and an emulation that unpacks them as it
says, would agree on any layout.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATION = Path(__file__).parent / "emulated_cuda"
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("the emulation is tried on Linux, with a C++ compiler")
    library = tmp_path_factory.mktemp("probes") / "probes.so"
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-include", str(EMULATION / "cuda_runtime.h")]
    subprocess.run([*compiler, *flags, str(EMULATION / "probes.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": (row, column) of a lane's element i
def a_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane & 3
    return (group if i in (0, 1, 4, 5) else group + 8), thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane & 3
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane & 3
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def spread(matrix: torch.Tensor, place, each: int) -> torch.Tensor:
    """What each of the 32 lanes holds."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(each)]) for lane in range(32)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_distinct_elements(probes, dtype):
    """Whole numbers below 256, all different, which 8 bits hold, so that every sum is exact and any swap is seen."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randperm(256, generator=generator).view(16, 16).to(dtype)
    b = torch.randperm(128, generator=generator).view(16, 8).to(dtype)
    c = 1000.0 * torch.randperm(128, generator=generator).view(16, 8)
    held = spread(c, c_place, 4).contiguous()
    left, right = spread(a, a_place, 8).contiguous(), spread(b, b_place, 4).contiguous()
    probes.probe_multiply(dtype is torch.bfloat16, address(left), address(right), address(held))
    assert torch.equal(held, spread(a.float() @ b.float() + c, c_place, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_four_matrices_from_shared_memory(probes, transposed):
    """PTX ISA, ldmatrix: lane l gets elements 2 (l % 4) and the next of row l / 4, or of column l / 4 of the transpose.

    Every second row was not to be read and is zero.
    """
    rows = torch.randperm(256, generator=torch.Generator().manual_seed(0)).short().view(32, 8) + 1
    words = torch.empty(32, 4, 2, dtype=torch.int16)
    probes.probe_matrices(transposed, True, address(rows), address(words))
    matrices = torch.where(torch.arange(32)[:, None] % 2 == 0, rows, 0).view(4, 8, 8)
    for lane in range(32):
        row, first = lane // 4, lane % 4 * 2
        seen = matrices.mT if transposed else matrices
        assert torch.equal(words[lane], seen[:, row, first : first + 2])


def test_a_copy_that_is_not_waited_for_is_not_there(probes):
    rows, words = torch.ones(32, 8, dtype=torch.int16), torch.zeros(32, 4, 2, dtype=torch.int16)
    probes.probe_matrices(False, False, address(rows), address(words))
    assert (words == -1).all()  # NaN in both types


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_rounded_as_torch_rounds(probes, dtype):
    probes.probe_pack.argtypes = [ctypes.c_bool, ctypes.c_float, ctypes.c_float]
    numbers = torch.tensor([1.00390625, 1.01171875, -0.3, 1e-8, 3.0, 65519.0])  # two ties in bfloat16
    for low, high in zip(numbers, numbers.flip(0), strict=True):
        word = probes.probe_pack(dtype is torch.bfloat16, float(low), float(high))
        assert torch.tensor([word]).int().view(dtype).tolist() == torch.stack([low, high]).to(dtype).tolist()
