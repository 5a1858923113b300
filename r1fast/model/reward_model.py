"""A decoder with one score instead of a head: what Bradley-Terry training writes and preference rewards read.

The score is taken at the last token, as transformers' `...ForSequenceClassification` does, so that a saved reward
model is also one of theirs. Theirs looks for the rightmost token that is not the pad: end no sequence with the pad.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.model.decoder import Decoder


class RewardModel(nn.Module):
    def __init__(self, trunk: Decoder) -> None:
        """`trunk`: a decoder without a head; it is held, not copied. The score starts at zero."""
        super().__init__()
        self.trunk = trunk
        self.score = nn.Parameter(torch.zeros(1, trunk.config.hidden_size, device=trunk.device, dtype=trunk.dtype))

    @classmethod
    def from_decoder(cls, model: Decoder, seed: int) -> RewardModel:
        """A copy of the policy's trunk under a new score, normal with std 1/sqrt(hidden + 1) (Stiennon et al. 2020)."""
        trunk = copy.deepcopy(model)
        trunk.head = None
        trunk.requires_grad_(True)
        reward_model = cls(trunk)
        noise = torch.randn(reward_model.score.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            reward_model.score.copy_(noise * (model.config.hidden_size + 1) ** -0.5)
        return reward_model

    @property
    def config(self):
        return self.trunk.config

    @property
    def tensor(self):
        return self.trunk.tensor

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    def forward_packed(
        self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """float32 [B]: the score of each sequence, at its last token. Arguments as `Decoder.forward_packed`."""
        hidden = self.trunk.forward_packed(tokens, cu_seqlens, positions, max_seqlen)
        last = hidden[cu_seqlens[1:].long() - 1]
        return F.linear(last, self.score).squeeze(-1).float()

    forward = forward_packed
