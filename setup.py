"""Builds csrc/: the CPU module always, the CUDA module when nvcc is found.

pybind11 and raw pointers, no torch headers: it works with pip's build isolation and with any torch.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
# csrc/cpu is compiled once per instruction set, and the module chooses at import: it runs on any x86-64.
ISAS = {"generic": []}
if X86:
    ISAS |= {"x86_64_v3": ["-march=x86-64-v3"], "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall"]
# Products and sums may be fused; NaN and infinity keep their meaning. -Wno-psabi: no vector is passed between files.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
# sm_90a for the instructions that only Hopper has; sm_80 runs on every Ampere and Ada card.
CUDA_ARCHITECTURES = [
    f"-gencode=arch=compute_{arch},code={code}"
    for arch, code in (("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90"))
]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes if home)), None) or shutil.which(
        "nvcc"
    )


class BuildNative(build_ext):
    """Compiles both modules with the compilers' own command lines: two languages, several flags for one source."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        jobs = [
            (CSRC / "cpu_bindings.cpp", "cpu_bindings.o", ["-O2", *self.includes(), *(["-DR1_X86"] if X86 else [])])
        ]
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for isa, march in ISAS.items():
                flags = [*MATH_FLAGS, *OPENMP, *march, f"-DR1_ISA={isa}"]
                jobs.append((source, f"{source.stem}.{isa}.o", flags))
        objects = self.compile([([*self.cxx(), *CXX_FLAGS], *job) for job in jobs])
        self.link(ext, objects, OPENMP)

    def build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            print("r1fast: nvcc not found; the CUDA kernels are skipped", flush=True)
            return
        cuda = [nvcc, "-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC", *CUDA_ARCHITECTURES]
        cxx = [*self.cxx(), *CXX_FLAGS]
        try:
            objects = self.compile(
                [(cxx, CSRC / "cuda_bindings.cpp", "cuda_bindings.o", ["-O2", *self.includes()])]
                + [(cuda, source, f"{source.stem}.cu.o", []) for source in sorted((CSRC / "cuda").glob("*.cu"))]
            )
            libraries = Path(nvcc).resolve().parent.parent / "lib64"
            self.link(ext, objects, [f"-L{libraries}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"])
        except subprocess.CalledProcessError as error:
            why = f"{Path(error.cmd[0]).name} ended with status {error.returncode}"
            print(f"r1fast: the CUDA kernels could not be built and are skipped: {why}", flush=True)

    def cxx(self) -> list[str]:
        return os.environ.get("CXX", "c++").split()

    def includes(self) -> list[str]:
        import sysconfig

        import pybind11

        return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile(self, jobs: list[tuple]) -> list[str]:
        """Run jobs (compiler, source, object name, flags) on all cores; CalledProcessError on the first failure."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def run(job: tuple) -> str:
            compiler, source, name, flags = job
            command = [*compiler, *flags, "-c", str(source), "-o", str(folder / name)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            return str(folder / name)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(run, jobs))

    def link(self, ext: Extension, objects: list[str], flags: list[str]) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        # A running process may have the old module mapped: write beside it, then put the new one in its place.
        fresh = target.with_name(target.name + ".new")
        subprocess.run([*self.cxx(), *shared, *objects, *flags, "-o", str(fresh)], check=True)
        fresh.replace(target)


if __name__ == "__main__":  # tests import this file to read what it would do
    setup(
        packages=[*find_packages(include=["r1fast", "r1fast.*"]), "r1fast_kernels"],
        package_dir={"r1fast_kernels": "kernels"},
        package_data={"r1fast": ["recipes/*.yaml", "report/*.css", "report/*.js"]},
        ext_modules=[Extension("r1fast_kernels._cpu", []), Extension("r1fast_kernels._cuda", [], optional=True)],
        cmdclass={"build_ext": BuildNative},
    )
