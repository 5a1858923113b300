"""A tiny model and small helpers for the tests of the sampler."""

from __future__ import annotations

import random

import torch

from r1fast.model.decoder import Decoder, DecoderConfig

VOCABULARY = 53


def tiny_model() -> Decoder:
    """Random weights whose head is wide enough that distributions are neither flat nor a point."""
    config = DecoderConfig(VOCABULARY, 32, 48, layers=2, heads=4, kv_heads=2, head_dim=8, max_positions=128)
    model = Decoder(config).initialize(0)
    with torch.no_grad():
        model.head.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def make_prompts(count, seed=0, shortest=1, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def tokens_of(groups):
    return [[rollout.tokens for rollout in group.rollouts] for group in groups]


def assert_logprobs_close(groups, others, atol=1e-5):
    for group, other in zip(groups, others, strict=True):
        for a, b in zip(group.rollouts, other.rollouts, strict=True):
            for name in ("logprobs", "logprobs_full"):
                a_values, b_values = (torch.tensor(getattr(rollout, name)) for rollout in (a, b))
                torch.testing.assert_close(a_values, b_values, rtol=0, atol=atol)


def dense_logits(model, prompt, tokens):
    """Logits that each of `tokens` was drawn from, [len(tokens), V], by one packed forward without any cache."""
    row = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        hidden = model.forward_packed(row, torch.tensor([0, len(row)], dtype=torch.int32))
        return model.logits(hidden[len(prompt) - 1 : -1])


def assert_pool_empty(sampler):
    sampler.memory.pool.check([])
    assert sampler.memory.pool.free == sampler.memory.pool.blocks
