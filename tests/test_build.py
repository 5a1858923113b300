"""The native modules as built, the folder named kernels/, and the `--benchmark` flag: what happens around a run."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from r1fast_kernels import native
from r1fast_kernels.paths import put_checkout_last
from r1fast_kernels.sample_token import philox

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, environment: dict, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter started from `cwd`, which Python then puts first on sys.path."""
    child = subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.fixture
def other_kernels(tmp_path: Path, clean_environment: dict) -> dict:
    """An environment with a distribution named `kernels` installed, like Hugging Face's: a package and its metadata."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.11.0'\nTHEIRS = True\n")
    metadata = tmp_path / "kernels-0.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    # Like site-packages, the folder comes after the entry that Python puts first; PYTHONPATH would not show the fault.
    start = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    return {"environment": clean_environment, "start": start}


def test_started_from_the_root_our_folder_shadows_theirs(other_kernels):
    """The hazard is real: without our doing, `import kernels` finds the wrong folder. If this fails, drop the cure."""
    code = other_kernels["start"] + "import kernels; print(hasattr(kernels, 'THEIRS'))"
    assert python(code, other_kernels["environment"]) == "False"


@pytest.mark.parametrize("ours", ["r1fast", "r1fast_kernels"])
def test_started_from_the_root_theirs_is_imported(other_kernels, ours):
    code = other_kernels["start"] + (
        f"import {ours}, kernels, r1fast_kernels\n"
        "print(kernels.THEIRS, kernels.__version__, 'kernels' in r1fast_kernels.__file__)"
    )
    assert python(code, other_kernels["environment"]) == "True 0.11.0 True"


def test_importing_the_packages_needs_no_torch(clean_environment):
    code = "import sys, r1fast, r1fast_kernels; print('torch' in sys.modules)"
    assert python(code, clean_environment) == "False"


def test_the_checkout_moves_last_and_nothing_else_moves(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["first", str(ROOT), "second"])
    put_checkout_last()
    put_checkout_last()
    assert sys.path == ["first", "second", str(ROOT)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", "second"])
    put_checkout_last()
    assert sys.path == ["second", ""]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "second"])
    put_checkout_last()
    assert sys.path == ["", "second"]


def test_the_cpu_module_is_built():
    """An install without it would be a silent loss of speed: setup.py fails instead."""
    assert native.cpu_unavailable() is None
    assert native.cpu().isa in ("generic", "x86_64_v3", "x86_64_v4", "x86_64_amx")


def test_both_modules_share_torch_threads(clean_environment):
    """One libgomp in the process; two would each start a team of threads and fight for the cores."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import torch, r1fast_kernels._cpu\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "print(len(maps))"
    )
    assert python(code, clean_environment) == "1"


def test_the_cuda_module_imports_without_a_driver():
    if native.cuda_unavailable() and "not built" in native.cuda_unavailable():
        pytest.skip(native.cuda_unavailable())
    if torch.cuda.is_available():
        pytest.skip("a driver is there")
    with pytest.raises(RuntimeError, match=r"group_advantage: .*(driver|device)"):
        native.cuda().group_advantage(0, 0, 1, 1, True, 0.0, 0)


def load_setup():
    spec = importlib.util.spec_from_file_location("r1fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def builder(tmp_path: Path, monkeypatch):
    """setup.py's build command with somewhere to write, and its module."""
    from setuptools import Distribution, Extension

    monkeypatch.chdir(ROOT)
    setup = load_setup()
    command = setup.BuildNative(Distribution())
    command.build_temp, command.build_lib, command.inplace = str(tmp_path / "temp"), str(tmp_path / "lib"), False
    return setup, command, Extension("r1fast_kernels._cuda", [], optional=True)


def test_without_nvcc_the_build_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    setup, command, extension = builder(tmp_path, monkeypatch)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    command.build_extension(extension)
    assert capsys.readouterr().out == "r1fast: nvcc not found; the CUDA kernels are skipped\n"


def test_a_failing_nvcc_is_said_in_one_line_and_a_failing_compiler_is_an_error(tmp_path, monkeypatch, capsys):
    from setuptools import Extension

    setup, command, extension = builder(tmp_path, monkeypatch)
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/bin/false")
    monkeypatch.setenv("CXX", "true")
    command.build_extension(extension)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("r1fast:")]
    assert said == ["r1fast: the CUDA kernels could not be built and are skipped: false ended with status 1"]

    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.CalledProcessError):
        command.build_extension(Extension("r1fast_kernels._cpu", []))


def test_no_instruction_set_leaks_into_another():
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for every CPU."""
    nm = subprocess.run(["nm", "-C", native.cpu().__file__], capture_output=True, text=True)
    if nm.returncode:
        pytest.skip("nm is not installed")
    symbols = [line.split(maxsplit=2)[-1] for line in nm.stdout.splitlines() if " r1::" in line]
    # without what the bindings name
    symbols = [name for name in symbols if "pybind11" not in name and not name.startswith("typeinfo")]
    assert any("r1::generic::" in symbol for symbol in symbols)
    spaces = ("r1::generic::", "r1::x86_64_v3::", "r1::x86_64_v4::", "r1::(anonymous namespace)::")
    assert not [symbol for symbol in symbols if not any(space in symbol for space in spaces)]


def assembly(source: str, contract: str, folder: Path) -> str:
    """Of a file of csrc/cpu for x86-64-v3. At -O1, for the test's time: the pass that fuses runs there too."""
    setup, to = load_setup(), folder / f"{source}.{contract}.s"
    flags = [*setup.CXX_FLAGS, *setup.MATH_FLAGS, "-O1", "-fexpensive-optimizations", "-fopenmp", "-march=x86-64-v3"]
    flags += ["-DR1_ISA=x86_64_v3", f"-ffp-contract={contract}", "-S", f"csrc/cpu/{source}.cpp", "-o", str(to)]
    subprocess.run(["g++", *flags], cwd=ROOT, check=True)
    return to.read_text()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="compiles for x86-64 with GCC")
@pytest.mark.parametrize("source", ["gemm", "linear", "paged_attention", "qkv_rope", "rms_norm", "rope"])
def test_bits_that_paths_share_do_not_rest_on_what_the_compiler_fuses(source, tmp_path):
    """One row and several, or one op and two fused into one, promise the same bits. Were a product and a sum fused
    where the compiler sees fit, it could do so in one path and not in the other, as it did under sanitizers."""
    with ThreadPoolExecutor(2) as pool:
        fused, apart = pool.map(lambda contract: assembly(source, contract, tmp_path), ("fast", "off"))
    assert fused == apart and "vfmadd" in fused


# Known answers published with Random123 (kat_vectors, philox4x32 10): counter, key, words.
RANDOM123 = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def native_philox(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 [N, 4] and [N, 2] of 32-bit values -> int64 [N, 4], from csrc/common/philox.h."""
    counters, keys = (t.to(torch.uint32).contiguous() for t in (counters, keys))
    out = torch.empty_like(counters)
    native.cpu().philox_words(counters.data_ptr(), keys.data_ptr(), out.data_ptr(), len(counters))
    return out.to(torch.int64)


def reference_philox(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    even, odd = philox(counters[:, ::2].T, counters[:, 1::2].T, keys.T)
    return torch.stack((even[0], odd[0], even[1], odd[1]), 1)


def test_philox_gives_the_published_words():
    counters, keys, words = (torch.tensor(column) for column in zip(*RANDOM123, strict=True))
    assert torch.equal(native_philox(counters, keys), words)
    assert torch.equal(reference_philox(counters, keys), words)


def test_philox_in_c_is_philox_in_torch():
    counters, keys = torch.randint(0, 1 << 32, (1000, 4)), torch.randint(0, 1 << 32, (1000, 2))
    assert torch.equal(native_philox(counters, keys), reference_philox(counters, keys))


def collected(arguments: list[str], environment: dict) -> set[str]:
    """The files that pytest would run tests of."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments]
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    return {line.split("::")[0] for line in child.stdout.splitlines() if "::" in line}


@pytest.mark.long(20)
def test_the_flag_selects_benchmarks_and_leaves_the_tests_out(clean_environment):
    found = collected(["--benchmark"], clean_environment)
    assert found and all(name.startswith("benchmarks/") for name in found)
    assert collected(["--benchmark", "--benchmark-disable-gc", "."], clean_environment) == found
    assert collected(["--benchmark-only", "benchmarks/"], clean_environment) == found


def test_without_the_flag_no_benchmark_runs(clean_environment):
    only_here = ["--ignore=tests", "--benchmark-skip"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", ".", *only_here]
    child = subprocess.run(command, env=clean_environment, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 5, child.stdout  # nothing collected


@pytest.mark.parametrize(("longs", "shorts", "workers"), [(3, 17, 2), (5, 3, 4), (0, 5, 2), (4, 0, 3)])
def test_each_worker_begins_with_its_share_of_the_long_tests(longs, shorts, workers):
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    long, others = [f"long{i}" for i in range(longs)], [f"short{i}" for i in range(shorts)]
    order = module.first_for_each(long, others, workers)
    assert sorted(order) == sorted(long + others) and [x for x in order if x in others] == others
    for worker in range(workers):
        begins = len(order) * worker // workers  # as xdist cuts it
        own = long[worker::workers]
        if shorts >= longs:
            assert order[begins : begins + len(own)] == own


def test_a_module_older_than_the_sources_says_so():
    with pytest.raises(AttributeError, match=r"_cpu has no 'tomorrows_kernel'.*pip install -e"):
        native.cpu().tomorrows_kernel(1)
