"""Random small checkpoints of every architecture, made by transformers, and how to compare with them.

Tolerance: both sides compute in fp32 in slightly different orders; 1e-5 of the largest logit (about 10) leaves an
order of magnitude over what is seen (2e-6) and is a thousand times below what the mutations of test_model.py change.
"""

from __future__ import annotations

import torch
import transformers

VOCAB = 61
LENGTHS = (7, 1, 22, 13)
SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}

LAYOUTS = {
    "llama-mha": ("Llama", {"num_attention_heads": 4}),
    "llama-gqa-biases": (
        "Llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-mqa-tied-wide-heads": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True},
    ),
    "qwen2-gqa": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-gqa": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-bias-tied": (
        "Qwen3",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
# max_position_embeddings is 64, the original context 16: the sequences of 22 rows reach into what is scaled
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.3,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}


def make(folder, family: str, sizes: dict, rope: dict | None = None, seed: int = 0):
    """A random checkpoint by transformers; every weight drawn, so that biases and norms are not what they start as."""
    torch.manual_seed(seed)
    rope = dict(rope or ROPES["default"])
    config = getattr(transformers, f"{family}Config")(
        **{**SMALL, "max_position_embeddings": 64, **sizes}, rope_parameters=rope, pad_token_id=0, eos_token_id=1
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            base = 1.0 if "norm" in name else 0.0
            parameter.copy_(base + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.25))
    theirs.save_pretrained(folder)
    return theirs


def packed(lengths=LENGTHS, seed: int = 1):
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def their_logits(theirs, tokens, lengths=LENGTHS):
    with torch.no_grad():
        return torch.cat([theirs(part[None]).logits[0] for part in tokens.split(list(lengths))])


def assert_equal(actual, expected):
    scale = float(expected.detach().abs().max())
    assert scale > 1e-3, "the expected values are about zero: the comparison would prove nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)
