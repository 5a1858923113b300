"""What an op is: one contract, one reference, several backends, and the rule that chooses among them.

Every `kernels/<op>.py` ends in one `OP = register(Op(...))`; tests and benchmarks walk `OPS` and need nothing else.
The public function beside it normalises its arguments to positions and calls `OP(*args, backend=backend)`.

Conventions, the same for every op:
- `args` are positional and complete (None for what was left out); `args[0]` is a tensor, and its device decides;
- a result is one tensor, a flat tuple of tensors, or None for an op that writes into its arguments (`mutates`);
- the reference is plain torch and is differentiated by autograd; any other backend is two pure functions:
    forward(*args) -> result                        when the backend has no backward
    forward(*args) -> (result, saved)               when it has one; `saved` is a tuple of tensors and plain values
                                                    (an op that takes its gradient in forward has `inference` besides)
    backward(saved, grads, needs) -> gradients      `grads`: one per output in `outputs_with_gradient`;
                                                    `needs` and the gradients: one per argument in `gradients`
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARIES = ("flash", "cudnn", "torch")  # kernels of others: the flash-attn package, cuDNN's, torch's own
BACKENDS = ("reference", "cpu", "cuda", "triton", *LIBRARIES)
VARIABLE = "R1FAST_BACKEND"
# What automatic tries, first to last. Triton's interpreter runs on CPU tensors but is only ever asked for by name; so
# is cuDNN, whose backward does not give the same bits twice.
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "flash", "torch", "triton", "reference")}
# Where the tensors of a backend live. (Tests compile the CUDA kernels for the CPU and change its entry.)
LIVES_ON = {"cpu": "cpu", "cuda": "cuda", **dict.fromkeys(LIBRARIES, "cuda")}

log = logging.getLogger("r1fast_kernels")
_requested: ContextVar[str | None] = ContextVar("r1fast_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve this call; the message says why."""


@cache
def _from_environment() -> str | None:
    """R1FAST_BACKEND, read once (a look into os.environ on every call costs 1.2 us); `reset_choices` reads it again."""
    return os.environ.get(VARIABLE)


def requested() -> str | None:
    """The backend asked for by `use_backend` or R1FAST_BACKEND, or None: what is chosen automatically."""
    return _requested.get() or _from_environment()


def _always(*_args) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute an op. `unavailable` answers for the machine and installation, `supports` for one call."""

    forward: Callable
    backward: Callable | None = None
    inference: Callable | None = None  # forward where no gradient is needed and that saves work -> result
    deterministic: bool = True  # its gradient has the same bits on a second run
    unavailable: Callable[[], str | None] = _always  # -> the reason it cannot run here, or None
    supports: Callable[..., str | None] = _always  # (*args) -> the reason it cannot take these arguments, or None
    slower: Callable[..., str | None] = (
        _always  # (*args) -> why it is only for who asks for it by name: slower, as measured or as what it reads says
    )


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments to test and time an op with. `size`: "tiny", "ragged" or "model" (the last also benchmarked)."""

    name: str
    size: str
    make: Callable[[str, torch.dtype, int], tuple]  # (device, dtype, seed) -> args


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|actual - expected| <= atol + rtol * |expected|, and why these numbers are the right ones."""

    rtol: float
    atol: float
    reason: str


@dataclass(slots=True)
class Op:
    """An op and everything that is known about it. Calling it runs the chosen backend."""

    name: str
    check: Callable[..., None]  # (*args): raises ValueError or TypeError in one clear sentence
    reference: Callable  # (*args) -> result
    cases: Callable[[], Iterable[Case]]
    tolerances: dict[torch.dtype, Tolerance]  # one entry per dtype the op is tested in
    flops: Callable[..., int]  # (*args) -> floating point operations of the forward, no gradient asked
    bytes: Callable[..., int]  # (*args) -> bytes that must move in it, at least
    backends: dict[str, Backend] = field(default_factory=dict)  # besides "reference"
    gradients: tuple[int, ...] = ()  # positions of the arguments that receive a gradient
    outputs_with_gradient: tuple[int, ...] = (0,)  # positions of the results that send one, where there are as many
    mutates: tuple[int, ...] = ()  # positions of the arguments written to
    invalid: Callable[[], Iterable[tuple[str, tuple]]] = tuple  # -> (what is wrong, args) that `check` must refuse
    gradient_tolerances: dict[torch.dtype, Tolerance] | None = None  # default: `tolerances`
    _automatic: dict = field(default_factory=dict, repr=False)  # device type -> names automatic may use
    _reasons: dict = field(default_factory=dict, repr=False)  # backend name -> why it cannot run here, or None
    _said: set = field(default_factory=set, repr=False)  # reasons already logged

    def __post_init__(self):
        unknown = set(self.backends) - set(BACKENDS[1:])
        if unknown:
            raise ValueError(f"op {self.name}: unknown backends {sorted(unknown)}; known are {', '.join(BACKENDS)}")
        self.backends = {"reference": Backend(self.reference), **self.backends}

    def __call__(self, *args, backend: str | None = None):
        """Check the arguments, choose a backend, run it. Over a bare call of the reference this costs about 1 us."""
        self.check(*args)
        asked = backend or requested()
        if asked:
            self._require(asked, args)
            return self._run(asked, args)
        device = "cpu" if args[0].is_cpu else args[0].device.type  # `.device.type` alone would cost 0.4 us
        names = self._automatic.get(device)
        if names is None:
            names = self._automatic[device] = self._resolve(device)
        if names == ("reference",):
            return self.reference(*args)
        return self._run(next(name for name in names if self._accepts(name, args)), args)

    def reason(self, name: str) -> str | None:
        """Why backend `name` cannot run on this machine, or None. Asked once, then remembered until `reset`."""
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r} ({VARIABLE} or backend=); known are {', '.join(BACKENDS)}")
        if name not in self._reasons:
            known = name in self.backends
            self._reasons[name] = self.backends[name].unavailable() if known else f"{self.name} has no {name} backend"
        return self._reasons[name]

    def refusal(self, name: str, args: tuple) -> str | None:
        """Why backend `name` cannot take these arguments (it is there, but lacks a case, or a backward), or None."""
        found = self.backends[name]
        if name != "reference" and found.backward is None and self._needs_gradient(args):
            return "it has no backward and a gradient is needed"
        return found.supports(*args)

    def reset(self) -> None:
        """Forget what was resolved and remembered (for tests that change what is available)."""
        self._automatic.clear()
        self._reasons.clear()
        self._said.clear()

    def _resolve(self, device: str) -> tuple[str, ...]:
        """The backends that automatic may use on `device`, best first; the reference is always the last."""
        names = []
        for name in AUTOMATIC.get(device, ("reference",)):
            if name in self.backends:
                reason = self.reason(name)
                if reason is None:
                    names.append(name)
                else:
                    log.info("%s: backend %s passed over: %s", self.name, name, reason)
        return tuple(names)

    def _accepts(self, name: str, args: tuple) -> bool:
        if name == "reference":
            return True
        reason = self.refusal(name, args) or self.backends[name].slower(*args)
        if reason is not None and (name, reason) not in self._said:
            self._said.add((name, reason))
            log.info("%s: backend %s passed over: %s", self.name, name, reason)
        return reason is None

    def _require(self, name: str, args: tuple) -> None:
        reason = self.reason(name)
        if reason is None and args[0].device.type != LIVES_ON.get(name, args[0].device.type):
            reason = f"the tensors live on {args[0].device}"  # automatic goes by the device and need not ask
        reason = reason or self.refusal(name, args)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {name} was asked for but cannot be used: {reason}")

    def _needs_gradient(self, args: tuple) -> bool:
        if not self.gradients or not torch.is_grad_enabled():
            return False
        return any(args[i] is not None and args[i].requires_grad for i in self.gradients)

    def _run(self, name: str, args: tuple):
        found = self.backends[name]
        if name == "reference" or found.backward is None:
            return found.forward(*args)
        if self._needs_gradient(args):
            return _Differentiable.apply(self, found, *args)
        return found.forward(*args)[0] if found.inference is None else found.inference(*args)


class _Differentiable(torch.autograd.Function):
    """The one autograd wrapper: joins a backend's two pure functions."""

    @staticmethod
    def forward(ctx, op: Op, backend: Backend, *args):
        result, saved = backend.forward(*args)
        ctx.op, ctx.backend, ctx.count = op, backend, len(args)
        ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
        ctx.plain = [None if isinstance(value, Tensor) else (value,) for value in saved]
        if isinstance(result, tuple):
            result = tuple(result)
            constant = (value for i, value in enumerate(result) if i not in op.outputs_with_gradient)
            ctx.mark_non_differentiable(*constant)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        op, tensors = ctx.op, iter(ctx.saved_tensors)
        saved = tuple(next(tensors) if value is None else value[0] for value in ctx.plain)
        needs = tuple(ctx.needs_input_grad[2 + i] for i in op.gradients)
        found = ctx.backend.backward(saved, tuple(grads[i] for i in op.outputs_with_gradient if i < len(grads)), needs)
        gradients = [None] * ctx.count
        for position, gradient, needed in zip(op.gradients, found, needs, strict=True):
            gradients[position] = gradient if needed else None
        return (None, None, *gradients)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op to `OPS`, which tests and benchmarks walk. Raises ValueError on a second op of the same name."""
    if op.name in OPS:
        raise ValueError(f"op {op.name} is registered twice")
    OPS[op.name] = op
    return op


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op uses backend `name`, and raises BackendError where it cannot."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def reset_choices() -> None:
    """Forget every cached choice, and read R1FAST_BACKEND again at the next call."""
    _from_environment.cache_clear()
    for op in OPS.values():
        op.reset()
