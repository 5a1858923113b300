"""Every registered op, every backend that runs here: against the reference in float64, forward and backward.

An op gets all of this by being registered. The comparison itself is tested: zeros, shifted and unwritten results must
fail it. Triton kernels run under its interpreter in a process of their own (the last tests), where this same file runs.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from huge import on_linux, untouched
from torch import Tensor

import r1fast_kernels
from r1fast_kernels.op import LIVES_ON, Case, Op, Tolerance
from r1fast_kernels.triton_support import interpreted, interpreter_unavailable, triton_version

OPS = r1fast_kernels.load_ops()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RUNS_ON = {"reference": DEVICES, "triton": ["cpu" if interpreted() else "cuda"]}
RUNS_ON |= {name: [device] for name, device in LIVES_ON.items()}
EMULATED = LIVES_ON["cuda"] == "cpu"  # tests/emulated_cuda: this process runs the CUDA kernels on the CPU, slowly


def here() -> list[tuple[str, str, str]]:
    """(op, backend, device) for all that runs in this process."""
    found = []
    for op in OPS.values():
        for backend in op.backends:
            if op.reason(backend) is None:
                found += [(op.name, backend, device) for device in RUNS_ON[backend] if device in DEVICES]
    return found


@cache
def refuses(name: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a backend takes no small case of a dtype: the model-sized ones then need not be made to be refused."""
    op = OPS[name]
    return all(op.refusal(backend, c.make(device, dtype, 0)) for c in op.cases() if c.size != "model")


def runs(small: bool = False, gradient: bool = False, layout: bool = False, only: str | None = None):
    """One parameter per op, backend, device, dtype and case; `small`: no model sizes; `gradient`: ops with one;
    `layout`: of what the binding does, not the kernel, so that the interpreter is only asked for tiny sizes;
    `only`: that size."""
    parameters = []
    for name, backend, device in here():
        if gradient and not OPS[name].gradients:
            continue
        for dtype in OPS[name].tolerances:
            for case in OPS[name].cases():
                # bf16 products return garbage under the interpreter; model-sized cases would take it minutes
                slow = case.size == "model" and (small or interpreted() or EMULATED or backend == "reference")
                slow = slow or (layout and interpreted() and case.size != "tiny") or only not in (None, case.size)
                slow = slow or (case.size == "model" and refuses(name, backend, device, dtype))
                if slow or (interpreted() and dtype is torch.bfloat16):
                    continue
                label = f"{name}-{backend}-{device}-{str(dtype)[6:]}-{case.size}-{case.name}".replace(" ", "_")
                parameters.append(pytest.param(OPS[name], backend, device, dtype, case, id=label))
    return pytest.mark.parametrize(("op", "backend", "device", "dtype", "case"), parameters)


each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def copies(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def in_double(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def skip_refused(op: Op, args: tuple, backend: str) -> None:
    """Skip, saying why, when the backend refuses this case: before the reference is computed, which takes longest."""
    refusal = op.refusal(backend, args)
    if refusal is not None:
        pytest.skip(refusal)


def results(op: Op, args: tuple, backend: str) -> list[Tensor]:
    """What an op returns and what it writes, as one list."""
    skip_refused(op, args, backend)
    returned = op(*args, backend=backend)
    returned = [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
    return returned + [args[i] for i in op.mutates]


def gradients(op: Op, args: tuple, backend: str) -> list[Tensor]:
    """Gradients of a fixed random weighting of the outputs, for each tensor among `op.gradients`."""
    args = list(copies(args))
    leaves = []
    for i in op.gradients:
        if args[i] is not None:
            args[i] = args[i].detach().requires_grad_()
            leaves.append(args[i])
    found = results(op, tuple(args), backend)
    total = 0.0
    for i in op.outputs_with_gradient:
        if i >= len(found):  # rms_norm returns its residual sum only where a residual is given
            continue
        weight = torch.randn(found[i].shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        total = total + (found[i].double() * weight.to(found[i].device)).sum()
    return list(torch.autograd.grad(total, leaves))


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: Tolerance) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"result {i}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if e.is_floating_point():
            error = (a.double() - e.double()).abs()
            allowed = tolerance.atol + tolerance.rtol * e.double().abs()
            same = (a == e) | (a.isnan() & e.isnan())  # infinities, and NaN only where it is expected
            wrong = ~((error <= allowed) | same)
        else:
            error, wrong = (a - e).abs().double(), a != e
        assert not wrong.any(), (
            f"result {i}: {int(wrong.sum())} of {a.numel()} are off, by up to {error[wrong].max().item():.3g}; "
            f"allowed is {tolerance.atol} + {tolerance.rtol} * |expected| ({tolerance.reason})"
        )


def passes(actual: list[Tensor], expected: list[Tensor], tolerance: Tolerance) -> bool:
    try:
        compare(actual, expected, tolerance)
    except AssertionError:
        return False
    return True


@runs()
def test_forward(op: Op, backend: str, device: str, dtype: torch.dtype, case: Case):
    args = case.make(device, dtype, 1)
    skip_refused(op, args, backend)
    expected = results(op, in_double(copies(args)), "reference")
    compare(results(op, args, backend), expected, op.tolerances[dtype])


@runs(gradient=True)
def test_backward(op: Op, backend: str, device: str, dtype: torch.dtype, case: Case):
    args = case.make(device, dtype, 2)
    skip_refused(op, args, backend)
    expected = gradients(op, in_double(args), "reference")
    assert all(e.abs().sum() > 0 for e in expected if e.numel())
    compare(gradients(op, args, backend), expected, (op.gradient_tolerances or op.tolerances)[dtype])


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the elements of every dimension but none between equal ones of size 1."""
    wide = tensor.new_zeros([2 * n for n in tensor.shape])
    view = wide[tuple(slice(0, 2 * n, 2) for n in tensor.shape)]
    return view.copy_(tensor)


@runs(small=True, layout=True)
def test_input_with_gaps(op: Op, backend: str, device: str, dtype: torch.dtype, case: Case):
    """Non-contiguous tensors give the same, or are refused in so many words."""
    args = case.make(device, dtype, 3)
    skip_refused(op, args, backend)
    expected = results(op, in_double(copies(args)), "reference")
    for i, value in enumerate(args):
        if not isinstance(value, Tensor) or i in op.mutates or value.dim() == 0 or value.numel() < 2:
            continue
        gapped = (*copies(args[:i]), strided(value), *copies(args[i + 1 :]))
        try:
            found = results(op, gapped, backend)
        except ValueError as error:
            assert "contiguous" in str(error), f"argument {i}: {error}"
            continue
        compare(found, expected, op.tolerances[dtype])


def far_apart(tensor: Tensor) -> Tensor:
    """The same values in rows of which the last lies beyond 2^31 elements. Only their own pages are ever there."""
    step = (1 << 31) // (len(tensor) - 1) + 64
    base = untouched(step * (len(tensor) - 1) + tensor[0].numel(), tensor.dtype)
    return base.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride())).copy_(tensor)


@on_linux
@runs(only="tiny")
def test_rows_beyond_two_to_the_31_elements(op: Op, backend: str, device: str, dtype: torch.dtype, case: Case):
    """One far argument at a time; what an op writes into too. (On a GPU: tests/test_large_offsets.py.)"""
    if device != "cpu":
        pytest.skip("the memory of a GPU is all there")
    args = case.make(device, dtype, 6)
    skip_refused(op, args, backend)
    expected = results(op, in_double(copies(args)), "reference")
    for i, value in enumerate(args):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0 or len(value) < 2:
            continue
        try:
            found = results(op, (*copies(args[:i]), far_apart(value), *copies(args[i + 1 :])), backend)
        except ValueError as error:
            assert "contiguous" in str(error), f"argument {i}: {error}"
            continue
        compare(found, expected, op.tolerances[dtype])


@runs(small=True)
def test_twice_is_the_same_bit_for_bit_and_all_is_written(op, backend, device, dtype, case):
    """The second run starts on memory full of NaN, so whatever a kernel leaves unwritten differs."""
    args = case.make(device, dtype, 4)
    first = [r.detach().clone() for r in results(op, copies(args), backend)]
    differentiate = op.gradients and op.backends[backend].deterministic
    first_gradients = gradients(op, args, backend) if differentiate else []
    torch.use_deterministic_algorithms(True, warn_only=True)  # its fill_uninitialized_memory is on by default
    try:
        assert torch.empty(3).isnan().all()
        second = results(op, copies(args), backend)
        second_gradients = gradients(op, args, backend) if differentiate else []
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first + first_gradients, list(second) + second_gradients, strict=True):
        assert torch.equal(a, b.detach()) or torch.equal(a.nan_to_num(), b.detach().nan_to_num())


def mutations(expected: Tensor) -> dict[str, Tensor]:
    """Wrong results that a comparison must not accept; a shift says nothing about a single or constant number."""
    if expected.numel() == 0:
        return {}
    poison = float("nan") if expected.is_floating_point() else torch.iinfo(expected.dtype).max
    wrong = {"zeros": torch.zeros_like(expected), "unwritten": torch.full_like(expected, poison)}
    if expected.numel() > 1 and expected.unique().numel() > 1:
        wrong["shifted"] = expected.flatten().roll(1).view_as(expected)
        last = expected.clone().flatten()
        last[-1] = poison
        wrong["last element unwritten"] = last.view_as(expected)
    return wrong


@each_op
@pytest.mark.parametrize("size", ["tiny", "ragged"])
def test_the_comparison_refuses_wrong_results(op: Op, size: str):
    """For the first result in every case, and for every other result and gradient in at least one."""
    for dtype, tolerance in op.tolerances.items():
        caught: dict[tuple, bool] = {}
        for case in op.cases():
            if case.size != size:
                continue
            args = case.make("cpu", dtype, 5)
            kinds = [("result", results(op, copies(args), "reference"), tolerance)]
            if op.gradients:
                allowed = (op.gradient_tolerances or op.tolerances)[dtype]
                kinds.append(("gradient", gradients(op, args, "reference"), allowed))
            for kind, expected, allowed in kinds:
                assert passes(expected, expected, allowed)
                for i, right in enumerate(expected):
                    for name, wrong in mutations(right.detach()).items():
                        refused = not passes([*expected[:i], wrong, *expected[i + 1 :]], expected, allowed)
                        if i == 0 and kind == "result":
                            assert refused, f"{case.name}, {dtype}: {name} pass as a result"
                        caught[kind, i, name] = refused or caught.get((kind, i, name), False)
        missed = [key for key, refused in caught.items() if not refused]
        assert caught and not missed, f"{dtype}: these pass in every case: {missed}"


@each_op
def test_bad_input_raises(op: Op):
    wrong = list(op.invalid())
    assert wrong, "the op names no bad input"
    for what, args in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            op(*args)
        assert len(str(caught.value)) > 20 and op.name in str(caught.value), what


@each_op
def test_the_description_is_complete(op: Op):
    assert {case.size for case in op.cases()} == {"tiny", "ragged", "model"}
    assert all(len(tolerance.reason) > 10 for tolerance in op.tolerances.values())
    args = next(case for case in op.cases() if case.size == "tiny").make("cpu", torch.float32, 0)
    assert op.flops(*args) >= 0 and op.bytes(*args) > 0
    assert getattr(r1fast_kernels, op.name).__doc__


def test_every_public_op_is_registered():
    assert set(OPS) == set(r1fast_kernels.OP_MODULES)


needs_triton = pytest.mark.skipif(triton_version() is None, reason="triton is not installed")
once = pytest.mark.skipif(interpreted(), reason="this is the child process")


@pytest.mark.long(150)
@once
@pytest.mark.skipif(bool(interpreter_unavailable()), reason=str(interpreter_unavailable()))
def test_triton_kernels_under_the_interpreter(clean_environment):
    files = [__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in ("paged", "paged_groups"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "triton-cpu"]
    environment = {**clean_environment, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) >= 10


@pytest.mark.long(170)
@once
@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_kernels_compile_without_spills(architecture: int, clean_environment):
    """Every launch of every case, compiled for a card that need not be here; the assembler reports spilled bytes.

    No product of two sizes makes an address in 32 bits either, so rows beyond 2^31 elements are found.
    """
    command = [sys.executable, str(Path(__file__).with_name("triton_compile.py")), str(architecture)]
    child = subprocess.run(command, env=clean_environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-4000:]
    form = r"^(\S+) (\S+): (\d+) registers, (\d+) bytes spilled, \d+ bytes shared, (\d+) narrow products"
    lines = re.findall(form, child.stdout, re.MULTILINE)
    with_triton = {name for name, op in OPS.items() if "triton" in op.backends}
    assert with_triton <= {op for op, *_ in lines} and with_triton, child.stdout
    assert not [line for line in lines if int(line[3]) or int(line[4])]


@needs_triton
def test_a_narrow_product_in_an_address_is_found():
    """Triton's own text of a kernel that reads row * width + column: the product taken in 32 bits, and in 64."""
    from triton_compile import narrow_products

    text = """
    %c16_i32 = arith.constant 16 : i32 loc(#loc1)
    %row = tt.get_program_id x : i32 loc(#loc2)
    %tile = arith.muli %row, %c16_i32 : i32 loc(#loc3)
    %column = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc4)
    %start = arith.muli %row, %width : i32 loc(#loc5)
    %start_0 = tt.splat %start : i32 -> tensor<16xi32> loc(#loc5)
    %tile_1 = tt.splat %tile : i32 -> tensor<16xi32> loc(#loc5)
    %place = arith.addi %start_0, %tile_1 : tensor<16xi32> loc(#loc5)
    %place_2 = arith.addi %place, %column : tensor<16xi32> loc(#loc5)
    %x_3 = tt.splat %x : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>> loc(#loc6)
    %x_4 = tt.addptr %x_3, %place_2 : tensor<16x!tt.ptr<f32>>, tensor<16xi32> loc(#loc6)
    """
    assert narrow_products(text) == ["%start"]
    wide = text.replace("muli %row, %width : i32", "muli %row, %width : i64")
    assert narrow_products(wide) == []


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param("generic", marks=pytest.mark.long(12)),
        pytest.param("x86_64_v3", marks=pytest.mark.long(45)),
        "x86_64_v4",
        "x86_64_amx",
    ],
)
def test_each_instruction_set_of_the_cpu_module(isa: str, clean_environment):
    """The module picks the best at import; the others must be right too, as older machines use them."""
    from r1fast_kernels import native

    if native.cpu_unavailable() or interpreted():
        pytest.skip(native.cpu_unavailable() or "the parent process runs it")
    environment = {**clean_environment, "R1FAST_CPU_ISA": isa}
    probe = "import torch, r1fast_kernels._cpu as m; print(m.isa)"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if found.returncode:
        assert "no such instruction set" in found.stderr
        pytest.skip(f"this CPU has no {isa}")
    assert found.stdout.strip() == isa
    if isa == native.cpu().isa:
        return  # what the tests above ran on
    # Model sizes in float32 alone: bfloat16 differs in how a vector is read, which the small sizes have with all edges.
    # And not without SIMD, where they take four fifths of the time.
    select = f"cpu-cpu and forward and (not model{' or float32' * (isa != 'generic')})"
    if (isa, native.cpu().isa) == ("x86_64_v4", "x86_64_amx"):
        select += " and linear"  # in all else the two are one
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", select]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert child.returncode == 0, child.stdout[-4000:]
    assert os.environ.get("R1FAST_CPU_ISA") != isa and " passed" in child.stdout
