"""Every registered op, every backend that runs here, at model size: `pytest --benchmark`.

Next to the time, pytest-benchmark stores per row the rate reached and the ceiling of this machine measured in the same
run: GB/s against a copy, or GFLOP/s against a float32 matrix product, whichever bounds the op. Forward, and for ops
with a gradient forward and backward. Nothing is asserted on time; compare rows of one run only.
"""

import time

import pytest
import torch

from r1fast_kernels import load_ops
from r1fast_kernels.op import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run, repeats: int = 7) -> float:
    """Shortest of some runs, after one to warm up: a ceiling is what the machine can do when nothing disturbs it."""
    run()
    settle()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        settle()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.fixture(scope="session")
def ceiling() -> dict[str, float]:
    """{"GB/s": copy (read and write), "GFLOP/s": float32 product} of this machine with this run's threads."""
    source = torch.ones(1 << (28 if DEVICE == "cuda" else 24), device=DEVICE)
    target = torch.empty_like(source).zero_()
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)
    out = torch.empty_like(a).zero_()
    return {
        "GB/s": 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source)) / 1e9,
        "GFLOP/s": 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e9,
    }


def rows() -> list:
    found = []
    for op in load_ops().values():
        for case in op.cases():
            for backend in op.backends if case.size == "model" else ():
                if op.reason(backend) is not None:
                    continue
                for direction in ("forward", *(["backward"] if op.gradients else [])):
                    name = f"{op.name} {case.name} {direction}"
                    found.append(pytest.param(op, case, backend, direction, id=f"{name} [{backend}]"))
    return found


@pytest.mark.parametrize(("op", "case", "backend", "direction"), rows())
def test_op(benchmark, ceiling, op: Op, case, backend: str, direction: str):
    args = case.make(DEVICE, torch.float32, 0)
    if op.refusal(backend, args) is not None:
        pytest.skip(op.refusal(backend, args))
    run, times = forward(op, args, backend), 1
    if direction == "backward":
        run, times = forward_and_backward(op, args, backend), 3  # a backward is counted as twice the forward
    benchmark.group = f"{op.name} {case.name} {direction}"
    benchmark(run)

    spent = benchmark.stats.stats.median if benchmark.stats else float("nan")
    rates = {"GB/s": op.bytes(*args) * times / spent / 1e9, "GFLOP/s": op.flops(*args) * times / spent / 1e9}
    bound = max(rates, key=lambda unit: rates[unit] / ceiling[unit])
    for unit, rate in rates.items():
        benchmark.extra_info[unit] = round(rate, 2)
        benchmark.extra_info[f"ceiling {unit}"] = round(ceiling[unit], 1)
    benchmark.extra_info["bound"] = bound
    benchmark.extra_info["fraction of ceiling"] = round(rates[bound] / ceiling[bound], 4)
    benchmark.extra_info["threads"] = torch.get_num_threads()


def forward(op: Op, args: tuple, backend: str):
    def run():
        with torch.no_grad():
            op(*args, backend=backend)
        settle()

    return run


def forward_and_backward(op: Op, args: tuple, backend: str):
    args = tuple(a.detach().requires_grad_() if i in op.gradients and a is not None else a for i, a in enumerate(args))
    leaves = [args[i] for i in op.gradients if args[i] is not None]

    def run():
        result = op(*args, backend=backend)
        result = (result,) if isinstance(result, torch.Tensor) else result
        torch.autograd.grad(sum(result[i].sum() for i in op.outputs_with_gradient if i < len(result)), leaves)
        settle()

    return run
