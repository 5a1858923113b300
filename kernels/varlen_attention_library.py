"""varlen_attention by the kernels of others, on a GPU; the contract is in varlen_attention.py.

    flash   the flash-attn package: FlashAttention-3 (Shah et al. 2024) on Hopper where installed, else FlashAttention-2
            (Dao 2023). Forward and backward at 660/575 and 306/166 TFLOP/s on an H100 by their authors' tables (causal,
            head 128, 8k); asked for its deterministic backward (FlashAttention-3: 474).
    torch   `torch.nn.attention.varlen.varlen_attn`, which is FlashAttention-2 inside of torch: no padding either.
    cudnn   torch's attention over buckets of padded sequences with cuDNN's kernels alone (566/470 TFLOP/s by NVIDIA's
            table). Only by name: torch itself calls its backward not deterministic, and a plan is made for every new
            shape of a bucket.

The packed ones read nothing on the host. What they trust, that cu_seqlens covers the rows, is asserted on the device,
once for a pack, before they run.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
CUDNN = [SDPBackend.CUDNN_ATTENTION]


def no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def half_precision(q, k, v, cu_seqlens, max_seqlen, scale) -> str | None:
    """`supports` of all three."""
    if q.dtype not in HALVES:
        return f"it computes in float16 or bfloat16, and the input is {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > LARGEST_HEAD:
        return f"a head of {q.shape[2]} is not a multiple of 8 up to {LARGEST_HEAD}"
    return None


# -- the packed ones: what is asked of cu_seqlens ---------------------------------------------------------------------

_last: tuple = (None, None)  # cu_seqlens that was asserted last, and (its version, rows, max_seqlen)


def assert_covers(cu_seqlens: Tensor, rows: int, max_seqlen: int) -> None:
    """Stops the device, with a sentence, before a kernel follows offsets outside of the rows; the host does not wait.

    The layers of a model attend over the same pack: only the first of them pays, some small launches.
    """
    global _last
    key = (cu_seqlens._version, rows, max_seqlen)
    if _last[0] is cu_seqlens and _last[1] == key:
        return
    lengths = cu_seqlens.diff()
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows)
    within = ((lengths >= 0) & (lengths <= max_seqlen)).all()
    torch._assert_async(
        ends & within,
        f"varlen_attention: cu_seqlens must ascend from 0 to {rows}, the rows of q, by at most max_seqlen={max_seqlen}",
    )
    _last = (cu_seqlens, key)


def by_autograd(attend, deterministic_flag: bool):
    """(forward, backward) of an attention that autograd differentiates: the graph is kept between the two.

    deterministic_flag: around the backward torch is told to be deterministic; its kernels read that flag and nothing
    else (and would warn, and be it not, under `warn_only`).
    """

    def forward(q, k, v, *rest):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = attend(*leaves, *rest)
        return out.detach(), ((out, leaves),)  # in a tuple of its own: no tensor that the outer graph would save

    def backward(saved, grads, needs):
        ((out, leaves),) = saved
        if not deterministic_flag:
            return torch.autograd.grad(out, leaves, grads[0])
        with _deterministic():
            return torch.autograd.grad(out, leaves, grads[0])

    return forward, backward


@contextmanager
def _deterministic():
    was = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = filled and was  # that is for tests, and a pass over the memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=only_warned)
        memory.fill_uninitialized_memory = filled


# -- flash-attn -------------------------------------------------------------------------------------------------------


@cache
def flash_function():
    """flash-attn's function over packed sequences, or the reason why there is none (str)."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    names = ["flash_attn_interface"] if hopper else []  # FlashAttention-3 is built for Hopper alone
    reason = "flash-attn is not installed"
    for name in (*names, "flash_attn"):
        try:
            function = import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError) as error:  # OSError: built for another torch
            if not isinstance(error, ModuleNotFoundError):
                reason = f"flash-attn cannot be imported: {str(error).splitlines()[0]}"
            continue
        if "deterministic" in inspect.signature(function).parameters:
            return function
        reason = "flash-attn is older than 2.4.1, which brought the deterministic backward"
    return reason


def flash_unavailable() -> str | None:
    reason = flash_function()
    return reason if isinstance(reason, str) else no_gpu()


def flash(q, k, v, cu_seqlens, max_seqlen, scale) -> Tensor:
    if not q.shape[0]:
        return q * 0
    cu_seqlens = cu_seqlens.contiguous()
    assert_covers(cu_seqlens, q.shape[0], max_seqlen)
    return flash_function()(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softmax_scale=scale, causal=True, deterministic=True,
    )  # fmt: skip


# -- torch's ----------------------------------------------------------------------------------------------------------


@cache
def torch_function():
    """torch's function over packed sequences and the keywords that this version needs; the reason why not (str)."""
    try:
        function = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    grouped = "enable_gqa" in inspect.signature(function).parameters  # 2.11 takes fewer key heads as they come
    return function, {"enable_gqa": True} if grouped else {}


def torch_unavailable() -> str | None:
    reason = torch_function()
    return reason if isinstance(reason, str) else no_gpu()


def packed(q, k, v, cu_seqlens, max_seqlen, scale) -> Tensor:
    if not q.shape[0]:
        return q * 0
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cu_seqlens = cu_seqlens.contiguous()
    assert_covers(cu_seqlens, q.shape[0], max_seqlen)
    function, more = torch_function()
    causal = (-1, 0)  # keys as far back as there are, none ahead
    return function(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=causal, **more
    )  # fmt: skip


# -- cuDNN's ----------------------------------------------------------------------------------------------------------


def cudnn_unavailable() -> str | None:
    if no_gpu():
        return no_gpu()
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return None


def cudnn_supports(q, k, v, cu_seqlens, max_seqlen, scale) -> str | None:
    """What torch says of one sequence of this kind."""
    reason = half_precision(q, k, v, cu_seqlens, max_seqlen, scale)
    if reason is not None or not q.is_cuda:
        return reason
    one = [x.new_empty((1, x.shape[1], 128, x.shape[2])) for x in (q, k, v)]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    one = [x.requires_grad_(wants_gradient) for x in one]
    asked = torch.backends.cuda.SDPAParams(*one, None, 0.0, True, q.shape[1] != k.shape[1])
    return None if torch.backends.cuda.can_use_cudnn_attention(asked) else "torch does not give such heads to cuDNN"


def by_cudnn(padded):
    """`padded`, the reference's buckets, with cuDNN's kernels and no other."""

    def attend(*args) -> Tensor:
        with sdpa_kernel(CUDNN):
            return padded(*args)

    return attend
