"""The models that are measured: Qwen2.5's published shapes with random weights, or a small one without a GPU.

Random weights are enough for times. They are drawn so that the distribution over the words is neither flat nor peaked
(logits of standard deviation about 1.5, which is what the sampler-trainer difference is measured on too). Attention is
Qwen3's, a norm of each head instead of a bias: what costs time is the same to a thousandth, and transformers reads a
tokenizer of plain words beside no Qwen2 checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.measure import DEVICE, SMALL
from r1fast.model.decoder import Decoder, DecoderConfig

# Numbers of the config.json of Qwen/Qwen2.5-{0.5B,1.5B,7B}.
QWEN = {
    "0.5B": DecoderConfig(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, layers=24, heads=14, kv_heads=2, head_dim=64,
        architecture="qwen3", max_positions=32_768, rope_theta=1e6, tie_embeddings=True,
    ),
    "1.5B": DecoderConfig(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, layers=28, heads=12, kv_heads=2, head_dim=128,
        architecture="qwen3", max_positions=131_072, rope_theta=1e6, tie_embeddings=True,
    ),
    "7B": DecoderConfig(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, layers=28, heads=28, kv_heads=4, head_dim=128,
        architecture="qwen3", max_positions=131_072, rope_theta=1e6,
    ),
}  # fmt: skip
TINY = DecoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=160, layers=2, heads=4, kv_heads=2, head_dim=16,
    architecture="qwen3", max_positions=1024, tie_embeddings=True,
)  # fmt: skip
MODELS = {"tiny": TINY} if SMALL else {name: QWEN[name] for name in ("0.5B", "1.5B")}  # that are run whole
DTYPE = torch.float32 if SMALL else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the ops are measured on. `virtual`: tensors are not filled, for a compiler that only asks for shapes."""

    models: dict[str, DecoderConfig]
    heads: dict[str, DecoderConfig]  # whose output heads are measured
    tokens: int  # of a micro-batch, 64 times as many of a whole batch
    length: int  # of a packed sequence
    sequences: int  # that decode together
    contexts: tuple[int, ...]
    rewards: dict[str, int]
    device: str = DEVICE
    dtype: torch.dtype = DTYPE
    virtual: bool = False

    @property
    def config(self) -> DecoderConfig:
        """Of the ops that are measured on one model: the largest that is run whole."""
        return list(self.models.values())[-1]


REWARDS = {"1M": 1 << 20, "64M": 1 << 26}
ON_A_CARD = Sizes({n: QWEN[n] for n in ("0.5B", "1.5B")}, QWEN, 32_768, 1024, 512, (1024, 2048), REWARDS, "cuda",
                  torch.bfloat16)  # fmt: skip
IN_SMALL = Sizes({"tiny": TINY}, {"tiny": TINY}, 256, 64, 8, (64, 128), {n: r >> 10 for n, r in REWARDS.items()})
# As on a card in all that a kernel's settings follow from, with few rows; the products beside them are made short.
TO_COMPILE = replace(
    ON_A_CARD, tokens=64, length=32, sequences=2, rewards={"1M": 64}, device="cpu", virtual=True,
    heads={name: replace(config, hidden_size=64) for name, config in QWEN.items()},
)  # fmt: skip
SIZES = IN_SMALL if SMALL else ON_A_CARD


@torch.no_grad()
def random_model(config: DecoderConfig) -> Decoder:
    """On the device from the start: drawing 1.5B numbers on the host would take a quarter of a minute."""
    model = Decoder(config, device=DEVICE, dtype=DTYPE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            scale = 1.5 if parameter is model.embedding else 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
    return model.requires_grad_(False)
