"""The same work by others. Each takes our op's arguments and returns a run, or raises: then a row says why not.

They are imported when they are asked for: none of them need be installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Run = Callable[[], object]


def _leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _both(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Run:
    return lambda: torch.autograd.grad(loss(), leaves)


def liger_norm(args: tuple) -> Run:
    x, weight, eps, residual = args
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

    if residual is not None:
        return lambda: liger_fused_add_rms_norm(x, residual, weight, eps)
    leaves = _leaves(x, weight)
    out = liger_rms_norm(*leaves, eps, in_place=False)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def liger_swiglu(args: tuple) -> Run:
    """It takes gate and up apart; both are made contiguous before, as in its MLP."""
    from liger_kernel.transformers.functional import liger_swiglu as function

    gate, up = (x.contiguous() for x in args[0].chunk(2, -1))
    return lambda: function(gate, up)


def torch_draw(args: tuple) -> Run:
    logits = args[0]

    def run():
        token = torch.multinomial(torch.softmax(logits, -1), 1)
        return torch.log_softmax(logits, -1).gather(1, token)

    return run


def flashinfer_decode(args: tuple) -> Run:
    import flashinfer

    q, k_cache, v_cache, table, lens, *_ = args
    if not q.is_cuda:
        raise RuntimeError("it needs a GPU")
    block, (sequences, pages) = k_cache.shape[1], table.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    starts = torch.arange(0, (sequences + 1) * pages, pages, dtype=torch.int32, device=q.device)
    last = (lens - 1) % block + 1
    wrapper.plan(
        starts, table.flatten(), last, q.shape[1], k_cache.shape[2], q.shape[2], block,
        q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_cache, v_cache))


def flashinfer_cascade(args: tuple, group: int, shared: int) -> Run:
    """Its two levels: the first `shared` blocks of each `group` rows together, the rest of each row."""
    import flashinfer

    q, k_cache, v_cache, table, lens, *_ = args
    if not q.is_cuda:
        raise RuntimeError("it needs a GPU")
    block, (rows, pages) = k_cache.shape[1], table.shape

    def ends(count: int, each: int) -> torch.Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=q.device) * each

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    last = torch.full((rows // group,), block, dtype=torch.int32, device=q.device)
    wrapper.plan(
        [ends(rows // group, group), ends(rows, 1)], [ends(rows // group, shared), ends(rows, pages - shared)],
        [table[::group, :shared].flatten(), table[:, shared:].flatten()], [last, (lens - 1) % block + 1],
        q.shape[1], k_cache.shape[2], q.shape[2], block, q_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_cache, v_cache))


def trl_loss(args: tuple) -> Run:
    """TRL's chunked log-probabilities, as its GRPOTrainer's fused head calls them, with GRPO's loss in torch behind."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size
    from trl.trainer.utils import _ChunkedLogProbFunction as function

    leaves = _leaves(*args[:2])
    targets, old, ref, advantages, weights, temperature, low, high, kl_coef, _ = args[2:]

    def loss():
        logp = function.apply(*leaves, None, targets, temperature, size, None, 1.0, ("log_probs", "entropy"))[0]
        ratio = torch.exp(logp - old)
        policy = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        kl = torch.exp(ref - logp) - (ref - logp) - 1
        return (weights * (kl_coef * kl - policy)).sum()

    return _both(loss, leaves)


def liger_loss(args: tuple) -> Run:
    """One advantage a sequence, so the rows are 32 sequences; its default of one sequence a chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    leaves = _leaves(*args[:2])
    targets, old, ref, advantages, _, _, low, high, kl_coef, _ = args[2:]
    sequences = 32
    shape = (sequences, len(targets) // sequences)
    head = LigerFusedLinearGRPOLoss(
        beta=kl_coef, compiled=targets.is_cuda, use_ref_model=True, epsilon_low=low, epsilon_high=high, loss_type="bnpo"
    )
    targets, old, ref = (x.view(shape) for x in (targets, old, ref))
    own, mask = advantages.view(shape)[:, 0].contiguous(), torch.ones(shape, device=targets.device)

    def loss():
        hidden = leaves[0].view(*shape, -1)
        return head(hidden, leaves[1], targets, mask, own, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return _both(loss, leaves)


def liger_cross_entropy(args: tuple) -> Run:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    hidden, weight, targets, _ = args
    leaves = _leaves(hidden, weight)
    return _both(lambda: function(*leaves, targets), leaves)


def cut_cross_entropy(args: tuple) -> Run:
    """Without its filter, which leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, targets, _ = args
    leaves = _leaves(hidden, weight)
    if not hidden.is_cuda:
        raise RuntimeError("it needs a GPU")
    return _both(lambda: linear_cross_entropy(*leaves, targets, filter_eps=None), leaves)
