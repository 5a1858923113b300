"""A pytest plugin under which the `cuda` backends run on CPU tensors: csrc/cuda compiled by the host's C++ compiler.

`python -m pytest -p emulated_cuda.plugin tests/test_kernels.py -k cuda-cpu` with tests/ on PYTHONPATH and the folder to
build in as R1FAST_EMULATED_CUDA; tests/test_cuda_source.py does that. cuda_runtime.h beside this says what it proves.
"""

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import torch

from r1fast_kernels import native, op

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def build(folder: Path) -> Path:
    """Compile the kernels and their bindings; returns the module's file, built before or not."""
    module = folder / "_cuda.so"
    if module.exists():
        return module
    compiler = os.environ.get("CXX", "c++").split()  # it may be "ccache c++"
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a trap, and no library, ends the process
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = []
    for source in [CSRC / "cuda_bindings.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]:
        objects.append(str(folder / f"{source.stem}.o"))
        language = ["-x", "c++", "-include", str(HERE / "cuda_runtime.h")] if source.suffix == ".cu" else includes
        subprocess.run([*compiler, *flags, *language, "-c", str(source), "-o", objects[-1]], check=True)
    fresh = folder / "_cuda.so.new"
    subprocess.run([*compiler, "-shared", *objects, "-o", str(fresh)], check=True)
    return fresh.replace(module)


def load(file: Path):
    spec = importlib.util.spec_from_file_location("r1fast_kernels._cuda", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EMULATED = load(build(Path(os.environ["R1FAST_EMULATED_CUDA"])))


def launch(device: torch.device, name: str, *arguments) -> None:
    assert device.type == "cpu"
    getattr(EMULATED, name)(*arguments, 0)


native.cuda = lambda: EMULATED
native.cuda_unavailable = lambda: None
native.launch = launch
op.LIVES_ON["cuda"] = "cpu"
