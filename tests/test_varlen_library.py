"""varlen_attention's bindings of flash-attn, torch's varlen op and cuDNN, on a CPU.

Their kernels need a GPU. Here stand-ins of the real signatures take their place: they hold the arguments to what the
kernels demand, and compute by another formula than the reference's. torch's stand-in lies below its Python, as the CPU
implementation of the ATen ops, so that torch's own varlen_attn and its autograd run.
"""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from r1fast_kernels import op, varlen_attention
from r1fast_kernels import varlen_attention_library as library

LENGTHS = [7, 0, 1, 40, 19]


def inputs(dtype=torch.float16, heads=6, kv_heads=2, width=16):
    joint = torch.randn(sum(LENGTHS), heads + 2 * kv_heads, width, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in joint.split([heads, kv_heads, kv_heads], 1))  # views, as a projection's
    return q, k, v, torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[H, n, n] probabilities in float32; keys repeated for their query heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    products = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    return products.masked_fill(torch.ones_like(products).triu(1).bool(), float("-inf"))


def dense(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
    out = []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        values = v[a:b].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        out.append(torch.einsum("hqk,khd->qhd", scores(q[a:b], k[a:b], scale).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def dense_backward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, d_out: Tensor) -> list[Tensor]:
    """(d_q, d_k, d_v) by hand: below autograd there is none to ask."""
    group, gradients = q.shape[1] // k.shape[1], []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        keys, values = (x[a:b].float().repeat_interleave(group, 1) for x in (k, v))
        p = scores(q[a:b], k[a:b], scale).softmax(-1)
        d_p = torch.einsum("qhd,khd->hqk", d_out[a:b].float(), values)
        d_s = scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
        parts = (
            torch.einsum("hqk,khd->qhd", d_s, keys),
            torch.einsum("hqk,qhd->khd", d_s, q[a:b].float()).unflatten(1, (-1, group)).sum(2),
            torch.einsum("hqk,qhd->khd", p, d_out[a:b].float()).unflatten(1, (-1, group)).sum(2),
        )
        gradients.append(parts)
    return [torch.cat(parts).to(q.dtype) for parts in zip(*gradients, strict=True)]


def held_to_the_kernels_demands(q, k, v, ends_q, ends_k, longest_q, longest_k):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[1] % k.shape[1] == 0 and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.is_contiguous() and ends_k.is_contiguous()
    assert longest_q == longest_k == max(LENGTHS) and type(longest_q) is int


@pytest.fixture
def on_the_cpu(monkeypatch):
    for name in op.LIBRARIES:
        monkeypatch.setitem(op.LIVES_ON, name, "cpu")
    monkeypatch.setattr(library, "no_gpu", lambda: None)
    library.flash_function.cache_clear()
    op.reset_choices()
    yield monkeypatch
    library.flash_function.cache_clear()


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):  # fmt: skip
    """flash-attn 2.8's signature."""
    held_to_the_kernels_demands(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and deterministic and not dropout_p and window_size == (-1, -1) and not return_attn_probs
    return dense(q, k, v, cu_seqlens_q, q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False):  # fmt: skip
    """flash-attn 3's signature, as of its hopper/ folder."""
    assert seqused_q is None and seqused_k is None
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return flash_2(q, k, v, *ends, *longest, 0.0, softmax_scale, causal, deterministic=deterministic)


def installed(monkeypatch, **modules) -> None:
    for name, function in modules.items():
        module = ModuleType(name)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def flash(on_the_cpu):
    installed(on_the_cpu, flash_attn=flash_2)
    return on_the_cpu


@pytest.fixture
def aten(on_the_cpu):
    """The two ATen ops behind torch's varlen_attn, for CPU tensors."""

    def forward(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, return_debug_mask, *,
                scale=None, window_size_left=None, window_size_right=None, **more):  # fmt: skip
        held_to_the_kernels_demands(q, k, v, ends_q, ends_k, longest_q, longest_k)
        assert causal and dropout == 0.0 and (window_size_left, window_size_right) == (-1, 0)
        assert all(value is None for value in more.values())
        with torch.no_grad():
            out = dense(q, k, v, ends_q, q.shape[2] ** -0.5 if scale is None else scale)
        sums = q.new_zeros((q.shape[1], len(q)), dtype=torch.float32)
        return out, sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(())

    def backward(d_out, q, k, v, out, sums, ends_q, ends_k, longest_q, longest_k, dropout, causal, state, unused, *,
                 scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        held_to_the_kernels_demands(q, k, v, ends_q, ends_k, longest_q, longest_k)
        assert causal and (window_size_left, window_size_right) == (-1, 0)
        # what its kernel reads to choose the deterministic sum
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        return dense_backward(q, k, v, ends_q, q.shape[2] ** -0.5 if scale is None else scale, d_out)

    implementation = torch.library.Library("aten", "IMPL")
    implementation.impl("_flash_attention_forward", forward, "CPU")
    implementation.impl("_flash_attention_backward", backward, "CPU")
    yield on_the_cpu
    implementation._destroy()


@pytest.fixture
def cudnn(on_the_cpu):
    on_the_cpu.setattr(library, "CUDNN", [SDPBackend.MATH])  # one that a CPU has, and that is chosen as exclusively
    on_the_cpu.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return on_the_cpu


each = pytest.mark.parametrize("name", op.LIBRARIES)


@pytest.fixture
def library_of(name, request):
    return request.getfixturevalue({"flash": "flash", "torch": "aten", "cudnn": "cudnn"}[name])


def both(args, scale, name):
    """(result and gradients by the library, by the reference in float64)."""
    found = []
    for backend, exact in ((name, False), ("reference", True)):
        q, k, v = (x.double() if exact else x for x in args[:3])
        out = varlen_attention(q, k, v, *args[3:], scale, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grads = torch.autograd.grad((out.double() * weight).sum(), args[:3])
        found.append([out.detach(), *grads])
    return found


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "scale"), [((6, 2), None), ((3, 3), 0.3), ((4, 1), None)])
def test_forward_and_backward_are_the_references(library_of, name, dtype, heads, scale):
    actual, expected = both(inputs(dtype, *heads), scale, name)
    error = {torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and e.abs().sum() > 1
        assert torch.allclose(a.double(), e.double(), rtol=error, atol=4 * error)


@each
def test_no_rows_and_no_gradient(library_of, name):
    none = torch.zeros(0, 2, 16, dtype=torch.float16)
    ends = torch.zeros(2, dtype=torch.int32)
    assert name == "cudnn" or varlen_attention(none, none, none, ends, 0, backend=name).shape == none.shape
    with torch.no_grad():
        assert varlen_attention(*inputs(), backend=name).grad_fn is None


@each
def test_what_the_kernels_cannot_take_is_refused(library_of, name):
    for wrong, why in (({"dtype": torch.float32}, "float32"), ({"width": 12}, "of 12"), ({"width": 264}, "of 264")):
        with pytest.raises(op.BackendError, match=why):
            varlen_attention(*inputs(**wrong), backend=name)


@pytest.mark.parametrize("name", ["flash", "torch"])
@pytest.mark.parametrize(
    ("ends", "longest"),
    [([0, 7, 7, 8, 48, 66], 40), ([1, 7, 7, 8, 48, 67], 40), ([0, 7, 6, 8, 48, 67], 40), ([0, 7, 7, 8, 48, 67], 39)],
)
def test_offsets_that_do_not_cover_the_rows_stop_before_the_kernel(library_of, name, ends, longest):
    q, k, v, *_ = inputs()
    with pytest.raises(RuntimeError, match="cu_seqlens must ascend from 0 to 67, the rows of q"):
        varlen_attention(q, k, v, torch.tensor(ends, dtype=torch.int32), longest, backend=name)


def test_offsets_are_asserted_once_for_a_pack_and_again_when_written_to(flash):
    asked = []
    flash.setattr(torch, "_assert_async", lambda *args: asked.append(args))
    args = inputs()
    for _ in range(3):
        varlen_attention(*args, backend="flash")
    assert len(asked) == 1
    args[3][1] = 5
    varlen_attention(*args, backend="flash")
    assert len(asked) == 2


def test_the_deterministic_flag_is_put_back(aten):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        both(inputs(), None, "torch")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
    both(inputs(), None, "torch")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_flash_3_is_taken_on_hopper_alone(on_the_cpu):
    def stopped(*_args, deterministic, **_keywords):
        raise AssertionError("the other one was to be called")

    for capability, functions in (
        ((9, 0), {"flash_attn_interface": flash_3, "flash_attn": stopped}),
        ((8, 0), {"flash_attn_interface": stopped, "flash_attn": flash_2}),
    ):
        on_the_cpu.setattr(torch.cuda, "is_available", lambda: True)
        on_the_cpu.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        installed(on_the_cpu, **functions)
        library.flash_function.cache_clear()
        actual, expected = both(inputs(), None, "flash")
        assert torch.allclose(actual[0].double(), expected[0], atol=2**-8)


def test_why_flash_is_missing(on_the_cpu):
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0):
        raise AssertionError

    on_the_cpu.setitem(sys.modules, "flash_attn", None)
    assert library.flash_unavailable() == "flash-attn is not installed"
    installed(on_the_cpu, flash_attn=old)
    library.flash_function.cache_clear()
    assert "older than 2.4.1" in library.flash_unavailable()
    broken = ModuleType("flash_attn")
    on_the_cpu.setitem(sys.modules, "flash_attn", broken)
    library.flash_function.cache_clear()
    assert library.flash_unavailable().startswith("flash-attn cannot be imported: ")


def test_automatic_takes_flash_then_torch_and_never_cudnn(aten):
    """The order for a GPU, shown by letting CPU tensors choose in it."""
    aten.setitem(op.AUTOMATIC, "cpu", op.AUTOMATIC["cuda"])
    aten.setattr(torch.backends.cudnn, "is_available", lambda: True)
    ran = []

    def recorded(name):
        function = getattr(library, name)
        return lambda *args: ran.append(name) or function(*args)

    def attended(args) -> str:
        ran.clear()
        varlen_attention(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        return ran[0] if ran else "reference"

    found = op.OPS["varlen_attention"].backends
    for backend, function in (("flash", "flash"), ("torch", "packed"), ("cudnn", None)):
        named = recorded(function) if function else lambda *_: ran.append("cudnn")
        aten.setitem(found, backend, replace(found[backend], inference=named))
    assert attended(inputs()) == "packed"
    installed(aten, flash_attn=flash_2)
    library.flash_function.cache_clear()
    op.reset_choices()
    assert attended(inputs()) == "flash"
    assert attended(inputs(torch.float32)) == "reference"
