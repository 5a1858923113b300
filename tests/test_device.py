"""A whole model on the device that is here, by the ops that it takes by itself, beside plain torch on the CPU.

On a GPU this is the one place where model, sampler and learner run together on it; without one it holds the CPU's
native ops to the references.
"""

import copy
from contextlib import nullcontext
from random import Random

import pytest
import torch
from sampling import VOCABULARY, assert_logprobs_close, make_prompts, tokens_of

from r1fast.learn.learner import Learner
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.weights import clone
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.schema import ObjectiveConfig, OptimizerConfig
from r1fast.types import Prompt, Rollout, RolloutGroup
from r1fast_kernels import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURES = ("qwen3", "qwen2", "llama")


def pair(architecture: str) -> tuple[Decoder, Decoder]:
    """The same weights on the CPU and here; logits neither flat nor peaked."""
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "max_positions": 128}
    model = Decoder(DecoderConfig(VOCABULARY, 128, 192, architecture=architecture, **sizes)).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.normal_(0, 0.15, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits(architecture):
    plain, here = pair(architecture)
    tokens = torch.randint(VOCABULARY, (90,), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([0, 3, 4, 60, 90], dtype=torch.int32)
    with torch.no_grad():
        with use_backend("reference"):
            expected = plain.logits(plain.forward_packed(tokens, starts))
        found = here.logits(here.forward_packed(tokens.to(DEVICE), starts.to(DEVICE)))
    assert expected.std() > 0.5
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"n": 5}, {"top_p": 0.9, "top_k": 20, "n": 3}])
def test_the_same_tokens_are_drawn(architecture, how):
    plain, here = pair(architecture)
    prompts, params = make_prompts(6), SamplingParams(max_tokens=24, seed=4, **how)
    with use_backend("reference"):
        expected = Sampler(plain, block_size=8).sample(prompts, params)
    found = Sampler(here, block_size=8).sample(prompts, params)
    assert tokens_of(found) == tokens_of(expected)
    assert_logprobs_close(found, expected, atol=1e-4)


def groups(seed: int) -> list[RolloutGroup]:
    draw, found = Random(seed), []
    for i in range(4):
        prompt = Prompt(f"{i}", tuple(draw.randrange(VOCABULARY) for _ in range(draw.randrange(2, 20))), "", None, "t")
        rollouts = []
        for _ in range(4):
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 30))]
            rollouts.append(Rollout(tokens, [-4 + draw.random() for _ in tokens], "stop", reward=draw.random()))
        found.append(RolloutGroup(prompt, rollouts, 0))
    return found


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_an_update_moves_the_weights_alike(kl_coef):
    """Adam's first step is a sign, which a gradient near zero may have either way: norm and direction are compared."""
    moved, told = [], []
    for model, backend in zip(pair("qwen3"), ("reference", None), strict=True):
        before = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
        learner, settings = Learner(model, OptimizerConfig(learning_rate=1e-3), 10), ObjectiveConfig(kl_coef=kl_coef)
        how = {"reference": clone(model) if kl_coef else None, "micro_batch_tokens": 200, "random": Random(0)}
        with use_backend(backend) if backend else nullcontext():
            told.append(learner.train_policy(groups(1), settings, **how))
        moved.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]) - before)
    assert told[0].grad_norm == pytest.approx(told[1].grad_norm, rel=1e-4) and told[0].grad_norm > 0
    assert told[0].loss == pytest.approx(told[1].loss, rel=1e-4, abs=1e-6)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.999
