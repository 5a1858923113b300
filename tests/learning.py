"""A few GRPO steps in float64 on made-up rollouts: what tests of many ranks compare."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random

import torch

from benchmarks.scaling_model import Counted
from r1fast.learn.learner import Learner
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.sharding import gathered, shard, whole
from r1fast.model.weights import clone
from r1fast.schema import CheckpointConfig, ObjectiveConfig, OptimizerConfig
from r1fast.stages.saved import mesh_of, read
from r1fast.stages.saving import Saver
from r1fast.stages.steps import PolicyState
from r1fast.types import Prompt, Rollout, RolloutGroup

COUNTED: list = []  # bytes of each step's collectives, by kind
AFTER_ONE: dict = {}  # state after the first step of the last `train`, whole
SIZES = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 4, "kv_heads": 2}
CONFIG = DecoderConfig(head_dim=4, **SIZES)


def train(
    objective: dict,
    sharded: bool = False,
    saved: dict | None = None,
    within: int | None = None,
    written: Path | None = None,
    found: Path | None = None,
) -> tuple[list[float], list[torch.Tensor], float]:
    """(losses of three steps of two mini-batches, the weights after them, the log-prob difference told).

    saved: what `AFTER_ONE` held after the first step, or found: the folder of a snapshot of it; the other two are then
    done. within: see `shard`. written: where such a snapshot is written, beside the second step."""
    model = Decoder(CONFIG, dtype=torch.float64).initialize(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.head.copy_(torch.randn(model.head.shape, generator=generator))
    settings = ObjectiveConfig(**objective)
    reference = clone(model) if settings.kl_coef else None
    if sharded:
        shard(model, within)
        if reference is not None:
            shard(reference, within)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-3), 6)
    saver = written and Saver(written, CheckpointConfig(background="always"))
    losses, draw, update = [], Random(11), None

    def state() -> dict:
        return {"model": PolicyState(model).state_dict(), "learner": learner.state_dict()}

    for step in range(3):
        if step == 1 and (saved is not None or found is not None):
            saved = saved or read(found, mesh_of(state()))
            PolicyState(model).load_state_dict(saved["model"])
            learner.load_state_dict(saved["learner"])
        if step == 0 and (saved is not None or found is not None):
            [group(draw, "") for _ in range(6)]
            continue
        with Counted() as counted:
            update = learner.train_policy(
                [group(draw, f"{step} {i}") for i in range(6)],
                settings,
                reference=reference,
                mini_batches=2,
                micro_batch_tokens=40,
                random=Random(step),
            )
        COUNTED.append(dict(counted.bytes))
        losses += [one.loss for one in update.steps]
        if step == 0:
            AFTER_ONE.update(copy.deepcopy(whole(state())))
            if saver:
                saver.save(1, state(), {}, (), last=False)
    if saver:
        saver.wait()
    with gathered(model):
        weights = [p.detach().clone() for p in model.parameters()]
    return losses, weights, update.logprob_difference_mean


def group(draw: Random, name: str) -> RolloutGroup:
    prompt = Prompt(name, tuple(draw.randrange(19) for _ in range(draw.randrange(2, 9))), "", None, "t")
    rollouts = []
    for _ in range(4):
        tokens = [draw.randrange(19) for _ in range(draw.randrange(1, 14))]
        rollouts.append(Rollout(tokens, [-draw.random() for _ in tokens], "stop", reward=draw.random()))
    return RolloutGroup(prompt, rollouts, 0)
