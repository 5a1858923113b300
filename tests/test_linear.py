"""The op `linear` beyond what the registry asks of it: a row's bits do not depend on its batch, and its choice."""


import pytest
import torch

from r1fast_kernels import linear, native
from r1fast_kernels.op import reset_choices

pytestmark = pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
# edges of each way of the forward: few rows, some, many; of its tiles and of its blocks of rows
BATCHES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 64, 127, 128, 129, 134, 240, 241, 300)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def factors(rows: int, width: int, outputs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(width)
    return tuple(torch.randn(shape, generator=generator) for shape in ((rows, width), (outputs, width), (outputs,)))


@pytest.mark.parametrize(("width", "outputs"), [(256, 768), (100, 51), (7, 3), (513, 130), (640, 257)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_has_the_same_bits_in_every_batch_and_place_and_on_any_threads(width, outputs, with_bias, threads):
    x, weight, bias = factors(400, width, outputs)
    bias = bias if with_bias else None
    whole = linear(x, weight, bias, backend="cpu")
    right = x.double() @ weight.double().T + (0 if bias is None else bias)
    torch.testing.assert_close(whole.double(), right, rtol=1e-5, atol=2e-4)
    for count in (1, 2, 3):
        threads(count)
        for rows in BATCHES:
            for first in (0, 37, 100):
                part = slice(first, first + rows)
                assert torch.equal(linear(x[part], weight, bias, backend="cpu"), whole[part]), (count, part)


def test_rows_and_weights_with_gaps():
    wide, weight, bias = factors(9, 50, 7)
    found = linear(wide[:, 3:41], weight[:, 3:41], bias, backend="cpu")
    assert torch.equal(found, linear(wide[:, 3:41].contiguous(), weight[:, 3:41].contiguous(), bias, backend="cpu"))
    column = wide.T[:9, :9]  # no dimension without gaps
    found = linear(column, weight[:, :9], backend="cpu")
    assert torch.equal(found, linear(column.contiguous(), weight[:, :9], backend="cpu"))


def test_no_rows():
    weight = torch.ones(3, 4, requires_grad=True)
    out = linear(torch.empty(0, 4), weight, backend="cpu")
    out.sum().backward()
    assert out.shape == (0, 3) and torch.equal(weight.grad, torch.zeros(3, 4))


def test_automatic_takes_it_with_gradients_and_without():
    x, weight, _ = factors(5, 16, 4)
    reset_choices()
    found = linear(x, weight.requires_grad_())
    assert torch.equal(found, linear(x, weight, backend="cpu")) and found.requires_grad
    with torch.no_grad():
        assert torch.equal(linear(x, weight), found)
