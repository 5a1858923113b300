"""r1fast: the whole DeepSeek-R1 recipe in one process. Public names load on first use: `--help` needs no torch."""

from importlib import import_module

from r1fast_kernels.paths import put_checkout_last

put_checkout_last()  # before anything imports transformers, which imports a `kernels` of its own

_WHERE = {
    "load": "r1fast.model.weights",
    "save": "r1fast.model.weights",
    "Sampler": "r1fast.rollout.sampler",
    "SamplingParams": "r1fast.rollout.sampler",
    "rewards": "r1fast.rewards",
}

__all__ = ["Sampler", "SamplingParams", "load", "rewards", "save"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'r1fast' has no attribute {name!r}")
    module = import_module(_WHERE[name])
    return module if name == "rewards" else getattr(module, name)
