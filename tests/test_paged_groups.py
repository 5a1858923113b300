"""Rows that read a piece of the cache together, and prefill, on the GPU backends that have it: bits, edges, bad data,
and the sampler on top of them.

tests/test_kernels.py runs this file under Triton's interpreter, tests/test_cuda.py with the CUDA kernels compiled for
the CPU; on a GPU the same tests run on it.
"""

import pytest
import torch
from sampling import VOCABULARY, assert_logprobs_close, assert_pool_empty, tokens_of

from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.rollout import graphs
from r1fast.rollout.graphs import GraphEngine
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast_kernels import OPS, paged_attention
from r1fast_kernels.op import LIVES_ON
from r1fast_kernels.paged_groups import find_groups, pieces_of, positions_read, worth_grouping
from r1fast_kernels.triton_support import interpreted

RUNS_ON = {"triton": "cpu" if interpreted() else "cuda", "cuda": LIVES_ON["cuda"]}
HERE = [name for name in RUNS_ON if OPS["paged_attention"].reason(name) is None]
each_backend = pytest.mark.parametrize("backend", [pytest.param(b, id=f"{b}-{RUNS_ON[b]}") for b in HERE])
with_prefill = pytest.mark.parametrize(
    "backend", [pytest.param(b, id=f"{b}-{RUNS_ON[b]}") for b in HERE if b != "cuda"]
)
# What a result may be off by: half a unit in its last place, and as much where weights are rounded before they meet v.
ALLOWED = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# The interpreter makes garbage of products in bfloat16, and a type takes it a minute: one test there has another.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32] if interpreted() else list(ALLOWED))


def grouped_batch(backend, contexts, shared, block=16, heads=4, kv_heads=2, width=16, dtype=torch.float32):
    """Arguments of a decode step on the backend's device: row i has its first `shared[i]` blocks from row i - 1."""
    generator = torch.Generator().manual_seed(1)
    table = torch.full((len(contexts), -(-max(contexts) // block)), -1, dtype=torch.int32)
    blocks = 0
    for i, (context, same) in enumerate(zip(contexts, shared, strict=True)):
        used = -(-context // block)
        table[i, :same] = table[i - 1, :same]
        table[i, same:used] = torch.arange(blocks, blocks + used - same)
        blocks += used - same
    q = torch.randn(len(contexts), heads, width, generator=generator)
    k, v = torch.randn(2, blocks, block, kv_heads, width, generator=generator)
    args = (q.to(dtype), k.to(dtype), v.to(dtype), table, torch.tensor(contexts, dtype=torch.int32))
    return [a.to(RUNS_ON[backend]) for a in args]


def expected(args, *more):
    exact = [a.double().cpu() if a.is_floating_point() else a.cpu() for a in args]
    return paged_attention(*exact, *more, backend="reference")


def close(found, right, allowed=2e-6):
    torch.testing.assert_close(found.double().cpu(), right, rtol=allowed, atol=allowed)


# contexts, and how many of its first blocks a row has from the row before it
BATCHES = {
    "one group": ([520, 600, 530, 528], [0, 32, 32, 32]),
    "more than go together": ([257 + i for i in range(20)], [0, *[16] * 19]),
    "groups of one": ([300, 280, 513], [0, 0, 0]),
    "a template behind which groups differ": ([520, 530, 521, 545, 522], [0, 16, 32, 16, 32]),
    "one block less than a piece": ([300, 301, 302], [0, 15, 15]),
    "edges": ([255, 256, 257, 511, 512, 513], [0, 15, 16, 16, 31, 32]),
    "the same row twice": ([512, 512, 290, 290], [0, 32, 0, 19]),
    "a shorter one among them": ([513, 1, 257, 513], [0, 1, 1, 17]),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("batch", BATCHES)
def test_groups_of_every_kind(backend, batch, dtype):
    args = grouped_batch(backend, *BATCHES[batch], dtype=dtype)
    groups = find_groups(args[3], 16)
    close(paged_attention(*args, groups=groups, backend=backend), expected(args), ALLOWED[dtype])


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(2, 2, 64), (6, 1, 72), (7, 1, 128), (14, 2, 96), (24, 1, 256)]
)
def test_every_head_size_and_number_in_groups(backend, heads, kv_heads, width, dtype):
    args = grouped_batch(backend, [270, 258, 299], [0, 16, 16], 16, heads, kv_heads, width, dtype)
    found = paged_attention(*args, scale=0.09, groups=find_groups(args[3], 16), backend=backend)
    close(found, expected(args, None, 0.09), max(ALLOWED[dtype], 4e-6))


@each_backend
def test_half_precision_in_groups(backend):
    args = grouped_batch(backend, [520, 600, 530, 270], [0, 32, 32, 16], 16, 12, 2, 64, torch.float16)
    close(paged_attention(*args, groups=find_groups(args[3], 16), backend=backend), expected(args), 2**-10)


@each_backend
@each_dtype
@pytest.mark.parametrize("block", [13, 48])
def test_pieces_that_begin_inside_of_a_block(backend, block, dtype):
    """A block of 48 belongs to two pieces: rows that share it but not the next share the first piece alone."""
    shared = -(-512 // block)
    args = grouped_batch(backend, [600, 620, 601], [0, shared, shared - 1], block, dtype=dtype)
    groups = find_groups(args[3], block)
    assert groups[:2].tolist() == [[0, 0, 0], [0, 0, 2]]
    close(paged_attention(*args, groups=groups, backend=backend), expected(args), ALLOWED[dtype])


@pytest.fixture
def products_by_row(monkeypatch):
    """Under the interpreter products are numpy's, in which a row's bits depend on its place; a tensor core's do not."""
    if interpreted():
        monkeypatch.setattr("numpy.matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).astype(dtype).sum(1))


@each_backend
@each_dtype
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (14, 128), (14, 256)])
def test_a_row_has_the_same_bits_whoever_is_in_its_group(backend, heads, width, dtype, products_by_row):
    """14 heads, so that a row is in the middle of another product when it is alone."""
    if heads > 2 and (backend != "cuda" or dtype is not torch.bfloat16):
        pytest.skip("a warp of its kernel has the same work whoever is there, or the same as in another type")
    q, k, v, table, lens = grouped_batch(
        backend, [260, 270, 281, 300, 512], [0, 16, 17, 16, 16], 16, heads, 1, width, dtype
    )
    groups = find_groups(table, 16)
    assert groups.tolist() == [[0] * 5, [0, 1, 2, 3, 4]]
    together = paged_attention(q, k, v, table, lens, groups=groups, backend=backend)
    own = torch.arange(len(q), dtype=torch.int32, device=q.device).expand_as(groups).contiguous()
    assert torch.equal(paged_attention(q, k, v, table, lens, groups=own, backend=backend), together)
    rows = [0, 2, 4]
    some = [x[rows] for x in (q, table, lens)]
    found = paged_attention(some[0], k, v, *some[1:], groups=find_groups(some[1], 16), backend=backend)
    assert torch.equal(found, together[rows])


@each_backend
@each_dtype
def test_rows_of_a_group_that_are_wrong_do_not_spoil_the_others(backend, dtype):
    """A context that no table holds, one of a row that has ended, and a block outside of the cache."""
    args = grouped_batch(backend, [520, 600, 530, 528, 300], [0, 32, 32, 32, 0], dtype=dtype)
    args[1:3] = (torch.cat([x, x[:1]])[:-1] for x in args[1:3])  # what lies behind the cache is finite
    right, groups = expected(args), find_groups(args[3], 16)
    lens, table = args[4], args[3]
    lens[0], lens[2], table[3, 32], table[4, 2] = 0, 16 * table.shape[1] + 1, len(args[1]), -7
    found = paged_attention(*args, groups=groups, backend=backend)
    assert found[[0, 2, 3, 4]].isnan().all()
    close(found[1], right[1], ALLOWED[dtype])
    table[:4, 20] = len(args[1])  # in the second piece, which four rows share
    assert paged_attention(*args, groups=groups, backend=backend).isnan().all()


@pytest.mark.parametrize("block", [1, 7, 16, 256, 300])
def test_groups_are_rows_with_the_same_blocks(block):
    """Against a search by hand over random tables of few blocks, with -1 and shorter contexts among them."""
    generator = torch.Generator().manual_seed(block)
    columns = max(2, 700 // block)
    table = torch.randint(0, 2, (12, columns), generator=generator, dtype=torch.int32)
    table[:, : columns * 2 // 3] = torch.randint(0, 2, (12, 1), generator=generator, dtype=torch.int32)
    table[5, columns // 2 :] = table[6, columns // 2 :] = -1
    groups = find_groups(table, block)
    assert groups.shape == (pieces_of(columns, block), 12) and groups.dtype is torch.int32
    for piece, row in enumerate(groups.tolist()):
        blocks = slice(piece * 256 // block, (piece * 256 + 255) // block + 1)
        for i, first in enumerate(row):
            mine, before = table[i, blocks], table[i - 1, blocks]
            joins = i > 0 and mine.equal(before) and bool((mine >= 0).all())
            assert first == (row[i - 1] if joins else i)
    assert (groups[0] != torch.arange(12)).any()


def test_groups_are_used_where_they_save_reads():
    table = torch.arange(40, dtype=torch.int32)[None].repeat(8, 1)
    lens = torch.full((8,), 600, dtype=torch.int32)
    assert worth_grouping(find_groups(table, 16), lens)
    table[:, 31:] = torch.arange(100, 172).view(8, 9)  # a block of the second piece is each row's own
    groups = find_groups(table, 16)
    assert worth_grouping(groups, lens) and positions_read(groups, lens) == 8 * 600 - 7 * 256
    few = torch.where(torch.arange(8) < 2, 600, 300).int()
    assert worth_grouping(groups[:, :2], few[:2])
    table[2:, 15] = torch.arange(200, 206)
    assert not worth_grouping(find_groups(table, 16), lens)  # one read of 24 pieces saved
    table[:, 15] = torch.arange(200, 208)
    assert not worth_grouping(find_groups(table, 16), lens)


def prefill_batch(backend, contexts, queries, block=16, heads=4, kv_heads=2, width=16, dtype=torch.float32):
    _, k, v, table, lens = grouped_batch(backend, contexts, [0] * len(contexts), block, heads, kv_heads, width, dtype)
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(sum(queries), heads, width, generator=generator).to(k.device, dtype)
    return q, k, v, table, lens, torch.tensor([0, *queries]).cumsum(0).int().to(k.device)


@with_prefill
@pytest.mark.parametrize(
    ("contexts", "queries", "heads", "kv_heads", "block"),
    [
        ([70, 33, 3, 140], [70, 16, 0, 17], 4, 2, 16),
        ([70, 33, 3, 40], [70, 16, 0, 17], 7, 1, 13),
        ([15, 16, 17, 31, 32, 33], [15, 16, 17, 15, 16, 17], 2, 1, 16),
        ([64, 65, 1, 6, 5], [1, 65, 1, 6, 4], 3, 3, 5),
        ([5] * 70, [0] * 30 + [1] + [0] * 36 + [5, 0, 2], 2, 1, 4),
    ],
)
def test_prefill_at_every_edge(backend, contexts, queries, heads, kv_heads, block):
    args = prefill_batch(backend, contexts, queries, block, heads, kv_heads)
    close(paged_attention(*args, backend=backend), expected(args))


@with_prefill
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_of_every_head_size(backend, width, dtype):
    args = prefill_batch(backend, [40, 21], [23, 21], 16, 12, 2, width, dtype)
    found = paged_attention(*args, scale=0.1, backend=backend)
    close(found, expected(args, 0.1), 4e-6 if dtype is torch.float32 else 2**-10)


@with_prefill
def test_a_prompt_has_the_same_bits_in_chunks_and_beside_others(backend, products_by_row):
    q, k, v, table, lens, starts = prefill_batch(backend, [90, 61], [90, 61])
    whole = paged_attention(q, k, v, table, lens, starts, backend=backend)
    done = []
    for first, last in ((0, 31), (31, 32), (32, 90)):
        one = torch.tensor([last], dtype=torch.int32, device=q.device)
        chunk = torch.tensor([0, last - first], dtype=torch.int32, device=q.device)
        done.append(paged_attention(q[first:last], k, v, table[:1], one, chunk, backend=backend))
    assert torch.equal(torch.cat(done), whole[:90])


@with_prefill
def test_prefill_reads_nothing_outside_of_the_cache(backend):
    """Those who see a block that does not exist are NaN, those before it are not; so is a context that cannot be."""
    args = prefill_batch(backend, [50, 40, 30, 20], [50, 40, 10, 20])
    right = expected(args)
    args[3][0, 2], args[4][1], args[4][2] = 1 << 30, 16 * args[3].shape[1] + 1, 9
    found = paged_attention(*args, backend=backend)
    close(found[:32], right[:32])
    assert found[32:100].isnan().all()
    close(found[100:], right[100:])


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(VOCABULARY, 16, 32, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=640)
    decoder = Decoder(config).initialize(0)
    with torch.no_grad():
        decoder.head.normal_(0, 0.4, generator=torch.Generator().manual_seed(1))
    return decoder


def watched(monkeypatch, backend):
    """Every attention of the decoder by this backend, but prefill where it has none; what groups each call had."""
    seen = []

    def attend(*args, groups=None):
        seen.append(None if groups is None else groups.tolist())
        prefills = len(args) > 5 and args[5] is not None
        return paged_attention(*args, groups=groups, backend=None if prefills and backend == "cuda" else backend)

    monkeypatch.setattr("r1fast.model.decoder.paged_attention", attend)
    monkeypatch.setattr("r1fast.model.native_forward.takes", lambda *_: False)  # a CPU's whole step in one call
    return seen


def draw(model, **how):
    """Two prompts behind one template of a piece, and a short one; their rows end one by one."""
    words = torch.randint(VOCABULARY, (3, 270), generator=torch.Generator().manual_seed(5))
    words[1, :256] = words[0, :256]
    prompts = [words[0, :258].tolist(), words[1, :265].tolist(), words[2, :9].tolist()]
    params = [SamplingParams(n=n, max_tokens=m, temperature=0.8, seed=n) for n, m in ((2, 2), (2, 5), (1, 4))]
    sampler = Sampler(model, block_size=16, engine=GraphEngine(model, 2), **how)
    groups = sampler.sample(prompts, params)
    assert_pool_empty(sampler)
    return groups


@each_backend
def test_the_sampler_draws_the_same_with_and_without_groups(backend, model, monkeypatch):
    """5 rows in a bucket of 8, so that three only fill; then 3 of which two share, in one of 4."""
    right = draw(model)
    there = model.to(RUNS_ON[backend])
    seen = watched(monkeypatch, backend)
    found = draw(there)
    used = [groups for groups in seen if groups is not None]
    assert used[0] == [[0, 0, 0, 0, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]] and used[-1][0] == [0, 0, 2, 3]
    assert tokens_of(found) == tokens_of(right)
    assert_logprobs_close(found, right, 1e-5)
    monkeypatch.setattr(graphs, "worth_grouping", lambda *_: False)
    seen.clear()
    alone = draw(there)
    assert seen and all(groups is None for groups in seen)
    assert tokens_of(alone) == tokens_of(found)
    assert_logprobs_close(alone, found, 1e-5)


def test_few_rows_at_a_time_have_the_groups_of_their_own_table(model):
    """A CPU refuses groups that are not those of the table."""
    assert tokens_of(draw(model, max_seqs=3)) == tokens_of(draw(model))
