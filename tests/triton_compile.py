"""Compiles every Triton launch of every registered op for one architecture. No GPU needed.

`triton_compile.py 90` does all of them, `triton_compile.py 90 rope swiglu` those of two ops.

Each launch is turned into Triton's warm-up, which goes through the ordinary front end (so the signature, alignment and
constants are those of a real launch) and stops before loading. Prints registers and spilled bytes, as ptxas says them.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import r1fast_kernels


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


def usage(ptx: str, architecture: int) -> tuple[int, int]:
    """(registers, spilled bytes) of one kernel."""
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", str(source), "-o", str(source) + ".cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", log)))


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


def main(architecture: int, names: list[str]) -> None:
    driver.set_active(Stub(architecture))
    launch, seen = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seen.setdefault((self.fn.__name__, kernel.hash), kernel)
        return kernel

    JITFunction.run = compile_only
    for op in r1fast_kernels.load_ops().values():
        if "triton" not in op.backends or (names and op.name not in names):
            continue
        seen.clear()
        for dtype in op.tolerances:
            if dtype is torch.float64:
                continue
            for case in op.cases():
                launch_all(op, case.make("cpu", dtype, 0))
        for (name, _), kernel in seen.items():
            registers, spilled = usage(kernel.asm["ptx"], architecture)
            shared = kernel.metadata.shared
            print(
                f"{op.name} {name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared", flush=True
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
