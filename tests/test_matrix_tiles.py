"""Float32 products on a processor's bfloat16 tiles: as exact as they say, and the same bits in every shape.

Where there are no tiles the instructions are emulated (csrc/cpu/matrix_tiles.h under R1_EMULATED_TILES), so that
packing, edges and the order of the pieces are tested on every machine.
"""

import ctypes
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from r1fast_kernels import linear, native

ROOT = Path(__file__).parent.parent
# Root mean square of the errors over that of the product: of float32 sums it is about 3e-7.
ERRORS = {"highest": (2e-8, 6e-7), "high": (1e-6, 8e-6), "medium": (1e-3, 4e-3)}
PIECES = {"highest": 3, "high": 2, "medium": 1}

CALLS = """
#include "cpu/gemm_tiles.h"
#include "cpu/linear_tiles.h"
#include "cpu/ops.h"
using namespace r1::R1_ISA;
extern "C" bool call(int pieces, const float* x, int64_t x_row, bool x_across, const float* w, int64_t w_row,
                     bool w_across, const float* bias, int64_t m, int64_t k, int64_t n, float* out) {
  return matrix_tiles(pieces) &&
         gemm_tiles({m, k, n, {x, x_row, x_across}, {w, w_row, w_across}, out, n, bias, 256});
}
extern "C" bool few(int pieces, const float* x, int64_t x_row, const float* w, const float* bias, int64_t m, int64_t k,
                    int64_t n, float* out) {
  return matrix_tiles(pieces) && linear_tiles(x, x_row, w, bias, m, k, n, out);
}
extern "C" bool head(int pieces, const float* hidden, const float* weight, const int64_t* targets, const float* slopes,
                     int64_t rows, int64_t width, int64_t words, float scale, float* logp, float* entropy,
                     float* d_hidden, float* d_weight) {
  r1::HeadCall call{};
  call.hidden = hidden, call.weight = weight, call.targets = targets, call.slopes = slopes;
  call.rows = rows, call.width = width, call.vocabulary = words, call.scale = scale;
  call.loss = r1::HeadCall::kGivenSlope, call.logp = logp, call.entropy = entropy;
  call.d_hidden = d_hidden, call.d_weight = d_weight;
  return matrix_tiles(pieces) && linear_head(call);
}
"""
SOURCES = ("gemm_tiles", "linear_tiles", "linear_head", "grpo_loss")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """What computes on matrix tiles, as a library of its own: on the machine's, or emulated where it has none."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("compiles for x86-64 with GCC")
    if native.cpu_unavailable() or native.cpu().isa == "generic":
        pytest.skip(native.cpu_unavailable() or "the emulation wants AVX2")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "call.cpp").write_text(CALLS)
    real = native.cpu_unavailable() is None and native.cpu().has_matrix_tiles
    flags = ["-std=c++17", "-O2" if real else "-O0", "-w", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-march=x86-64-v4"] if real else ["-DR1_EMULATED_TILES", "-mavx2", "-mfma", "-Wno-psabi"]
    flags += ["-DR1_ISA=generic", f"-I{ROOT / 'csrc'}"]
    sources = [folder / "call.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in SOURCES)]
    with ThreadPoolExecutor(2) as pool:
        objects = [folder / f"{source.stem}.o" for source in sources]
        pairs = zip(sources, objects, strict=True)
        commands = [["g++", *flags, "-c", str(source), "-o", str(to)] for source, to in pairs]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run(["g++", "-shared", "-fopenmp", *map(str, objects), "-o", str(folder / "tiles.so")], check=True)
    return ctypes.CDLL(str(folder / "tiles.so"))


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def sizes(*numbers: int) -> tuple:
    return tuple(map(ctypes.c_int64, numbers))


def product(library, pieces, x, w, bias=None, x_across=False, w_across=False) -> torch.Tensor:
    """x [M, K] (or [K, M] across) times w [K, N] (or [N, K] across), by gemm_tiles."""
    (m, k), n = reversed(x.shape) if x_across else x.shape, w.shape[0] if w_across else w.shape[1]
    out = torch.full((m, n), torch.nan)
    x_row, w_row, m, k, n = sizes(x.stride(0), w.stride(0), m, k, n)
    left, right = (at(x), x_row, ctypes.c_bool(x_across)), (at(w), w_row, ctypes.c_bool(w_across))
    assert library.call(pieces, *left, *right, at(bias), m, k, n, at(out))
    return out


def few_rows(library, pieces, x, w, bias=None) -> torch.Tensor:
    """x [M, K] times w [N, K] transposed, by linear_tiles."""
    out = torch.full((len(x), len(w)), torch.nan)
    x_row, m, k, n = sizes(x.stride(0), len(x), x.shape[1], len(w))
    assert library.few(pieces, at(x), x_row, at(w), at(bias), m, k, n, at(out))
    return out


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize(("x_across", "w_across"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (16, 32, 16), (33, 65, 47), (50, 600, 34), (130, 31, 100)])
def test_every_orientation_is_as_exact_as_its_pieces(tiles, precision, x_across, w_across, m, k, n):
    x, w, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    wanted = x.double() @ w.double() + bias.double()
    x, w = x.T.contiguous() if x_across else x, w.T.contiguous() if w_across else w
    found = product(tiles, PIECES[precision], x, w, bias, x_across, w_across)
    least, most = ERRORS[precision]
    error = relative(found, wanted)
    assert error < most and (error > least or m * n < 500), error


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_a_row_has_the_same_bits_whatever_the_batch(tiles, pieces):
    x, w, bias = torch.randn(150, 300), torch.randn(70, 300), torch.randn(70)
    whole = product(tiles, pieces, x, w, bias, w_across=True)
    for rows in (1, 2, 15, 16, 17, 33, 64, 128):
        assert torch.equal(few_rows(tiles, pieces, x[:rows], w, bias), whole[:rows]), rows
    assert torch.equal(product(tiles, pieces, x[100:], w, bias, w_across=True), whole[100:])


def test_three_pieces_are_the_number_itself(tiles):
    """Multiplied by one, every float32 whose lowest piece is a normal number comes back whole."""
    numbers = torch.randn(40, 64) * torch.exp2(torch.randint(-90, 120, (40, 64)).float())
    assert torch.equal(product(tiles, 3, numbers, torch.eye(64)), numbers)
    assert torch.equal(product(tiles, 3, torch.eye(40), numbers), numbers)
    assert not torch.equal(product(tiles, 2, numbers, torch.eye(64)), numbers)


def test_what_is_not_finite_is_not_lost(tiles):
    for number in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(20, 40)
        x[3, 7] = number
        for pieces in (1, 2, 3):
            found = product(tiles, pieces, x, torch.randn(40, 24))
            assert not found[3].isfinite().any() and found[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize(("rows", "width", "words"), [(3, 20, 40), (70, 96, 130), (200, 40, 515), (33, 544, 130)])
def test_the_head_on_tiles_is_the_head(tiles, precision, rows, width, words):
    """Log-probabilities, entropies and both gradients against float64; rows of slope zero have none."""
    hidden, weight = torch.randn(rows, width), torch.randn(words, width) * width**-0.5
    targets, slopes = torch.randint(words, (rows,)), torch.randn(rows)
    slopes[::5] = 0
    found = [torch.full(shape, torch.nan) for shape in ((rows,), (rows,), (rows, width), (words, width))]
    shape = (*sizes(rows, width, words), ctypes.c_float(0.5))
    assert tiles.head(PIECES[precision], at(hidden), at(weight), at(targets), at(slopes), *shape, *map(at, found))
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (0.5 * exact_hidden @ exact_weight.T).log_softmax(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    (chosen * slopes.double()).sum().backward()
    wanted = chosen.detach(), -(logp.exp() * logp).sum(-1).detach(), exact_hidden.grad, exact_weight.grad
    for value, right in zip(found, wanted, strict=True):
        assert relative(value, right) < ERRORS[precision][1]
    assert not found[2][::5].any()


def test_the_layer_follows_torchs_precision():
    if native.cpu_unavailable() or not native.cpu().has_matrix_tiles:
        pytest.skip("this processor has no matrix tiles")
    x, weight = torch.randn(300, 256), torch.randn(128, 256)
    wanted = x.double() @ weight.double().T
    before = torch.get_float32_matmul_precision()
    try:
        for precision, (least, most) in ERRORS.items():
            torch.set_float32_matmul_precision(precision)
            assert least < relative(linear(x, weight, backend="cpu"), wanted) < most
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_precision_that_is_set_for_each_backend_apart_is_no_error(clean_environment):
    """torch then refuses to say the one setting; products stay as exact as they can be."""
    code = (
        "import torch\n"
        "from r1fast_kernels import native\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "torch.backends.fp32_precision = 'ieee'\n"
        "try:\n    torch.get_float32_matmul_precision()\n"
        "except RuntimeError:\n    print('refused', native._wanted_pieces())\n"
    )
    child = subprocess.run([sys.executable, "-c", code], env=clean_environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    if not child.stdout:
        pytest.skip("this torch says one setting for all backends")
    assert child.stdout.split() == ["refused", "3"]
