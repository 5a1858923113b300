"""The ops over the paged cache, beyond the registry's cases and on every backend that runs in this process: what must
hold bit for bit, and what they do with values that only the data can show to be wrong.

tests/test_kernels.py runs this file under Triton's interpreter, tests/test_cuda.py with the CUDA kernels compiled for
the CPU; on a GPU the same tests run on it.
"""

import pytest
import torch

from r1fast_kernels import OPS, native, paged_append, paged_attention, rms_norm, rope, rope_append
from r1fast_kernels.op import LIVES_ON
from r1fast_kernels.triton_support import interpreted

RUNS_ON = {**LIVES_ON, "reference": "cpu", "triton": "cpu" if interpreted() else "cuda"}
HERE = [name for name in ("reference", "cpu", "cuda", "triton") if OPS["rope_append"].reason(name) is None]
each_backend = pytest.mark.parametrize("backend", [pytest.param(b, id=f"{b}-{RUNS_ON[b]}") for b in HERE])
needs_cpu = pytest.mark.skipif(bool(native.cpu_unavailable()), reason=str(native.cpu_unavailable()))


def new_tokens(rows: int, heads: int, kv_heads: int, width: int, dtype=torch.float32, seed: int = 0, device="cpu"):
    """q, k, v as slices of a joint projection, tables and positions, empty caches and slots."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.randn(rows, heads + 2 * kv_heads, width, generator=generator).to(device, dtype)
    angle = torch.rand(50, width // 2, generator=generator)
    tables = (angle.cos().to(device), angle.sin().to(device))
    positions = torch.randint(0, 50, (rows,), generator=generator).to(device)
    caches = torch.zeros(2, rows, 4, kv_heads, width, device=device, dtype=dtype)
    slots = torch.randperm(4 * rows, generator=generator)[:rows].to(device)
    return (*joint.split((heads, kv_heads, kv_heads), 1), *tables, positions, *caches, slots)


def weights(width: int, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(9)
    return (1 + torch.rand(2, width, generator=generator)).to(device, dtype).unbind()


@needs_cpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 1, 26), (2, 2, 128)])
def test_fused_is_the_three_ops_bit_for_bit_on_the_cpu(heads, kv_heads, width, norm):
    """The learner runs norm and rotation apart, and its log-probabilities are compared with the sampler's."""
    args = new_tokens(33, heads, kv_heads, width)
    q, k, v, cos, sin, positions, k_cache, v_cache, slots = args
    norms = weights(width) if norm else (None, None)
    if norm:
        q, k = (rms_norm(x, w, 1e-5, backend="cpu") for x, w in zip((q, k), norms, strict=True))
    q, k = rope(q, k, cos, sin, positions, backend="cpu")
    caches = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    paged_append(k, v, *caches, slots, backend="cpu")
    assert torch.equal(rope_append(*args, *norms, 1e-5, backend="cpu"), q)
    assert torch.equal(k_cache, caches[0]) and torch.equal(v_cache, caches[1]) and k_cache.any() and v_cache.any()


@each_backend
@pytest.mark.parametrize("width", [8, 16, 30, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_head_size_where_it_lies(backend, width, dtype):
    """A slice of the joint projection begins at any multiple of the width, so packs are not always aligned."""
    args = new_tokens(7, 3, 1, width, dtype, device=RUNS_ON[backend])
    norms = weights(width, dtype, RUNS_ON[backend])
    if OPS["rope_append"].refusal(backend, (*args, *norms, 1e-5)):
        pytest.skip("it has no such dtype")
    if backend == "triton" and interpreted() and dtype is torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off where a GPU rounds it")
    exact = [a.double() if a.is_floating_point() else a for a in (*args, *norms)]
    expected = rope_append(*exact, 1e-5, backend="reference")
    found = rope_append(*args, *norms, 1e-5, backend=backend)
    allowed = {torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}[dtype]
    for a, e in ((found, expected), (args[6], exact[6]), (args[7], exact[7])):
        assert torch.allclose(a.double(), e, rtol=0, atol=allowed) and e.any()


@pytest.mark.parametrize("backend", [pytest.param(b, id=f"{b}-{RUNS_ON[b]}") for b in HERE if b in ("cuda", "triton")])
def test_on_a_gpu_a_token_out_of_place_is_left_out(backend):
    """The host is not asked; nothing outside the cache or the tables is touched."""
    device = RUNS_ON[backend]
    args = list(new_tokens(5, 4, 2, 16, device=device))
    expected = [a.clone() for a in args]
    kept = [0, 3]
    args[5][1], args[8][2], args[8][4] = 50, -1, 4 * 5
    found = rope_append(*args, backend=backend)
    rows = [a[kept] if i in (0, 1, 2, 5, 8) else a for i, a in enumerate(expected)]
    assert torch.allclose(found[kept], rope_append(*rows, backend="reference"), atol=2e-6)
    assert found[1].isnan().all() and found[[2, 4]].isfinite().all()
    assert torch.allclose(args[6], rows[6], atol=2e-6) and torch.equal(args[7], rows[7])


def paged_batch(contexts, shared, block=8, heads=4, kv_heads=2, width=16, seed=0):
    """q, caches, tables and contexts: row i and the row before it have their first `shared[i]` blocks in common."""
    generator = torch.Generator().manual_seed(seed)
    columns = -(-max(contexts) // block)
    tables = torch.full((len(contexts), columns), -1, dtype=torch.int32)
    blocks = 0
    for i, (context, same) in enumerate(zip(contexts, shared, strict=True)):
        tables[i, :same] = tables[i - 1, :same]
        used = -(-context // block) - same
        tables[i, same : same + used] = torch.arange(blocks, blocks + used)
        blocks += used
    q = torch.randn(len(contexts), heads, width, generator=generator)
    caches = torch.randn(2, blocks, block, kv_heads, width, generator=generator).unbind()
    return q, *caches, tables, torch.tensor(contexts, dtype=torch.int32)


GROUPS = {
    "one group": ([90, 91, 120, 97, 90], [0, 10, 11, 11, 11]),
    "groups and singles": ([40, 41, 70, 33, 200, 201, 65], [0, 4, 0, 0, 0, 24, 0]),
    "prefixes of other lengths": ([130, 131, 140, 129], [0, 16, 8, 4]),
    "more than go together": ([70 + i for i in range(40)], [0, *[8] * 39]),
}


@needs_cpu
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 3, 40), (6, 1, 64), (5, 1, 12), (2, 2, 128)])
@pytest.mark.parametrize("group", GROUPS)
def test_a_shared_prefix_changes_no_bit_on_the_cpu(group, heads, kv_heads, width):
    q, k, v, tables, lens = paged_batch(*GROUPS[group], heads=heads, kv_heads=kv_heads, width=width)
    together = paged_attention(q, k, v, tables, lens, backend="cpu")
    alone = [paged_attention(q[i : i + 1], k, v, tables[i : i + 1], lens[i : i + 1]) for i in range(len(q))]
    assert torch.equal(together, torch.cat(alone))
    double = (x.double() for x in (q, k, v))
    expected = paged_attention(*double, tables, lens, backend="reference")
    torch.testing.assert_close(together.double(), expected, rtol=2e-6, atol=2e-6)


@needs_cpu
def test_queries_of_a_prefill_have_the_bits_of_decoding_them_one_by_one():
    contexts, queries = [70, 33, 5, 140], [50, 1, 5, 17]
    _, k, v, tables, lens = paged_batch(contexts, [0, 0, 0, 0])
    q = torch.randn(sum(queries), 4, 16)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    found = paged_attention(q, k, v, tables, lens, starts, backend="cpu")
    rows = torch.arange(4).repeat_interleave(torch.tensor(queries))
    seen = torch.cat([torch.arange(c - n + 1, c + 1) for c, n in zip(contexts, queries, strict=True)]).int()
    assert torch.equal(found, paged_attention(q, k, v, tables[rows].contiguous(), seen, backend="cpu"))


@needs_cpu
@pytest.mark.parametrize(
    ("starts", "message"),
    [([0, 2, 1, 4], "must ascend from 0 to 4"), ([0, 1, 2, 5], "must ascend"), ([0, 0, 4, 4], "more queries than")],
)
def test_queries_that_do_not_fit_their_sequences_are_refused(starts, message):
    q, k, v, tables, lens = paged_batch([3, 3, 3], [0, 0, 0])
    q = torch.randn(4, 4, 16)
    with pytest.raises(ValueError, match=f"paged_attention: .*{message}"):
        paged_attention(q, k, v, tables, lens, torch.tensor(starts, dtype=torch.int32), backend="cpu")
