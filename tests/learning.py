"""A few GRPO steps in float64 on made-up rollouts: what tests of many ranks compare."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from benchmarks.scaling_model import Counted
from r1fast.learn import policy
from r1fast.learn.learner import Learner
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.lora import BasePolicy, add_adapters
from r1fast.model.sharding import gathered, shard, whole
from r1fast.model.weights import clone
from r1fast.schema import CheckpointConfig, LoRAConfig, ObjectiveConfig, OptimizerConfig
from r1fast.stages.saved import mesh_of, read
from r1fast.stages.saving import Saver
from r1fast.stages.steps import PolicyState
from r1fast.types import Prompt, Rollout, RolloutGroup

LAST: dict = {}  # models and learner of the last `train`
COUNTED: list = []  # of each step: bytes of its collectives by kind, and the passes that they were for
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
    dtype: torch.dtype = torch.float64,
    states: str = "float32",
    lora: LoRAConfig | None = None,
    recompute: bool = False,
) -> tuple[list[float], list[torch.Tensor], float]:
    """(losses of three steps of two mini-batches, the weights after them, the log-prob difference told).

    saved: what `AFTER_ONE` held after the first step, or found: the folder of a snapshot of it; the other two are then
    done. within: see `shard`. written: where such a snapshot is written, beside the second step. What it ends with is
    in `LAST`."""
    model = Decoder(CONFIG, dtype=dtype).initialize(3)
    model.recompute = recompute
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.head.copy_(torch.randn(model.head.shape, generator=generator))
    settings = ObjectiveConfig(**objective)
    models = [model]
    if lora is not None:
        add_adapters(model, lora, 7)
    elif settings.kl_coef:
        models.append(clone(model))
    reference = (models[1] if lora is None else BasePolicy(model)) if settings.kl_coef else None
    passes = Counter()
    for each in models:
        if sharded:
            shard(each, within)
        each.forward_packed = counting(each.forward_packed, passes)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-3, states=states), 6)
    LAST.update(models=models, learner=learner)
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
        passes.clear()
        with Counted() as counted, counted_scorings(passes):
            update = learner.train_policy(
                [group(draw, f"{step} {i}") for i in range(6)],
                settings,
                reference=reference,
                mini_batches=2,
                micro_batch_tokens=24,
                random=Random(step),
            )
        COUNTED.append({**counted.bytes, "passes": dict(passes)})
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


def counting(forward: Callable, passes: Counter) -> Callable:
    def counted(*arguments):
        passes["learned" if torch.is_grad_enabled() else "scored"] += 1
        return forward(*arguments)

    return counted


@contextmanager
def counted_scorings(passes: Counter) -> Iterator[None]:
    """Counts the calls of `log_probs`."""
    plain = policy.log_probs

    def log_probs(*arguments):
        passes["scorings"] += 1
        return plain(*arguments)

    policy.log_probs = log_probs
    try:
        yield
    finally:
        policy.log_probs = plain


def group(draw: Random, name: str) -> RolloutGroup:
    prompt = Prompt(name, tuple(draw.randrange(19) for _ in range(draw.randrange(2, 9))), "", None, "t")
    rollouts = []
    for _ in range(4):
        tokens = [draw.randrange(19) for _ in range(draw.randrange(1, 14))]
        rollouts.append(Rollout(tokens, [-draw.random() for _ in tokens], "stop", reward=draw.random()))
    return RolloutGroup(prompt, rollouts, 0)
