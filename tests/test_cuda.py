"""The CUDA kernels beyond the registry's cases: edges, every instantiation, independence of the batch, thread order.

They run on a GPU; without one, test_the_kernels_compiled_for_the_cpu runs them and the registry's tests in a process
where csrc/cuda is compiled by the C++ compiler and each thread is a fiber (tests/emulated_cuda). What nvcc makes of
them is held to use no stack: a spilled register would be there.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from r1fast_kernels import OPS, grpo_loss, native, paged_append, paged_attention, sample_token
from r1fast_kernels.op import LIVES_ON
from r1fast_kernels.paged_groups import find_groups, positions_read
from r1fast_kernels.sample_token import reference as sample_reference

TESTS = Path(__file__).parent
ON = LIVES_ON["cuda"]
EMULATED = ON == "cpu"
on_cuda = pytest.mark.skipif(bool(native.cuda_unavailable()), reason=str(native.cuda_unavailable()))


def paged(contexts, block, heads, kv_heads, width, dtype=torch.float32, columns=0):
    """q, caches, tables and contexts on the device, random; the tables' tails name blocks that do not exist."""
    used = [-(-n // block) for n in contexts]
    order = torch.randperm(sum(used) + 2).int()
    table = torch.full((len(contexts), max(columns, max(used) + 1)), 1 << 30, dtype=torch.int32)
    for i, n in enumerate(used):
        table[i, :n] = order[sum(used[:i]) : sum(used[: i + 1])]
    q = torch.randn(len(contexts), heads, width).to(ON, dtype)
    k, v = torch.randn(2, sum(used) + 2, block, kv_heads, width).to(ON, dtype)
    return q, k, v, table.to(ON), torch.tensor(contexts, dtype=torch.int32, device=ON)


@on_cuda
@pytest.mark.parametrize("width", [8, 64, 72, 128, 200, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (5, 1), (16, 2), (11, 1)])
def test_every_head_size_and_group(width, heads, kv_heads):
    args = paged([5, 40], 16, heads, kv_heads, width)
    found = paged_attention(*args, backend="cuda")
    assert torch.allclose(found, paged_attention(*args, backend="reference"), rtol=1e-5, atol=2e-6)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_splits_and_their_merge(dtype):
    """Contexts on both sides of the splits' edges; odd blocks, so that a split begins inside of one."""
    contexts = [255, 256, 257, 511, 513, 700, 1]
    args = paged(contexts, 13, 6, 2, 40, dtype)
    found = paged_attention(*args, scale=0.4, backend="cuda")
    exact = [a.double() if a.is_floating_point() else a for a in args]
    expected = paged_attention(*exact, scale=0.4, backend="reference")
    error = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # half an ulp of the result
    assert torch.allclose(found.double(), expected, rtol=error, atol=2e-6)


@on_cuda
def test_a_sequence_is_the_same_bits_alone_and_in_a_batch():
    q, k, v, table, lens = paged([300, 20, 513], 16, 4, 2, 64, torch.bfloat16)
    together = paged_attention(q, k, v, table, lens, backend="cuda")
    for i, columns in ((0, 19), (1, 2), (2, 33)):  # a table that holds one split goes without the merge
        one = slice(i, i + 1)
        alone = paged_attention(q[one], k, v, table[one, :columns], lens[one], backend="cuda")
        assert torch.equal(alone, together[one])


@on_cuda
@pytest.mark.parametrize("columns", [3, 40])
def test_nothing_outside_the_cache_is_read(columns):
    q, k, v, table, lens = paged([20, 30, 40, 33], 16, 4, 2, 64, columns=columns)
    expected = paged_attention(q, k, v, table, lens, backend="reference")
    table[1, 1], table[3, 0], lens[2] = len(k), -5, columns * 16 + 1
    found = paged_attention(q, k, v, table, lens, backend="cuda")
    assert torch.allclose(found[0], expected[0], atol=2e-6) and found[1:].isnan().all()
    lens[0] = 0
    assert paged_attention(q, k, v, table, lens, backend="cuda").isnan().all()


def grouped(contexts, shared, block, heads, kv_heads, width, dtype):
    """`paged`, and groups: row i has its first `shared[i]` blocks from the row before it."""
    q, k, v, table, lens = paged(contexts, block, heads, kv_heads, width, dtype)
    for i, same in enumerate(shared):
        table[i, :same] = table[i - 1, :same]
    return q, k, v, table, lens, None, None, find_groups(table, block)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "width"), [(3, 130, 1, 8), (11, 24, 2, 40), (3, 70, 1, 136), (18, 8, 1, 128)]
)
def test_more_rows_than_a_block_has(rows, heads, kv_heads, width, dtype):
    """A key head of more query heads than a block's 128 rows (64 of wide heads), and groups that need two blocks."""
    args = grouped([259 + i for i in range(rows)], [0, *[16] * (rows - 1)], 16, heads, kv_heads, width, dtype)
    assert args[-1][0].tolist() == [0] * rows
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args[:-1]]
    allowed = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    expected = paged_attention(*exact, backend="reference")
    assert torch.allclose(paged_attention(*args, backend="cuda").double(), expected, rtol=allowed, atol=allowed)


@on_cuda
@pytest.mark.parametrize("width", [64, 256])
def test_one_piece_of_a_group_is_the_same_bits_with_and_without_the_merge(width):
    args = grouped([200, 210, 256], [0, 12, 12], 16, 4, 2, width, torch.bfloat16)
    q, k, v, table, lens, *_ = args
    wide = torch.nn.functional.pad(table, (0, 20), value=-1)
    found = paged_attention(q, k, v, wide, lens, groups=find_groups(wide, 16), backend="cuda")
    narrow = table[:, :16].contiguous()
    assert torch.equal(found, paged_attention(q, k, v, narrow, lens, groups=find_groups(narrow, 16), backend="cuda"))


@on_cuda
def test_queries_of_a_group_may_lie_anywhere():
    """Rows of a joint projection that do not begin at 16 bytes."""
    q, *rest = grouped([300, 290, 270], [0, 16, 16], 16, 6, 2, 40, torch.float16)
    joint = torch.zeros(3, 1 + 6 * 40 + 2, dtype=torch.float16, device=ON)
    joint[:, 1:241] = q.flatten(1)
    moved = joint[:, 1:241].unflatten(1, (6, 40))
    assert moved.data_ptr() % 16 and moved.stride(0) % 8
    assert torch.equal(paged_attention(moved, *rest, backend="cuda"), paged_attention(q, *rest, backend="cuda"))


@pytest.mark.skipif(not EMULATED, reason="the emulation counts the bytes")
@pytest.mark.parametrize("width", [64, 200])
def test_a_piece_is_read_once_for_its_group(width):
    """Of 8 rows of 3 heads: what they read with and without the groups, in bytes of keys and values."""
    counted = ctypes.CDLL(native.cuda().__file__).emulated_bytes_copied
    counted.restype = ctypes.c_int64
    args = grouped([515, 516, 300, 520, 257, 260, 100, 530], [0, 32, 16, 16, 0, 16, 0, 0], 16, 3, 1, width, torch.half)
    *same, groups = args
    own = torch.arange(8, dtype=torch.int32).expand(groups.shape).contiguous()
    for asked in (groups, own):
        before = counted()
        paged_attention(*same, asked, backend="cuda")
        assert counted() - before == 2 * positions_read(asked, args[4]) * width * 2
    assert positions_read(groups, args[4]) == positions_read(own, args[4]) - 5 * 256


@on_cuda
def test_groups_in_float32_are_for_others():
    """Each row would read its own there; automatic goes on to who reads a piece once."""
    args = paged([300, 290], 16, 4, 2, 64)
    groups = find_groups(args[3], 16)
    slower = OPS["paged_attention"].backends["cuda"].slower
    assert "float32" in slower(*args, None, None, groups) and slower(*args, None, None, None) is None
    narrow = [a.half() if a.is_floating_point() else a for a in args]
    assert slower(*narrow, None, None, groups) is None


@on_cuda
@pytest.mark.parametrize("width", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_append_takes_parts_of_a_joint_projection_and_leaves_out_slots_outside(width, dtype):
    joint = torch.randn(4, 6, width).to(ON, dtype)
    k, v = joint[:, 2:4], joint[:, 4:6]
    k_cache, v_cache = torch.zeros(2, 3, 4, 2, width, dtype=dtype, device=ON)
    paged_append(k, v, k_cache, v_cache, torch.tensor([7, -1, 0, 12], device=ON), backend="cuda")
    expected = torch.zeros(2, 12, 2, width, dtype=dtype, device=ON)
    expected[0, [7, 0]], expected[1, [7, 0]] = k[[0, 2]], v[[0, 2]]
    assert torch.equal(torch.stack((k_cache, v_cache)).view_as(expected), expected)


def drawn(logits, temperature=1.0, top_k=0, top_p=1.0, seed=5):
    rows = torch.arange(len(logits), device=ON)
    return sample_token(logits.to(ON), seed, rows, 3 * rows, temperature, top_k, top_p, backend="cuda")


def expected_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, seed=5):
    rows = torch.arange(len(logits))
    settings = (torch.full((len(logits),), x) for x in (temperature, top_k, top_p))
    return sample_reference(logits.double().cpu(), torch.full_like(rows, seed), rows, 3 * rows, *settings)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [1, 31, 1024, 1025, 5000])
@pytest.mark.parametrize("settings", [(1.0,), (0.7, 0, 0.8), (1.3, 17), (1.0, 40, 0.5), (0.0, 3, 0.1)])
def test_tokens_are_the_references(dtype, words, settings):
    """Vocabularies on both sides of a chunk, rows that do not begin at 16 bytes, all truncations."""
    logits = (2 * torch.randn(6, words)).to(dtype)
    found, expected = drawn(logits, *settings), expected_tokens(logits, *settings)
    assert torch.equal(found.token.cpu(), expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(a.cpu().double(), b, rtol=2e-6, atol=1e-5)


@on_cuda
@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(7, 1.0, 7), (0, 0.5, 1000), (500, 0.5, 250), (0, 1e-9, 1)])
def test_ties_are_kept_in_the_order_of_their_index(top_k, top_p, kept):
    found = drawn(torch.zeros(40, 2000), 1.0, top_k, top_p)
    assert torch.allclose(found.logprob, torch.full((40,), -math.log(kept), device=ON), atol=1e-6)
    assert torch.allclose(found.logprob_full, torch.full((40,), -math.log(2000), device=ON), atol=1e-6)
    assert found.token.max() < kept and (kept == 1 or found.token.unique().numel() > min(kept, 40) // 3)


@on_cuda
def test_masked_words_are_never_drawn_and_greedy_takes_the_first():
    logits = torch.full((30, 3000), -math.inf)
    logits[:, 1500], logits[:, 2900:2903] = 1.0, 1.0
    for settings in ((1.0,), (1.0, 3), (1.0, 0, 0.9), (1e-3, 2, 0.9)):
        assert set(drawn(logits, *settings).token.tolist()) <= {1500, 2900, 2901, 2902}
    assert set(drawn(logits, 0.0).token.tolist()) == {1500}
    assert torch.allclose(drawn(logits, 0.0).logprob.cpu(), torch.tensor(0.25).log())


@on_cuda
def test_what_cannot_be_drawn_from_says_nan():
    logits = torch.randn(6, 300)
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    temperature, top_k, top_p = torch.ones(6), torch.zeros(6, dtype=torch.int32), torch.ones(6)
    temperature[3], top_k[4], top_p[5] = -1, -1, 0
    found = drawn(logits, *(x.to(ON) for x in (temperature, top_k, top_p)))
    assert not found.token.any() and found.logprob.isnan().all() and found.logprob_full.isnan().all()


@on_cuda
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", None])
def test_loss_of_any_alignment_and_extreme_ratios(offset, kind):
    logp, old, ref, advantages = torch.randn(4, 2050).to(ON)[:, offset:]
    logp[5], old[5], logp[6], old[6] = 0.0, -200.0, -200.0, 0.0  # ratios of infinity and 0
    advantages[5:7] = 1.0
    weights = torch.rand(2050, device=ON)[offset:]
    logp.requires_grad_()
    settings = (0.2, 0.3, 0.1 if kind else 0.0, kind or "k3")
    results = []
    for backend in ("cuda", "reference"):
        loss, stats = grpo_loss(
            logp, old, ref if kind else None, advantages, weights, *settings, return_stats=True, backend=backend
        )
        results.append((loss, torch.autograd.grad(loss.sum(), logp)[0], *stats))
    slope, autograd = results[0][1], results[1][1]
    assert slope[5].isfinite() and autograd[5].isnan()  # clipped away: autograd makes 0 * infinity of it
    autograd[5] = slope[5]
    for a, b in zip(*results, strict=True):
        close = torch.isclose(a, b, rtol=1e-5, atol=2e-6, equal_nan=True)
        assert close.all(), (a[~close], b[~close])


@on_cuda
def test_no_rows():
    none = torch.empty(0, device=ON)
    loss, stats = grpo_loss(none, none, none, none, none, kl_coef=0.1, return_stats=True, backend="cuda")
    assert loss.shape == (0,) and not any(float(value) for value in stats)
    assert drawn(torch.empty(0, 5)).token.shape == (0,)


@pytest.mark.skipif(not EMULATED, reason="a GPU's threads run in an order of their own")
def test_a_missing_barrier_would_show(monkeypatch):
    """Threads and blocks last to first: whoever reads what another thread has yet to write now reads something else,
    and of two that write one place the other is the last."""
    attention = paged([300, 20], 16, 6, 2, 64)
    groups = grouped([300, 290, 260, 280, 290], [0, 16, 16, 0, 16], 16, 6, 1, 128, torch.bfloat16)
    logits = torch.randn(3, 2500)
    streams = torch.randn(5, 1500)

    def everything():
        loss, stats = grpo_loss(*streams, 0.2, 0.2, 0.1, return_stats=True, backend="cuda")
        tokens = [x for settings in ((1.0,), (1.0, 9, 0.7), (0.0,)) for x in drawn(logits, *settings)]
        return [loss, *stats, *tokens, *(paged_attention(*args, backend="cuda") for args in (attention, groups))]

    forward = everything()
    monkeypatch.setenv("R1_THREAD_ORDER", "reverse")
    assert all(torch.equal(a, b) for a, b in zip(forward, everything(), strict=True))


@pytest.mark.long(85)
@pytest.mark.skipif(EMULATED, reason="this is the child process")
@pytest.mark.skipif(sys.platform != "linux", reason="the emulation is tried on Linux alone")
def test_the_kernels_compiled_for_the_cpu(tmp_path, clean_environment):
    """Every kernel, thread by thread, against the reference: the registry's cases and this file's."""
    pytest.importorskip("pybind11")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    environment = {**clean_environment, "R1FAST_EMULATED_CUDA": str(tmp_path), "PYTHONPATH": str(TESTS)}
    plugin = ["-p", "emulated_cuda.plugin", "-p", "no:cacheprovider"]
    files = [str(TESTS / f"test_{name}.py") for name in ("kernels", "paged", "paged_groups", "large_offsets")]
    select = "cuda-cpu or (test_large_offsets and cuda) or (test_cuda and not compiled)"
    command = [sys.executable, "-m", "pytest", *plugin, *files, __file__, "-k", select]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) >= 150


BUILT = "not built" not in (native.cuda_unavailable() or "")


@pytest.mark.skipif(EMULATED or not BUILT, reason="nvcc did not build the module")
def test_compiled_kernels_use_no_stack():
    """Registers that do not fit are spilled to the stack, which lies in device memory."""
    triton = find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = tool if tool and tool.exists() else shutil.which("cuobjdump")
    if not tool:
        pytest.skip("neither Triton nor CUDA brings cuobjdump")
    said = subprocess.run([tool, "-res-usage", native.cuda().__file__], capture_output=True, text=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    names = {
        name
        for kernel, *_ in kernels
        for name in ("equal_groups", "loss_rows", "sample_rows", "attend", "attend_group")
        if name in kernel
    }
    assert len(names) == 5 and {"sm_80", "sm_90a"} <= set(re.findall(r"sm_\w+", said))
    assert not [(kernel, stack, local) for kernel, _, stack, _, local in kernels if int(stack) or int(local)]
    # Products keep their sums in registers; two blocks of 128 threads are to fit all the same.
    assert all(int(registers) <= (255 if "attend_group" in kernel else 128) for kernel, registers, *_ in kernels)


@pytest.mark.skipif(EMULATED or not BUILT or torch.cuda.is_available(), reason="built, and no driver is there")
def test_a_launch_that_fails_raises_with_the_name_of_the_op():
    counts = {"grpo_loss": 15, "sample_token": 14, "paged_attention": 21, "paged_append": 12, "rope_append": 27}
    for name, sizes in counts.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: .*(driver|device)"):
            getattr(native.cuda(), name)(*[1] * sizes)
