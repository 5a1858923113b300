"""Memory of the ops' large tensors on a CPU: blocks never overlap, come back with their last view, and merge."""

from random import Random

import pytest
import torch

from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.paged import PagedKV
from r1fast_kernels import memory, native

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
LIKE = torch.ones(1)


def test_blocks_are_whole_while_they_are_alive():
    random, alive, before = Random(0), [], memory.in_use()
    for turn in range(300):
        if alive and random.random() < 0.48:
            tensor, value = alive.pop(random.randrange(len(alive)))
            assert bool((tensor == value).all())
            continue
        shape = (random.randint(200, 900), random.choice((192, 256, 1280)))
        alive.append((memory.empty(LIKE, shape).fill_(turn), turn))
        assert alive[-1][0].shape == shape and alive[-1][0].is_contiguous() and alive[-1][0].data_ptr() % 256 == 0
    assert len(alive) > 3 and all(bool((tensor == value).all()) for tensor, value in alive)
    tensor = None
    alive.clear()
    assert memory.in_use() == before


def test_a_block_comes_back_with_its_last_view_and_is_given_again():
    before = memory.in_use()
    first = memory.empty(LIKE, (512, 256))
    place, view = first.data_ptr(), first[3:5, 7]
    del first
    assert memory.in_use() - before == 512 * 256 * 4
    del view
    assert memory.in_use() == before
    assert memory.empty(LIKE, (512, 256)).data_ptr() == place
    a, b, c = (memory.empty(LIKE, (512, 256)) for _ in range(3))
    start = a.data_ptr()
    del a, c, b  # holes that touch are one
    assert memory.empty(LIKE, (3 * 512, 256)).data_ptr() == start


@pytest.mark.parametrize("like", [LIKE.double(), LIKE.bfloat16()])
def test_other_dtypes_and_small_tensors_are_torchs(like):
    before = memory.in_use()
    other, small = memory.empty(like, (512, 256)), memory.empty(LIKE, (16, 16))
    assert (other.dtype, other.shape, small.shape) == (like.dtype, (512, 256), (16, 16))
    assert memory.in_use() == before


def test_a_backward_pass_leaves_nothing_behind():
    before = memory.in_use()
    config = DecoderConfig(64, 64, 128, layers=2, heads=2, kv_heads=1, head_dim=32, max_positions=2048)
    model = Decoder(config).initialize(0)
    hidden = model.forward_packed(torch.arange(1200) % 64, torch.tensor([0, 500, 1200], dtype=torch.int32))
    assert memory.in_use() - before > 20 * hidden.nbytes / 2
    hidden.sum().backward()
    del hidden
    assert memory.in_use() == before and model.layers[0].qkv_proj.grad.abs().max() > 0


def test_a_cache_lies_where_activations_lay_and_is_zeros_there():
    memory_of = (2, 40, 16, 4, 64)  # 40 blocks of 2 layers
    blocks = [memory.empty(LIKE, memory_of).fill_(float("nan")) for _ in range(3)]
    places = [block.data_ptr() for block in blocks]
    assert memory.recycled((1 << 32,), LIKE.dtype) is None  # no hole of that size was ever touched
    del blocks
    config = DecoderConfig(64, 64, 128, layers=2, heads=4, kv_heads=4, head_dim=64, max_positions=64)
    before = memory.in_use()
    cache = PagedKV.allocate(config, 39, 16, "cpu", torch.float32)
    assert cache.keys.shape == memory_of and [cache.keys.data_ptr(), cache.values.data_ptr()] == places[:2]
    assert not cache.keys.any() and not cache.values.any()
    assert memory.in_use() - before == cache.keys.nbytes + cache.values.nbytes
    del cache
    assert memory.in_use() == before and memory.recycled(memory_of, torch.bfloat16) is None
