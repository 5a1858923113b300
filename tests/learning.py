"""A few GRPO steps in float64 on made-up rollouts: what tests of many ranks compare."""

from __future__ import annotations

from random import Random

import torch

from r1fast.learn.learner import Learner
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.weights import clone
from r1fast.schema import ObjectiveConfig, OptimizerConfig
from r1fast.types import Prompt, Rollout, RolloutGroup

SIZES = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 4, "kv_heads": 2}


def train(objective: dict) -> tuple[list[float], list[torch.Tensor], float]:
    """(losses of three steps of two mini-batches, the weights after them, the log-prob difference told)."""
    model = Decoder(DecoderConfig(head_dim=4, **SIZES), dtype=torch.float64).initialize(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.head.copy_(torch.randn(model.head.shape, generator=generator))
    learner = Learner(model, OptimizerConfig(learning_rate=1e-3), 6)
    settings = ObjectiveConfig(**objective)
    reference = clone(model) if settings.kl_coef else None
    losses, draw = [], Random(11)
    for step in range(3):
        update = learner.train_policy(
            [group(draw, f"{step} {i}") for i in range(6)],
            settings,
            reference=reference,
            mini_batches=2,
            micro_batch_tokens=40,
            random=Random(step),
        )
        losses += [one.loss for one in update.steps]
    return losses, [p.detach().clone() for p in model.parameters()], update.logprob_difference_mean


def group(draw: Random, name: str) -> RolloutGroup:
    prompt = Prompt(name, tuple(draw.randrange(19) for _ in range(draw.randrange(2, 9))), "", None, "t")
    rollouts = []
    for _ in range(4):
        tokens = [draw.randrange(19) for _ in range(draw.randrange(1, 14))]
        rollouts.append(Rollout(tokens, [-draw.random() for _ in tokens], "stop", reward=draw.random()))
    return RolloutGroup(prompt, rollouts, 0)
