"""The references themselves: against formulas written out here from the papers, transformers' own modules, and numbers.

tests/test_kernels.py holds every other backend to these references; this file (norms, rope, attention), the one of the
losses and the one of sampling hold the references to the truth.
Everything is float64 unless it says otherwise, so that a wrong term cannot hide in rounding.
"""

import sys

import pytest
import torch
from torch import Tensor

import r1fast_kernels as k

torch_double = {"dtype": torch.float64}


def randn(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **{**torch_double, **options})


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# ---------------------------------------------------------------------------------------------------- norms, rope, MLP


def test_rms_norm_is_transformers_qwen3_norm():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    module = Qwen3RMSNorm(24, eps=1e-5)
    module.weight.data = randn(24, seed=1, dtype=torch.float32)
    x = randn(3, 5, 24, dtype=torch.float32)
    close(k.rms_norm(x, module.weight, 1e-5), module(x), 1e-6)


def test_rms_norm_with_residual_is_norm_of_the_sum():
    x, residual, weight = randn(7, 12), randn(7, 12, seed=1), randn(12, seed=2)
    y, total = k.rms_norm(x, weight, 1e-6, residual)
    close(total, x + residual)
    close(y, total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)


def test_rms_norm_gradient():
    x, residual, weight = (t.requires_grad_() for t in (randn(3, 6), randn(3, 6, seed=1), randn(6, seed=2)))
    assert torch.autograd.gradcheck(lambda *a: k.rms_norm(a[0], a[1], 1e-6, a[2]), (x, weight, residual))


def test_rope_is_transformers_rope():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.tensor([0, 3, 2, 9, 1])
    angle = torch.arange(10, **torch_double)[:, None] * 100.0 ** (-torch.arange(4, **torch_double) / 4)
    q, key = randn(5, 3, 8), randn(5, 1, 8, seed=1)
    wide = torch.cat((angle, angle), -1)[positions][None]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], key.transpose(0, 1)[None], wide.cos(), wide.sin())
    for actual, e in zip(k.rope(q, key, angle.cos(), angle.sin(), positions), expected, strict=True):
        close(actual, e[0].transpose(0, 1))


def test_rope_turns_products_by_the_distance_alone():
    angle = torch.arange(20, **torch_double)[:, None] * torch.tensor([1.0, 0.3, 0.1], **torch_double)
    q, key = randn(1, 1, 6).expand(9, 1, 6), randn(1, 1, 6, seed=1).expand(9, 1, 6)
    turned, other = k.rope(q, key, angle.cos(), angle.sin(), torch.arange(9) + 5)
    product = turned[:, 0] @ other[:, 0].T
    for distance in range(-8, 9):
        diagonal = product.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rope_and_swiglu_gradients():
    q, key = randn(3, 2, 6).requires_grad_(), randn(3, 1, 6, seed=1).requires_grad_()
    table = randn(2, 5, 3, seed=2)
    assert torch.autograd.gradcheck(lambda q, key: k.rope(q, key, *table, torch.tensor([4, 0, 2])), (q, key))
    assert torch.autograd.gradcheck(k.swiglu, (randn(4, 10).requires_grad_(),))


def test_swiglu_is_transformers_mlp_between_its_projections():
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    mlp = Qwen2MLP(Qwen2Config(hidden_size=8, intermediate_size=12)).double()
    x = randn(5, 8)
    gate_up = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), -1)
    close(mlp.down_proj(k.swiglu(gate_up)), mlp(x))


# ----------------------------------------------------------------------------------------------------------- attention


def attention_by_hand(q: Tensor, key: Tensor, value: Tensor, scale: float, first: int = 0) -> Tensor:
    """One sequence, query by query: q [n, Hq, D] are positions first, first + 1, ... of key, value [m, Hkv, D]."""
    out = torch.empty_like(q)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            source = head * key.shape[1] // q.shape[1]
            scores = torch.stack([scale * q[t, head] @ key[u, source] for u in range(first + t + 1)])
            out[t, head] = torch.softmax(scores, 0) @ value[: first + t + 1, source]
    return out


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("waste", [0, 50, 10**9])  # a bucket for each length, several, one
def test_varlen_attention_by_hand(waste, multiple, monkeypatch):
    k.varlen_attention.__doc__  # noqa: B018  the module is imported with its first use
    module = sys.modules["r1fast_kernels.varlen_attention"]
    monkeypatch.setitem(module.PADDING, "cpu", module.Padding(waste, multiple))
    lengths = [3, 7, 0, 1, 5, 7]
    q, key, value = randn(23, 4, 6), randn(23, 2, 6, seed=1), randn(23, 2, 6, seed=2)
    parts = [attention_by_hand(*(x.split(lengths)[i] for x in (q, key, value)), 0.37) for i in range(6)]
    close(k.varlen_attention(q, key, value, ends(lengths), 7, 0.37), torch.cat(parts))


def test_varlen_attention_scales_by_the_head_by_default():
    q, key, value = randn(5, 2, 9), randn(5, 2, 9, seed=1), randn(5, 2, 9, seed=2)
    close(k.varlen_attention(q, key, value, ends([5]), 5), attention_by_hand(q, key, value, 1 / 3))


def test_varlen_attention_gradient_and_packing():
    lengths = [3, 1, 4]
    tensors = [randn(8, 4, 4), randn(8, 2, 4, seed=1), randn(8, 2, 4, seed=2)]
    for t in tensors:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: k.varlen_attention(*a, ends(lengths), 4), tensors)
    weight = randn(8, 4, 4, seed=3)
    packed = torch.autograd.grad((k.varlen_attention(*tensors, ends(lengths), 4) * weight).sum(), tensors)
    alone = [
        k.varlen_attention(*(t.split(lengths)[i] for t in tensors), ends(lengths[i : i + 1]), lengths[i])
        for i in range(3)
    ]
    for a, b in zip(packed, torch.autograd.grad((torch.cat(alone) * weight).sum(), tensors), strict=True):
        close(a, b)


def test_varlen_attention_plans_again_for_changed_boundaries():
    q, key, value = randn(6, 2, 4), randn(6, 2, 4, seed=1), randn(6, 2, 4, seed=2)
    boundaries = ends([2, 4])
    before = k.varlen_attention(q, key, value, boundaries, 6)
    boundaries[1] = 3
    after = k.varlen_attention(q, key, value, boundaries, 6)
    close(after, k.varlen_attention(q, key, value, ends([3, 3]), 6))
    assert not torch.equal(before, after)


def paged_setting(contexts: list[int], block: int, seed: int = 0):
    """Dense keys and values of each sequence, and a cache filled with them by paged_append, blocks out of order."""
    kv_heads, width = 2, 6
    dense = [randn(2, n, kv_heads, width, seed=seed + i) for i, n in enumerate(contexts)]
    used = [-(-n // block) for n in contexts]
    order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(contexts), max(used) + 1), -1, dtype=torch.int32)
    caches = torch.zeros(2, sum(used) + 2, block, kv_heads, width, **torch_double)
    for i, (pair, n) in enumerate(zip(dense, used, strict=True)):
        table[i, :n] = order[sum(used[:i]) : sum(used[:i]) + n]
        place = torch.arange(contexts[i])
        k.paged_append(*pair, *caches, table[i].long()[place // block] * block + place % block)
    return dense, caches, table, torch.tensor(contexts, dtype=torch.int32)


def test_prefix_attention_is_attention_over_prompt_and_completion():
    """Values, and gradients of the prompt's keys summed over its completions, by formulas written out here."""
    groups = [[4, 3, 0, 2], [5], [1, 6]]
    lengths = [n for group in groups for n in group]
    leaves = [x.requires_grad_() for x in (randn(21, 4, 6), randn(21, 2, 6, seed=1), randn(21, 2, 6, seed=2))]
    parts = [x.split(lengths) for x in leaves]
    expected, first = [], 0
    for group in groups:
        for s in range(first, first + len(group)):
            sequences = [s] if s == first else [first, s]
            whole = [torch.cat([part[i] for i in sequences]) for part in parts]
            expected.append(attention_by_hand(*whole, 0.37)[len(whole[0]) - lengths[s] :])
        first += len(group)
    expected = torch.cat(expected)
    members = torch.tensor([0, 4, 5, 7], dtype=torch.int32)
    found = k.prefix_attention(*leaves, ends(lengths), members, 6, 0.37)
    close(found, expected)
    weight = randn(21, 4, 6, seed=3)
    gradients = (torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert b.abs().sum() > 1
        close(a, b)


def test_paged_decode_is_the_last_row_of_dense_attention():
    dense, caches, table, contexts = paged_setting([5, 1, 16, 4, 9], 4)
    q = randn(5, 4, 6, seed=9)
    expected = [attention_by_hand(q[i : i + 1], *dense[i], 6**-0.5, len(dense[i][0]) - 1) for i in range(5)]
    close(k.paged_attention(q, *caches, table, contexts), torch.cat(expected))


def test_paged_prefill_in_chunks():
    dense, caches, table, contexts = paged_setting([5, 8, 16, 3], 4)
    new = [5, 1, 6, 0]
    q = randn(12, 4, 6, seed=9)
    expected = [
        attention_by_hand(part, *pair, 0.5, pair.shape[1] - n)
        for part, pair, n in zip(q.split(new), dense, new, strict=True)
    ]
    close(k.paged_attention(q, *caches, table, contexts, ends(new), 0.5), torch.cat(expected))


def test_paged_prefill_of_whole_sequences_is_varlen_attention():
    lengths = [5, 8, 16, 3]
    dense, caches, table, contexts = paged_setting(lengths, 4)
    q = randn(32, 4, 6, seed=9)
    key, value = torch.cat(dense, 1)
    expected = k.varlen_attention(q, key, value, ends(lengths), 16)
    close(k.paged_attention(q, *caches, table, contexts, ends(lengths)), expected)


def test_sequences_may_share_blocks():
    dense, caches, table, _ = paged_setting([8, 6], 4)
    table[1, 0] = table[0, 0]
    shared = torch.cat((dense[0][:, :4], dense[1][:, 4:6]), 1)
    q = randn(2, 4, 6, seed=9)
    found = k.paged_attention(q, *caches, table, torch.tensor([8, 6], dtype=torch.int32))
    close(found[1:], attention_by_hand(q[1:], *shared, 6**-0.5, 5))


def test_append_leaves_other_slots_alone():
    caches = randn(2, 3, 4, 2, 6)
    before = caches.clone()
    new = randn(2, 2, 2, 6, seed=1)
    k.paged_append(*new, *caches, torch.tensor([9, 2]))
    assert torch.equal(caches.view(2, 12, 2, 6)[:, [9, 2]], new)
    rest = [i for i in range(12) if i not in (9, 2)]
    assert torch.equal(caches.view(2, 12, 2, 6)[:, rest], before.view(2, 12, 2, 6)[:, rest])
