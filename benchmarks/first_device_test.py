"""`python -m benchmarks.first_device_test --folder F`: what decides whether sampler and trainer can agree to the bit.

A sampler's and a trainer's log-probabilities differ because a product sums in another order for another number of rows.
On Hopper that may cost nothing to avoid, or a GEMM of one's own; these are the questions, in order (the answer of each
is one line of the file):

    cublas     is a row of cuBLAS's products the same bits whatever the number of rows, as it comes and with its
               workspaces off (without which it cannot split K), and what does that cost?
    tiles      does a product by wgmma depend on the tile, or on the order of K alone?
    mma.sync   does the older instruction, which Triton takes for tiles of fewer than 64 rows, give wgmma's bits?
    swapped    does a product with its operands swapped (the weights as rows, so that few tokens fill a tile)?
    segments   is K split at fixed places, merged in order, what one program gives that sums the same segments?
    rows       is a row the same alone and among 512?

Triton's products keep one order of K and give float32. Without a GPU cuBLAS's part runs on the CPU's products, and
Triton's under its interpreter, in small.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import DEVICE, SMALL, Report, arguments, ask, in_short, seconds
from r1fast_kernels.triton_support import interpreter_unavailable, jit, tl, triton_version

MODULE = "benchmarks.first_device_test"
WORKSPACES_OFF = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}  # before CUDA is initialised
# [K, N] of Qwen2.5-1.5B's products
PRODUCTS = (
    {"qkv": (64, 96), "down": (160, 64)}
    if SMALL
    else {"qkv": (1536, 2048), "o": (1536, 1536), "up": (1536, 17920), "down": (8960, 1536), "head": (1536, 151936)}
)
ROWS = (
    (1, 2, 3, 7, 16, 32)
    if SMALL
    else (1, 2, 3, 4, 5, 8, 16, 17, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 1024, 2048, 4096)
)
SEGMENT = 64 if SMALL else 512  # of K; a multiple of every tile's depth
# rows, columns and depth of a tile, warps
WGMMA = ((64, 64, 64, 4), (64, 128, 64, 4), (64, 256, 64, 4), (128, 128, 64, 8), (128, 256, 64, 8), (128, 128, 32, 8))
MMA_SYNC = ((16, 64, 64, 4), (32, 64, 64, 4), (32, 128, 64, 4))
if SMALL:
    WGMMA, MMA_SYNC = ((64, 64, 64, 4), (64, 32, 32, 4)), ((16, 64, 64, 4),)


# -- cuBLAS, in a process of its own for its environment ------------------------------------------------------------


def ask_cublas() -> dict:
    """For every product: at which numbers of rows its rows differ from those among the most, and seconds at 512."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.float32 if SMALL else torch.bfloat16
    found = {}
    for name, (depth, width) in PRODUCTS.items():
        x, w = (
            torch.randn(n, depth, generator=generator, device=DEVICE, dtype=dtype) / depth**0.25
            for n in (ROWS[-1], width)
        )
        whole = F.linear(x, w)
        other = [rows for rows in ROWS[:-1] if not torch.equal(F.linear(x[:rows], w), whole[:rows])]
        shifted = [
            rows for rows in ROWS[:-1] if rows < ROWS[-1] and not torch.equal(F.linear(x[-rows:], w), whole[-rows:])
        ]
        some = x[: min(512, len(x))]
        spent = seconds(lambda some=some, w=w: F.linear(some, w), spend=0.05)
        found[name] = {"rows that differ": sorted({*other, *shifted}), "microseconds": round(spent * 1e6, 2)}
    return found


def cublas(report: Report) -> None:
    usual, off = ask(MODULE, "cublas"), ask(MODULE, "cublas", environment=WORKSPACES_OFF)
    for name, found in (("as it comes", usual), ("with its workspaces off", off)):
        other = {product: told["rows that differ"] for product, told in found.items() if told["rows that differ"]}
        same = f"the same bits at all {len(ROWS)} numbers of rows in {len(found) - len(other)} of {len(found)} products"
        where = "; other bits in " + ", ".join(f"{p} at {rows}" for p, rows in other.items()) if other else ""
        answer(report, f"cublas {name}", not other, same + where, products=found)
    cost = {name: round(off[name]["microseconds"] / usual[name]["microseconds"], 3) for name in usual}
    text = "workspaces off cost, at 512 rows: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in cost.items())
    answer(report, "cublas cost", max(cost.values()) < 1.05, text, ratios=cost)


# -- Triton's products ----------------------------------------------------------------------------------------------


@jit
def _sum(a, b, m, n, k, rows, columns, depth, first, last, part, DEPTH: tl.constexpr):
    """part + the products of k from `first` to `last`, or to the end of K, in order."""
    for at in range(first, tl.minimum(last, depth), DEPTH):
        inside = at + k < depth
        x = tl.load(a + m[:, None] * depth + (at + k)[None, :], (m < rows)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b + n[None, :] * depth + (at + k)[:, None], (n < columns)[None, :] & inside[:, None], other=0.0)
        part = tl.dot(x, y, part)
    return part


@jit
def _product(
    a, b, out, rows, columns, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over segments, in order, of (sum over k in the segment, in order) of a[m, k] b[n, k].

    SEGMENT: 0 for one that holds all of K. SPLIT: a program has one segment and leaves its sum in out[segment, m, n].
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SPLIT or SEGMENT == 0:
        first = tl.program_id(2) * SEGMENT
        last = depth if SEGMENT == 0 else first + SEGMENT
        total = _sum(a, b, m, n, k, rows, columns, depth, first, last, total, DEPTH)
    else:
        for start in range(0, depth, SEGMENT):
            part = tl.zeros([ROWS, COLUMNS], tl.float32)
            total += _sum(a, b, m, n, k, rows, columns, depth, start, start + SEGMENT, part, DEPTH)
    place = tl.program_id(2) * rows * columns + m[:, None] * columns + n[None, :]
    tl.store(out + place, total, (m < rows)[:, None] & (n < columns)[None, :])


@jit
def _merge(parts, out, elements, segments, BLOCK: tl.constexpr):
    """out = 0 + parts[0] + parts[1] + ..., one after another."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for segment in range(0, segments):
        total += tl.load(parts + segment * elements + place, place < elements, other=0.0)
    tl.store(out + place, total, place < elements)


def product(a: Tensor, b: Tensor, tile: tuple[int, ...], segment: int = 0, split: bool = False) -> Tensor:
    """float32 [M, N] of a [M, K] and b [N, K]. segment: 0 for one that holds all of K."""
    (rows, depth), columns = a.shape, b.shape[0]
    tile_rows, tile_columns, tile_depth, warps = tile
    segments = -(-depth // (segment or depth))
    grid = (-(-rows // tile_rows), -(-columns // tile_columns), segments if split else 1)
    out = torch.full((segments if split else 1, rows, columns), float("nan"), device=a.device)
    shape = (rows, columns, depth, tile_rows, tile_columns, tile_depth, segment, split)
    _product[grid](a, b, out, *shape, num_warps=warps, num_stages=3)
    if not split:
        return out[0]
    merged = torch.empty_like(out[0])
    _merge[(-(-rows * columns // 1024),)](out, merged, rows * columns, segments, 1024)
    return merged


def operands(rows: int, depth: int, columns: int) -> tuple[Tensor, Tensor]:
    """In half precision; the interpreter makes garbage of bfloat16 products, so there in float16."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    dtype = torch.float16 if SMALL else torch.bfloat16
    return tuple(
        (torch.randn(n, depth, generator=generator, device=DEVICE) / depth**0.25).to(dtype) for n in (rows, columns)
    )


def ask_triton() -> list[dict]:
    """One entry a question; those about speed are at 512 rows of the product `down`."""
    depth, columns = PRODUCTS["down"]
    x, w = operands(32 if SMALL else 512, depth, columns)
    base = product(x, w, WGMMA[0])
    exact = x.double() @ w.double().T
    error = float((base.double() - exact).abs().max() / exact.abs().max())
    assert error < 1e-4, f"the product is wrong: {error}"

    def microseconds(run) -> float:
        return round(seconds(run, spend=0.05, least=3 if not SMALL else 1) * 1e6, 2)

    def told(question: str, found: dict[str, bool], yes: str, no: str, **more) -> dict:
        other = [name for name, same in found.items() if not same]
        text = f"{yes} ({', '.join(found)})" if not other else f"{no}: {', '.join(other)} of {', '.join(found)}"
        return {"question": question, "holds": not other, "verdict": text, "same bits": found, **more}

    def named(tile: tuple[int, ...]) -> str:
        return "x".join(map(str, tile[:3]))

    times = {named(tile): microseconds(lambda tile=tile: product(x, w, tile)) for tile in (*WGMMA, *MMA_SYNC)}
    times["cuBLAS"] = microseconds(lambda: x @ w.T)
    entries = [
        told(
            "tiles", {named(t): torch.equal(product(x, w, t), base) for t in WGMMA[1:]},
            "the order of K alone decides", "the tile changes bits", microseconds=times,
        ),
        told(
            "mma.sync", {named(t): torch.equal(product(x, w, t), base) for t in MMA_SYNC},
            "mma.sync gives wgmma's bits", "mma.sync gives other bits than wgmma",
        ),
    ]  # fmt: skip
    swapped = {named(t): torch.equal(product(w, x, t).T, base) for t in (*WGMMA[:2], (64, 16, 64, 4))}
    entries.append(told("swapped", swapped, "swapped operands give the same bits", "swapping changes bits"))
    one = product(x, w, WGMMA[0], SEGMENT)
    split = {named(t): torch.equal(product(x, w, t, SEGMENT, split=True), one) for t in (WGMMA[0], WGMMA[1])}
    entries.append(
        told(
            "segments", split, f"segments of {SEGMENT} merged in order are one program's", "splitting changes bits",
            **{"as without segments": torch.equal(one, base)},
            microseconds={"one program": microseconds(lambda: product(x, w, WGMMA[0], SEGMENT)),
                          "split": microseconds(lambda: product(x, w, WGMMA[0], SEGMENT, split=True))},
        )
    )  # fmt: skip
    alone = {str(n): torch.equal(product(x[:n].contiguous(), w, WGMMA[0]), base[:n]) for n in (1, 7, 16, 31)}
    entries.append(told("rows", alone, "a row is the same alone", "a row depends on the others"))
    return entries


# -- the answers ----------------------------------------------------------------------------------------------------


def answer(report: Report, question: str, holds: bool, verdict: str, **detail) -> None:
    report.add(what=question, holds=holds, verdict=verdict, **detail)


def triton_reason() -> str | None:
    if triton_version() is None:
        return "triton is not installed"
    return interpreter_unavailable() if DEVICE == "cpu" else None


def main() -> int:
    if "--ask" in sys.argv:
        print(json.dumps({"cublas": ask_cublas, "triton": ask_triton}[sys.argv[-1]]()))
        return 0
    options = arguments("first_device_test", __doc__).parse_args()
    report = Report("first_device_test", options.folder)
    try:
        cublas(report)
    except RuntimeError as error:
        report.skip("cublas", in_short(error))
    if triton_reason():
        report.skip("triton", triton_reason())
        return 0
    try:
        entries = ask(MODULE, "triton", environment={} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})
    except RuntimeError as error:
        report.skip("triton", in_short(error))
        return 1
    for entry in entries:
        answer(report, entry.pop("question"), entry.pop("holds"), entry.pop("verdict"), **entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
