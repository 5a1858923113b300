"""Compiles every Triton launch of every registered op for one architecture. No GPU needed.

`triton_compile.py 90` does all of them, `triton_compile.py 90 rope swiglu` those of two ops; with `--card` at the sizes
that benchmarks/on_gpu.sh measures (benchmarks/gpu/works.py), from which a launch's settings follow, and not the tests'.

Each launch is turned into Triton's warm-up, which goes through the ordinary front end (so the signature, alignment and
constants are those of a real launch) and stops before loading. Prints registers and spilled bytes, as ptxas says them,
and how many products of two sizes go into an address in 32 bits: such an address is wrong beyond 2^31 elements.
"""

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import r1fast_kernels

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run as a script
from benchmarks.gpu.shapes import TO_COMPILE
from benchmarks.gpu.works import Works


class Stub:
    """Stands in for the CUDA driver: says which card to compile for."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoProducts(TorchDispatchMode):
    """Leaves out the matrix products between the launches, which take longer than compiling: no launch's form depends
    on their values. What they would have written holds whatever lay there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out):
            return kwargs["out"]
        if function is torch.ops.aten.mm.default:
            a, b = args
            return a.new_empty(a.shape[0], b.shape[1])
        return function(*args, **kwargs)


def counted(log: str) -> tuple[int, int]:
    """(registers, spilled bytes) of one kernel, from what the assembler says of it."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def usage(ptx: str, architecture: int) -> tuple[int, int]:
    """(registers, spilled bytes) of one kernel, assembled for it."""
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", str(source), "-o", str(source) + ".cubin"]
        return counted(subprocess.run(command, check=True, capture_output=True, text=True).stderr)


def narrow_products(ttir: str) -> list[str]:
    """Names of the 32-bit products, of two numbers that are known only when the kernel runs, that lead to an address.

    A product with a constant (a tile's place in one dimension) stays below that dimension's size. Results of loops and
    branches are not looked behind.
    """
    made = {}
    for line in ttir.splitlines():
        found = re.match(r"\s*(%\w+) = (\S+) (.*?)(?: loc\(.*)?$", line)
        if found:
            name, made_by, rest = found.groups()
            made[name] = (made_by, re.findall(r"%\w+", rest.split(" : ")[0]), rest)
    constant = {name for name, (made_by, _, _) in made.items() if made_by == "arith.constant"}
    for name, (made_by, operands, _) in made.items():
        if made_by in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi") and set(operands) <= constant:
            constant.add(name)
    behind, todo = set(), [operands[1] for made_by, operands, _ in made.values() if made_by == "tt.addptr"]
    while todo:
        name = todo.pop()
        if name in made and name not in behind and made[name][0] not in ("tt.load", "arith.constant"):
            behind.add(name)
            todo += made[name][1]

    def narrow(name: str) -> bool:
        made_by, operands, rest = made[name]
        return (
            made_by == "arith.muli" and not set(operands) & constant and re.search(r"\bi32$|xi32>$", rest) is not None
        )

    return sorted(filter(narrow, behind))


def launch_all(op, args: tuple) -> None:
    """Every launch that an op makes of these arguments: forward, backward, and without a gradient."""
    backend = op.backends["triton"]
    for i in op.gradients:
        if args[i] is not None:
            args[i].requires_grad_()
    with torch.no_grad():
        if backend.inference is not None:
            backend.inference(*args)
        result = backend.forward(*args)
        if backend.backward is not None:
            outputs, saved = result
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            grads = tuple(torch.ones_like(outputs[i]) for i in op.outputs_with_gradient if i < len(outputs))
            backend.backward(saved, grads, (True,) * len(op.gradients))


def arguments_of(op, on_a_card: bool) -> Iterator[tuple]:
    if on_a_card:
        yield from (work.args() for work in Works(TO_COMPILE) if work.op == op.name)
        return
    for dtype in op.tolerances:
        if dtype is not torch.float64:
            yield from (case.make("cpu", dtype, 0) for case in op.cases())


def main(architecture: int, names: list[str]) -> None:
    on_a_card = "--card" in names
    names = [name for name in names if name != "--card"]
    driver.set_active(Stub(architecture))
    knobs.nvidia.dump_ptxas_log = True  # Triton assembles with -v and prints what was said
    launch, seen, logs = JITFunction.run, {}, {}

    def compile_only(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seen.setdefault((self.fn.__name__, kernel.hash), kernel)
        logs.setdefault(kernel.hash, said.getvalue())
        return kernel

    JITFunction.run = compile_only
    for op in r1fast_kernels.load_ops().values():
        if "triton" not in op.backends or (names and op.name not in names):
            continue
        seen.clear()
        for args in arguments_of(op, on_a_card):
            with NoProducts():
                launch_all(op, args)
        for (name, _), kernel in seen.items():
            log = logs[kernel.hash]  # none where the kernel came from Triton's cache
            registers, spilled = counted(log) if log else usage(kernel.asm["ptx"], architecture)
            if log and 0 < spilled <= 8:  # Triton 3.9 asks ptxas 13 for --regAllocOptLevel=2, around a fault of it
                registers, spilled = usage(kernel.asm["ptx"], architecture)
            shared, narrow = kernel.metadata.shared, narrow_products(kernel.asm["ttir"])
            print(
                f"{op.name} {name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared, "
                f"{len(narrow)} narrow products in addresses {' '.join(narrow)}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
