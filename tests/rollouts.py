"""A tiny decoder and made-up rollouts for the tests of learning."""

from __future__ import annotations

from random import Random

import torch

from r1fast.learn.losses import log_probs
from r1fast.learn.packing import Row, pack, plan, row_lengths, unpack
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.types import Prompt, Rollout, RolloutGroup

VOCAB = 19


def tiny_decoder(seed: int = 0, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> Decoder:
    config = DecoderConfig.from_hf(
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 24,
            "rope_theta": 100.0,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        }
    )
    model = Decoder(config, dtype=dtype).initialize(seed)
    with torch.no_grad():
        noise = torch.randn(model.head.shape, generator=torch.Generator().manual_seed(seed + 1))
        model.head.copy_(noise * 0.3)  # a zero head would make every policy the uniform one
    return model


def sampled_groups(model: Decoder, prompts: int = 4, size: int = 4, seed: int = 0, noise: float = 0.0, constant=()):
    """Groups of random tokens whose log-probs are the model's own, give or take `noise`. Groups in `constant` have
    equal rewards."""
    random = Random(seed)
    groups = []
    for p in range(prompts):
        tokens = tuple(random.randrange(VOCAB) for _ in range(random.randint(1, 6)))
        rows = [Row([*tokens, *random.choices(range(VOCAB), k=random.randint(1, 9))], len(tokens)) for _ in range(size)]
        order = plan(row_lengths(rows), 1000)
        batches = pack(rows, None, 1000, "cpu", order)
        logps = unpack(log_probs(model, batches), batches, order)
        rollouts = []
        for row, logp in zip(rows, logps, strict=True):
            reward = 1.0 if p in constant else random.choice([0.0, 0.2, 1.0, 1.2])
            found = [float(x) + noise * random.gauss(0, 1) for x in logp]
            rollouts.append(Rollout(list(row.tokens[row.prompt_length :]), found, "stop", reward=reward))
        prompt = Prompt(str(p), tokens, "", None, "made-up")
        groups.append(RolloutGroup(prompt, rollouts, model.weights_version))
    return groups
