"""An op's backends as runs without arguments, forward and backward: what is timed, compared with itself, sanitized."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.measure import DEVICE
from r1fast_kernels.op import AUTOMATIC, LIVES_ON, Op


def with_leaves(op: Op, args: tuple) -> tuple[tuple, list[Tensor]]:
    """(arguments, those of them that ask for a gradient)."""
    args = tuple(a.detach().requires_grad_() if i in op.gradients and a is not None else a for i, a in enumerate(args))
    return args, [args[i] for i in op.gradients if args[i] is not None]


def returned(op: Op, args: tuple, backend: str) -> list[Tensor]:
    result = op(*args, backend=backend)
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def usable(op: Op, args: tuple, backward: bool) -> list[str]:
    """Backends for this device, what automatic takes first; the reference only where it is that."""
    names = [name for name in op.backends if LIVES_ON.get(name, DEVICE) == DEVICE and op.reason(name) is None]
    with torch.set_grad_enabled(backward):
        args = with_leaves(op, args)[0] if backward else args
        names = [name for name in names if name != "reference" and op.refusal(name, args) is None]
        slower = {name for name in names if op.backends[name].slower(*args) is not None}
    order = AUTOMATIC[DEVICE]
    names.sort(key=lambda name: (name in slower, order.index(name) if name in order else len(order)))
    return names if set(names) - slower else ["reference", *names]


def run_of(op: Op, args: tuple, backend: str, backward: str = "") -> Callable[[], list[Tensor]]:
    """A run; what it returns are results, or with `backward` gradients: "alone" of one forward, "both" of one each."""
    if not backward:
        return lambda: returned(op, args, backend)
    args, leaves = with_leaves(op, args)

    def outputs() -> list[Tensor]:
        found = returned(op, args, backend)
        return [found[i] for i in op.outputs_with_gradient if i < len(found)]

    if backward == "both":
        return lambda: list(torch.autograd.grad([out.sum() for out in outputs()], leaves))
    out = outputs()
    gradients = [torch.randn_like(o) for o in out]
    return lambda: list(torch.autograd.grad(out, leaves, gradients, retain_graph=True))
