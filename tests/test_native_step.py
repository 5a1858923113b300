"""The C++ ops of a training step, beyond what the registry asks of them: views of the fused projection are read where
they lie, any number of threads gives the same bits, and the vector exp is as exact as it says."""

import pytest
import torch

from r1fast_kernels import load_ops, native, qkv_rope, rms_norm, rope, swiglu, varlen_attention
from r1fast_kernels.qkv_rope import by_ops

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
OPS = load_ops()
STEP = ("linear", "varlen_attention", "rms_norm", "rope", "qkv_rope", "swiglu")


def fused(rows: int, heads: int = 4, kv_heads: int = 2, width: int = 16) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), 1)


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def outputs_and_gradients(op, args: tuple) -> list[torch.Tensor]:
    args = tuple(a.detach().requires_grad_() if i in op.gradients and a is not None else a for i, a in enumerate(args))
    found = op(*args, backend="cpu")
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in found)
    leaves = [args[i] for i in op.gradients if args[i] is not None]
    return [x.detach() for x in found] + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("name", STEP)
def test_automatic_takes_the_native_op_for_float32_and_not_for_others(name: str, monkeypatch):
    op = OPS[name]
    case = next(case for case in op.cases() if case.size == "tiny")
    monkeypatch.setattr(op, "reference", lambda *args: "reference")
    assert op(*case.make("cpu", torch.float32, 0)) != "reference"
    assert "float32" in op.refusal("cpu", case.make("cpu", torch.float64, 0))


@pytest.mark.parametrize("name", STEP)
def test_any_number_of_threads_gives_the_same_bits(name: str):
    case = max((c for c in OPS[name].cases() if c.size == "model"), key=lambda c: "4096" in c.name or "300" in c.name)
    args = case.make("cpu", torch.float32, 3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outputs_and_gradients(OPS[name], args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_views_of_the_fused_projection_are_read_where_they_lie(monkeypatch):
    """As the decoder passes them; a copy would go through `contiguous`, which is refused here."""
    q, k, v = fused(37)
    cu_seqlens, weight, angle = ends(20, 17), torch.randn(16), torch.randn(50, 8)
    tables = (angle.cos(), angle.sin(), torch.arange(37))
    calls = [
        lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 20, backend="cpu"),
        lambda q, k, v: rms_norm(q, weight, 1e-6, backend="cpu"),
        lambda q, k, v: rope(q, k, *tables, backend="cpu"),
    ]
    packed = [x.contiguous() for x in (q, k, v)]
    expected = [call(*packed) for call in calls]
    whole = torch.Tensor.contiguous

    def contiguous(x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous(), "a copy was made"
        return whole(x)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    for call, right in zip(calls, expected, strict=True):
        found = call(q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_rows_of_a_wider_matrix_are_read_where_they_lie():
    wide = torch.randn(9, 50)
    assert torch.equal(swiglu(wide[:, 3:41], backend="cpu"), swiglu(wide[:, 3:41].contiguous(), backend="cpu"))


@pytest.mark.parametrize("width", [1, 7, 16, 24, 100, 256])
@pytest.mark.parametrize("lengths", [(1,), (128, 129), (31, 0, 33, 300)])
def test_attention_of_any_width_across_blocks_of_keys(width: int, lengths: tuple[int, ...]):
    """128 keys make a block: lengths at, under and over its edges, forward and backward, against float64."""
    op, cu_seqlens = OPS["varlen_attention"], ends(*lengths)
    args = (*fused(sum(lengths), 3, 1, width), cu_seqlens, max(lengths), 0.7 * width**-0.5)
    found = outputs_and_gradients(op, args)
    double = tuple(x.double().requires_grad_() for x in args[:3])
    expected = op.reference(*double, *args[3:])
    weight = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(1)).double()
    for a, b in zip(found, [expected, *torch.autograd.grad((expected * weight).sum(), double)], strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=2e-5, atol=1e-5)


def test_attention_stays_finite_where_scores_are_large():
    q, k, v = fused(200, 2, 1, 16)
    out = varlen_attention(100 * q, 100 * k, v, ends(200), 200, backend="cpu")
    right = OPS["varlen_attention"].reference(*(x.double() for x in (100 * q, 100 * k, v)), ends(200), 200, None)
    torch.testing.assert_close(
        out.double(), right, rtol=2e-2, atol=2e-2
    )  # scores of 1e4 have two digits after the point


@pytest.mark.parametrize("lengths", [(4, 3), (4, 4, -2), ()])
def test_offsets_that_leave_the_pack_are_refused(lengths: tuple[int, ...]):
    q, k, v = fused(6)
    with pytest.raises(ValueError, match=r"varlen_attention: cu_seqlens must ascend from 0 to 6"):
        varlen_attention(q, k, v, ends(*lengths), 6, backend="cpu")
    with pytest.raises(ValueError, match=r"varlen_attention: max_seqlen is 3, but a sequence has 4"):
        varlen_attention(q, k, v, ends(4, 2), 3, backend="cpu")


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_of_the_tables_are_refused(position: int):
    q, k, _ = fused(3)
    with pytest.raises(ValueError, match=r"rope: a position lies outside the tables, which have 5 rows"):
        rope(q, k, torch.ones(5, 8), torch.ones(5, 8), torch.tensor([0, position, 1]), backend="cpu")


def test_the_vector_exp():
    x = torch.linspace(-87, 88.3, 1_000_003)
    out = torch.empty_like(x)
    native.cpu().vector_exp(x.data_ptr(), out.data_ptr(), x.numel())
    exact = x.double().exp()
    assert ((out - exact).abs() / exact).max() < 1.2e-7
    x = torch.tensor([-torch.inf, -1e9, -87.1, 0.0, 1e9, torch.nan])
    out = torch.empty_like(x)
    native.cpu().vector_exp(x.data_ptr(), out.data_ptr(), x.numel())
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 1.0] and 1e38 < out[4] < torch.inf and out[5].isnan()


@pytest.mark.parametrize("width", [16, 26, 64])
@pytest.mark.parametrize("normed", [True, False])
def test_qkv_rope_is_the_ops_in_turn_bit_for_bit(width: int, normed: bool):
    """Forward; a gradient's sums are in another order. v is the projection's own, as is its gradient's path."""
    angle, positions = torch.randn(2, 50, width // 2), torch.arange(37)
    norms = [(1 + 0.2 * torch.randn(width)).requires_grad_() for _ in range(2)] if normed else [None, None]
    leaf = torch.randn(37, 8, width, requires_grad=True)
    both = [f(leaf, 4, *angle, positions, *norms, 1e-6) for f in (qkv_rope, by_ops)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert both[0][2].data_ptr() == leaf[:, 6:].data_ptr()
    leaves, grads = [leaf, *norms][: 1 + 2 * normed], [torch.randn_like(x) for x in both[0]]
    for a, b in zip(*(torch.autograd.grad(found, leaves, grads) for found in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.abs().sum() > 0
