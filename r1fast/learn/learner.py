"""Optimizer steps: micro-batches are accumulated, the gradient is clipped, the weights move, the version is bumped.

The learner is blind to the algorithm: it is given batches whose streams say everything, and a loss. What RL adds (old
and reference log-probs, mini-batches, epochs) is policy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from r1fast.learn import parts
from r1fast.learn.accumulation import Accumulated, Accumulation, Loss
from r1fast.learn.masters import Masters
from r1fast.learn.optimizer import Schedule, build_optimizer
from r1fast.learn.packing import Row, pack
from r1fast.learn.policy import PolicyLearning, train_policy
from r1fast.learn.room import Room
from r1fast.model.decoder import Decoder
from r1fast.model.sharding import shared_like, used_in, whole
from r1fast.model.tensor_parallel import is_split, tensor_of
from r1fast.parallel import world
from r1fast.types import StepStats

if TYPE_CHECKING:
    from torch import Tensor, nn

    from r1fast.schema import ObjectiveConfig, OptimizerConfig
    from r1fast.types import PackedBatch

__all__ = ["Learner", "Loss"]


class Learner:
    """Trains `model` in place for `total_steps` optimizer steps (the schedule's length; more run at its last rate)."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        total_steps: int,
        micro_batch_tokens: int = 16384,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """micro_batch_tokens: of a micro-batch at most, for whoever packs. warn: told what the person who waits should
        know, as when memory runs out."""
        self.model, self.config = model, config
        self.micro_batch_tokens = micro_batch_tokens  # kept with the state: other sums would have other bits
        self.room = Room(model, warn)
        self.schedule = Schedule(config, total_steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = Masters.behind(trained, used_in(model))
        self.parameters = trained if self.masters is None else self.masters.parameters  # what the optimizer moves
        self.optimizer = build_optimizer(self.parameters, config)
        self.steps = 0  # optimizer steps begun, also those that were skipped
        self.skipped = 0  # steps whose loss or gradient was not finite, and which changed nothing

    def step(self, batches: Sequence[PackedBatch], loss: Loss) -> StepStats:
        """One optimizer step over all micro-batches. `loss`: (model, batch) -> (scalar, BatchStats | None)."""
        return self.apply(self.accumulate(batches, loss))

    train_policy = train_policy  # one set of rollouts: all its optimizer steps

    def policy_learning(self, sizes: Sequence[int], objective: ObjectiveConfig, **settings: Any) -> PolicyLearning:
        """The same for groups that are still to come, of these sizes; see PolicyLearning."""
        return PolicyLearning(self, sizes, objective, **settings)

    def accumulate(self, batches: Sequence[PackedBatch], loss: Loss) -> Accumulated:
        """Zeroes the gradient and adds that of every micro-batch. The weights stay as they are."""
        gradient = Accumulation(self, loss)
        gradient.add(batches)
        return gradient.done()

    def rehearse(self, longest: int, loss: Loss) -> None:
        """The largest micro-batch there can be, of rows of `longest` tokens, forward and backward: if memory is to run
        out, it does so now. Changes nothing but what `room` knows."""
        tokens = [0] * longest
        streams = {"old_logprobs": [0.0] * (longest - 1), "ref_logprobs": [0.0] * (longest - 1)}
        rows = [Row(tokens, 1, advantage=1.0, **streams)] * max(1, self.micro_batch_tokens // (longest - 1))
        batches = pack(rows, np.full(len(rows), 1.0), max(self.micro_batch_tokens, longest), self.model.device)
        self.accumulate(batches[:1] * world().size, loss)
        self.forget()

    def forget(self) -> None:
        """The gradient is none."""
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.model.parameters():  # half weights, whose gradients backward was about to hand to their masters
            p.grad = None

    def apply(self, step: Accumulated) -> StepStats:
        """Clips and steps, unless something is not finite: then the step is counted as skipped and nothing changes.

        A step without any row has a zero gradient and is still a step (the momentum moves on), so that leaving out
        rows without gradient changes nothing.
        """
        gradients = self.gradients()
        if step.scale != 1.0:
            torch._foreach_mul_(gradients, step.scale)
        norm = self.norm(gradients)
        loss, norm, told = self._read(step, norm)
        rate = self.schedule(self.steps)
        self.steps += 1
        if math.isfinite(loss) and math.isfinite(norm):
            if norm > self.config.max_grad_norm:
                torch._foreach_mul_(gradients, self.config.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            if self.masters is not None:
                self.masters.publish()
            if isinstance(self.model, Decoder):  # a reward model is not sampled from: it has no version
                self.model.bump_version()
        else:
            self.skipped += 1
        return StepStats(loss=loss, grad_norm=norm, learning_rate=rate, tokens=step.tokens, **told)

    def gradients(self) -> list[Tensor]:
        """Of all that the optimizer moves; zeros where nothing was added."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Of the whole gradient, on every rank."""
        tensor = tensor_of(self.model)
        if tensor is not None:
            return tensor.total_norm(gradients, [is_split(name) for name in self.names()])
        return whole(torch.nn.utils.get_total_norm(gradients))

    def names(self) -> list[str]:
        """Of `parameters`, in the model."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _own_share(self, saved: dict) -> dict:
        """An optimizer's state of whole tensors, or of shares, cut as this rank's parameters are."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: {k: shared_like(v, ordered[index]) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            for index, values in saved["state"].items()
        }
        return {**saved, "state": state}

    @staticmethod
    def _read(step: Accumulated, norm: Tensor) -> tuple[float, float, dict[str, float]]:
        """Everything that the host needs of a step, in one synchronisation."""
        sums = [value for told in step.stats if told is not None for value in told[:6]]
        loss = torch.stack(step.losses).sum() * step.scale if step.losses else norm.new_zeros(())
        loss, norm, *sums = torch.stack([value.float() for value in (loss, norm, *sums)]).tolist()
        kl, clipped, ratio, ratio_max, count, entropy = (sums[i::6] for i in range(6))
        rows = sum(count)
        if not rows:
            return loss, norm, {}
        told = {
            "kl": sum(kl) / rows,
            "entropy": sum(entropy) / rows,
            "clip_fraction": sum(clipped) / rows,
            "ratio_mean": sum(ratio) / rows,
            "ratio_max": max(ratio_max),
        }
        return loss, norm, told

    def state_dict(self) -> dict:
        """All that a resumed run needs besides the model's weights; of a sharded model, this rank's share of it."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "total_steps": self.schedule.total_steps,
            "micro_batch_tokens": self.micro_batch_tokens,
            "limit": self.room.limit,
            **({} if self.masters is None else self.masters.state_dict()),
        }
        return parts.spread(self, state)

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the state is of a schedule of another length: the run would not go on the same."""
        if state["total_steps"] != self.schedule.total_steps:
            raise ValueError(
                f"the saved learner was to run {state['total_steps']} steps, this one {self.schedule.total_steps}: "
                f"resume with the same configuration, or start afresh"
            )
        state = parts.own(self, state)
        self.optimizer.load_state_dict(self._own_share(state["optimizer"]))
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.micro_batch_tokens, self.room.limit = state["micro_batch_tokens"], state["limit"]
        if self.masters is not None:
            self.masters.load_state_dict(state)
