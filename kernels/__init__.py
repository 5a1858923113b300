"""The fused kernels, one op a file, usable without r1fast. Names load on first use: importing this needs no torch.

Errors: ValueError or TypeError for bad input, `BackendError` for a backend asked for that cannot be used.
"""

import sys
from importlib import import_module
from types import ModuleType

from r1fast_kernels.paths import put_checkout_last

put_checkout_last()

OP_MODULES = {
    "group_advantage": "group_advantage",
    "grpo_loss": "grpo_loss",
    "linear": "linear",
    "linear_logprob": "linear_logprob",
    "linear_grpo_loss": "linear_grpo_loss",
    "linear_cross_entropy": "linear_grpo_loss",
    "paged_attention": "paged_attention",
    "paged_append": "paged_append",
    "varlen_attention": "varlen_attention",
    "prefix_attention": "prefix_attention",
    "sample_token": "sample_token",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "qkv_rope": "qkv_rope",
    "rope_append": "rope_append",
    "swiglu": "swiglu",
}
_FROM_OP = ("Backend", "BackendError", "Case", "Op", "Tolerance", "register", "reset_choices", "use_backend")

__all__ = ["OPS", *OP_MODULES, *_FROM_OP]


def load_ops() -> dict:
    """Import every op and return the registry, name -> Op."""
    for module in dict.fromkeys(OP_MODULES.values()):
        import_module(f"r1fast_kernels.{module}")
    return import_module("r1fast_kernels.op").OPS


def __getattr__(name: str):
    if name == "OPS":
        return load_ops()
    module = "op" if name in _FROM_OP else OP_MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'r1fast_kernels' has no attribute {name!r}")
    value = getattr(import_module(f"r1fast_kernels.{module}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


class _Package(ModuleType):
    """After importing `r1fast_kernels.rms_norm` Python sets that attribute to the module; the op of that name stays."""

    def __setattr__(self, name: str, value) -> None:
        if name in OP_MODULES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
