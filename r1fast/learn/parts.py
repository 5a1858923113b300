"""A learner's state where its model lies on several ranks: what is saved is of the whole, what is loaded this rank's.

Moments and float32 masters are cut as the weights that they belong to (model/tensor_parallel.py), so that a run saved
on one number of ranks goes on with another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from r1fast.model.tensor_parallel import joined, tensor_of

if TYPE_CHECKING:
    from torch.nn import Parameter

    from r1fast.learn.learner import Learner


def spread(learner: Learner, state: dict[str, Any]) -> dict[str, Any]:
    """The state with every split tensor as its pieces; as it is where the model is whole."""
    tensor = tensor_of(learner.model)
    if tensor is None:
        return state

    def pieces(name: str, p: Parameter, value: Any) -> Any:
        # moments in half precision are kept flat
        shaped = value.view_as(p) if isinstance(value, Tensor) and value.numel() == p.numel() else value
        return tensor.pieces(name, shaped, learner.model.config) if isinstance(value, Tensor) else value

    return _each(learner, state, pieces)


def own(learner: Learner, state: dict[str, Any]) -> dict[str, Any]:
    """What `spread` gave, on any number of ranks, as this one's tensors."""
    tensor = tensor_of(learner.model)

    def part(name: str, p: Parameter, value: Any) -> Any:
        if tensor is None:
            return joined(value)
        shape = tensor.whole_shape(name, p, learner.model.config)
        if isinstance(value, Tensor) and value.numel() == math.prod(shape):
            value = value.view(shape)
        return tensor.part(name, value, learner.model.config)

    return _each(learner, state, part)


def _each(learner: Learner, state: dict[str, Any], change: Callable[[str, Parameter, Any], Any]) -> dict[str, Any]:
    """`change` of all that belongs to one parameter: (its name in the model, it, the value)."""
    named = dict(zip(map(id, learner.parameters), learner.names(), strict=True))
    ordered = [p for group in learner.optimizer.param_groups for p in group["params"]]
    moments = {
        index: {key: change(named[id(ordered[index])], ordered[index], value) for key, value in values.items()}
        for index, values in state["optimizer"]["state"].items()
    }
    found = {**state, "optimizer": {**state["optimizer"], "state": moments}}
    if "masters" in state:
        masters = zip(learner.names(), learner.parameters, state["masters"], strict=True)
        found["masters"] = [change(*one) for one in masters]
    return found
