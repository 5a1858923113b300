"""How an op chooses its backend, and how a backend's two pure functions become one differentiable function."""

import logging
from contextlib import nullcontext

import pytest
import torch

from r1fast_kernels.op import OPS, Backend, BackendError, Op, register, reset_choices, use_backend


def scaled_square(x, factor):
    """The toy op: (factor * x^2, x > 0 as a float that carries no gradient)."""
    return factor * x * x, (x > 0).to(x.dtype)


def forward(x, factor):
    return scaled_square(x.detach(), factor), (x.detach(), factor)


def backward(saved, grads, needs):
    x, factor = saved
    assert len(grads) == len(needs) == 1
    return (2 * factor * x * grads[0],)


def toy(**backends) -> Op:
    def check(x, factor):
        if x.dim() != 1:
            raise ValueError("toy: x must be [N]")

    return Op(
        name="toy",
        check=check,
        reference=scaled_square,
        cases=list,
        tolerances={},
        flops=lambda x, factor: 2 * x.numel(),
        bytes=lambda x, factor: 8 * x.numel(),
        backends=backends,
        gradients=(0,),
    )


def marked(mark: float, **fields) -> Backend:
    """A backend whose result shows that it ran."""
    return Backend(lambda x, factor: (torch.full_like(x, mark), x), **fields)


@pytest.fixture
def x():
    return torch.linspace(-2, 3, 7)


def ran(op, x, **keywords) -> float:
    return op(x, 3.0, **keywords)[0][0].item()


REFERENCE = 12.0  # 3 * (-2)^2


def test_the_call_wins_over_the_block_which_wins_over_the_environment(x, monkeypatch):
    op = toy(cpu=marked(1.0), triton=marked(2.0))
    assert ran(op, x) == 1.0
    monkeypatch.setenv("R1FAST_BACKEND", "triton")
    reset_choices()
    assert ran(op, x) == 2.0
    with use_backend("reference"):
        assert ran(op, x) == REFERENCE
        assert ran(op, x, backend="cpu") == 1.0
        with use_backend("cpu"):
            assert ran(op, x) == 1.0
        assert ran(op, x) == REFERENCE
    assert ran(op, x) == 2.0
    monkeypatch.setenv("R1FAST_BACKEND", "")
    reset_choices()
    assert ran(op, x) == 1.0


def test_a_block_ends_with_its_exception(x):
    op = toy(cpu=marked(1.0))
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert ran(op, x) == 1.0


def test_automatic_passes_over_what_is_missing_or_refuses_and_says_why_once(x, caplog):
    missing = marked(1.0, unavailable=lambda: "it was not built")
    with caplog.at_level(logging.INFO, "r1fast_kernels"):
        assert ran(toy(cpu=missing), x) == REFERENCE
    assert caplog.messages == ["toy: backend cpu passed over: it was not built"]

    caplog.clear()
    op = toy(cpu=marked(1.0, supports=lambda x, factor: "too short" if len(x) < 5 else None))
    with caplog.at_level(logging.INFO, "r1fast_kernels"):
        assert [ran(op, x), ran(op, x[:3]), ran(op, x[:3])] == [1.0, REFERENCE, REFERENCE]
    assert caplog.messages == ["toy: backend cpu passed over: too short"]


def test_what_was_measured_to_be_slower_is_only_for_who_asks_for_it(x, caplog):
    op = toy(cpu=marked(1.0, slower=lambda x, factor: "it was slower" if len(x) < 5 else None))
    with caplog.at_level(logging.INFO, "r1fast_kernels"):
        assert (ran(op, x), ran(op, x[:3]), ran(op, x[:3])) == (1.0, REFERENCE, REFERENCE)
    assert caplog.messages == ["toy: backend cpu passed over: it was slower"]
    assert ran(op, x[:3], backend="cpu") == 1.0


def test_automatic_never_takes_triton_for_a_cpu_tensor(x):
    assert ran(toy(triton=marked(2.0)), x) == REFERENCE


@pytest.mark.parametrize("how", ["call", "block", "environment"])
@pytest.mark.parametrize(
    ("backends", "length", "reason"),
    [
        ({}, 7, "toy has no cpu backend"),
        ({"cpu": marked(1.0, unavailable=lambda: "it was not built")}, 7, "it was not built"),
        ({"cpu": marked(1.0, supports=lambda x, factor: f"{len(x)} is too short")}, 3, "3 is too short"),
    ],
)
def test_an_explicit_request_that_cannot_be_met_raises(x, monkeypatch, how, backends, length, reason):
    op, block = toy(**backends), nullcontext()
    if how == "environment":
        monkeypatch.setenv("R1FAST_BACKEND", "cpu")
        reset_choices()
    if how == "block":
        block = use_backend("cpu")
    with pytest.raises(BackendError, match=f"toy: backend cpu was asked for but cannot be used: {reason}"), block:
        ran(op, x[:length], backend="cpu" if how == "call" else None)


def test_a_backend_of_another_device_is_refused():
    elsewhere = torch.zeros(3, device="meta")
    with pytest.raises(BackendError, match="the tensors live on meta"):
        toy(cpu=marked(1.0))(elsewhere, 3.0, backend="cpu")
    assert toy(cpu=marked(1.0))(elsewhere, 3.0)[0].device.type == "meta"


def test_unknown_names_raise(x, monkeypatch):
    op = toy()
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        ran(op, x, backend="gpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), use_backend("gpu"):
        pass
    monkeypatch.setenv("R1FAST_BACKEND", "gpu")
    reset_choices()
    with pytest.raises(ValueError, match="unknown backend 'gpu' \\(R1FAST_BACKEND"):
        ran(op, x)
    with pytest.raises(ValueError, match="unknown backends \\['gpu'\\]"):
        toy(gpu=marked(1.0))


def test_reset_asks_again(x):
    reasons = ["it was not built"]
    op = toy(cpu=marked(1.0, unavailable=lambda: reasons[0]))
    assert ran(op, x) == REFERENCE
    reasons[0] = None
    assert ran(op, x) == REFERENCE
    op.reset()
    assert ran(op, x) == 1.0


def test_a_backend_without_backward_is_not_used_for_a_gradient(x):
    op = toy(cpu=marked(1.0))
    leaf = x.clone().requires_grad_()
    assert ran(op, leaf) == REFERENCE
    with torch.no_grad():
        assert ran(op, leaf) == 1.0
    with pytest.raises(BackendError, match="no backward"):
        ran(op, leaf, backend="cpu")


def test_two_pure_functions_make_one_differentiable_function(x):
    op = toy(cpu=Backend(forward, backward))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    cotangent = torch.randn_like(x)
    value, sign = op(found, 3.0)
    assert value.grad_fn is not None and not sign.requires_grad
    (value * cotangent).sum().backward()
    (op(expected, 3.0, backend="reference")[0] * cotangent).sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-6, atol=0)
    assert found.grad.abs().sum() > 0
    plain, _ = op(x, 3.0, backend="cpu")
    assert plain.grad_fn is None and torch.equal(plain, value)


def test_a_second_derivative_is_refused_not_wrong(x):
    op = toy(cpu=Backend(forward, backward))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(leaf, 3.0)[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


def test_bad_input_is_refused_before_a_backend_sees_it(x):
    with pytest.raises(ValueError, match="x must be"):
        toy(cpu=marked(1.0))(x.view(1, -1), 3.0)


def test_an_op_is_registered_once():
    op = toy()
    try:
        assert register(op) is op and OPS["toy"] is op
        with pytest.raises(ValueError, match="registered twice"):
            register(toy())
    finally:
        del OPS["toy"]


def test_the_name_of_an_op_is_the_function_also_after_its_module_was_imported():
    import r1fast_kernels.group_advantage  # binds the attribute to the module, were it not for _Package

    assert callable(r1fast_kernels.group_advantage)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert torch.allclose(r1fast_kernels.group_advantage(rewards, 4, eps=0.0), (rewards - 0.5) * 3**0.5)
    with pytest.raises(AttributeError, match="no_such_op"):
        _ = r1fast_kernels.no_such_op
