"""Supervised and GRPO steps in float64 on made-up rows, samples and snapshots, of one rank or of several that hold the
model together: what tests of tensor parallelism compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

import torch
from learning import group
from torch import Tensor

from benchmarks.scaling_model import Counted
from benchmarks.tensor_scaling import sent, summed
from r1fast.learn.advantages import advantages
from r1fast.learn.learner import Learner
from r1fast.learn.losses import cross_entropy_loss, policy_loss
from r1fast.learn.packing import loss_weights, pack, row_from_example, rows_from_groups
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.lora import add_adapters, fold
from r1fast.model.names import whole_views
from r1fast.model.reward_model import RewardModel
from r1fast.model.tensor_parallel import parameters_of, peers
from r1fast.model.weights import clone
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.schema import CheckpointConfig, LoRAConfig, ObjectiveConfig, OptimizerConfig
from r1fast.stages.saved import mesh_of, read
from r1fast.stages.saving import Saver
from r1fast.stages.steps import PolicyState

WORDS = 19  # of four ranks the last has four words, the others five
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 8, "kv_heads": 4}
MODELS = {
    "qwen3": {},  # norms of q and k
    "qwen2": {"architecture": "qwen2", "tie_embeddings": True},  # biases of q, k and v
    "llama": {"architecture": "llama", "attention_bias": True, "mlp_bias": True},  # biases after the sum of the ranks
}
CASES = {
    "qwen3": {},
    "qwen2": {"objective": {"kl_coef": 0.0, "importance": "sequence"}},
    "llama": {"recompute": True},
    "adapters": {"name": "llama", "adapters": True},
}


def filled(model: Decoder, parameters: dict[str, Tensor], seed: int) -> None:
    """Adds noise that is the same on any number of ranks."""
    generator, tensor = torch.Generator().manual_seed(seed), model.tensor
    with torch.no_grad():
        for key, p in parameters.items():
            shape = p.shape if tensor is None else tensor.whole_shape(key, p, model.config)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
            p += noise if tensor is None else tensor.part(key, noise, model.config)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """No weight is at its initial zero or one."""
    model = Decoder(DecoderConfig(head_dim=4, **SIZES, **MODELS[name]), dtype=dtype, tensor=peers()).initialize(3)
    filled(model, dict(model.named_parameters()), 5)
    return model


def supervised(learner: Learner, draw: Random):
    rows = [row_from_example(*([draw.randrange(WORDS) for _ in range(n)] for n in (3, 5))) for _ in range(6)]
    return learner.step(pack(rows, loss_weights(rows, "token"), 20), cross_entropy_loss)


def gradient(learner: Learner, draw: Random, kind: ObjectiveConfig | str) -> tuple[float, float]:
    """(loss, norm of the whole gradient) of a batch, in float64, which a step tells in float32."""
    if kind == "supervised":
        rows = [row_from_example(*([draw.randrange(WORDS) for _ in range(n)] for n in (3, 5))) for _ in range(6)]
        loss = cross_entropy_loss
    else:
        groups = [group(draw, str(i)) for i in range(3)]
        rows = rows_from_groups(groups, advantages(groups, True))
        loss = partial(policy_loss, objective=kind.model_copy(update={"kl_coef": 0.0}))
    found = learner.accumulate(pack(rows, loss_weights(rows, "token"), 20), loss)
    norm = learner.norm(learner.gradients())
    learner.forget()
    return float(torch.stack(found.losses).sum()), float(norm)


def learn(case: str) -> dict:
    """Two supervised steps, then one set of rollouts in two mini-batches: losses, gradient norms, what was told, and
    the weights after them, whole, under Hugging Face's names."""
    asked = {"name": case, "adapters": False, "recompute": False, "objective": {"kl_coef": 0.05, "aggregate": "token"}}
    asked |= CASES[case]
    model = model_of(asked["name"])
    model.recompute = asked["recompute"]
    settings = ObjectiveConfig(**asked["objective"])
    reference = clone(model) if settings.kl_coef else None
    if asked["adapters"]:
        add_adapters(model, LoRAConfig(rank=3), 7)
        filled(model, {key: p for key, p in model.named_parameters() if ".b." in key}, 9)  # else A has no gradient
    learner = Learner(model, OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.05), 6)
    draw = Random(11)
    exact = [gradient(learner, draw, kind) for kind in ("supervised", settings)]
    told = [supervised(learner, draw) for _ in range(2)]
    update = learner.train_policy(
        [group(draw, str(i)) for i in range(4)],
        settings,
        reference=reference,
        mini_batches=2,
        micro_batch_tokens=40,
        random=Random(1),
    )
    told += update.steps
    whole, own = parameters_of(model), sum(p.numel() for p in model.parameters())
    fold(model)
    return {
        "numbers": [(s.loss, s.grad_norm, s.kl, s.entropy, s.clip_fraction, s.ratio_max) for s in told],
        "exact": exact,
        "difference": update.logprob_difference_mean,
        "weights": {key: value.clone() for key, value in whole_views(model).items()},
        "parameters": (whole, own),
    }


def counted(recompute: bool) -> tuple[int, float]:
    """(bytes that a rank sent for the gradient of three micro-batches, what the cost model says) of two ranks."""
    model, rows = model_of("qwen3"), [row_from_example([1, 2, 3], [4, 5, 6, 7, 8])] * 6
    model.recompute = recompute
    learner, batches = Learner(model, OptimizerConfig(), 1), pack(rows, loss_weights(rows, "token"), 20)
    with Counted() as found:
        learner.accumulate(batches, cross_entropy_loss)
    sizes = [(batch.tokens.shape[0], batch.targets.shape[0], 8, recompute) for batch in batches]
    return found.bytes["added"], sum(sent(summed(model.config, *size), 2) for size in sizes)


def sample() -> tuple:
    """(tokens, log-probs, logits of a prompt) in float64."""
    model = model_of("qwen3")
    prompts = [[1, 2, 3, 4, 5], [6, 7], [1, 2, 3, 8]]
    sampler = Sampler(model, eos_token_id=0, block_size=4, max_seqs=5)  # fewer than there are: rows come and go
    groups = sampler.sample(prompts, SamplingParams(n=4, max_tokens=12, seed=3))
    exact = Sampler(model, eos_token_id=0, block_size=4, exact=True).sample(
        prompts, SamplingParams(n=2, max_tokens=6, temperature=0)
    )
    with torch.no_grad():
        logits = model.logits(model.forward_packed(torch.tensor(prompts[0]), torch.tensor([0, 5], dtype=torch.int32)))
    rollouts = [r for g in [*groups, *exact] for r in g.rollouts]
    return [r.tokens for r in rollouts], [r.logprobs for r in rollouts], logits, sampler.memory.kv.keys.shape[3]


def go_on(folder: Path | None, written: Path | None, dtype: torch.dtype = torch.float64, states: str = "float32"):
    """Two supervised steps of a policy and of a reward model's trunk; the first is done where `folder` holds its
    snapshot. written: where that is written. Returns (losses, whole weights)."""
    model = model_of("qwen3", dtype)
    scorer = RewardModel.from_decoder(model, 1)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-2, states=states), 2)
    draw, losses = Random(2), []
    for step in (1, 2):
        if step == 1 and folder is not None:
            state = {"model": PolicyState(model).state_dict(), "learner": learner.state_dict()}
            saved = read(folder, mesh_of(state))
            PolicyState(model).load_state_dict(saved["model"])
            PolicyState(scorer).load_state_dict(saved["scorer"])
            learner.load_state_dict(saved["learner"])
            for _ in range(48):
                draw.randrange(WORDS)
            continue
        losses.append(supervised(learner, draw).loss)
        if step == 1 and written is not None:
            filled(scorer.trunk, dict(scorer.trunk.named_parameters()), 8)
            state = {"model": PolicyState(model).state_dict(), "scorer": PolicyState(scorer).state_dict()}
            with Saver(written, CheckpointConfig(background="always")) as saver:
                saver.save(1, {**state, "learner": learner.state_dict()}, {}, (), last=False)
    views = {**whole_views(model), **{f"scorer {k}": v for k, v in whole_views(scorer.trunk).items()}}
    return losses, {key: value.clone() for key, value in views.items()}
