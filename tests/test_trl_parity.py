"""Our loss and gradients beside TRL's own: golden/make_trl_values.py ran its GRPOTrainer and wrote the values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from r1fast.learn.losses import policy_loss
from r1fast.learn.packing import Row, loss_weights, pack
from r1fast.schema import ObjectiveConfig

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_values.json").read_text())
TENSORS = {name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["tensors"].items()}
AGGREGATE = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}


class FixedHidden:
    """A model whose hidden states at the trained rows are given: what stands behind TRL's values."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        self.hidden, self.head_weight = hidden, weight

    def at(self, batch, order):
        picked = torch.cat([self.hidden[i, : GOLDEN["lengths"][i]] for i in order])
        full = torch.zeros(batch.tokens.shape[0], picked.shape[1], dtype=picked.dtype)
        self.packed = full.index_copy(0, batch.rows, picked)
        return self

    def forward_packed(self, *_):
        return self.packed


def objective_of(settings: dict) -> ObjectiveConfig:
    low = settings.get("epsilon", 0.2)
    return ObjectiveConfig(
        aggregate=AGGREGATE[settings["loss_type"]],
        importance=settings.get("importance_sampling_level", "token"),
        clip_low=low,
        clip_high=settings.get("epsilon_high", low),
        kl_coef=settings.get("beta", 0.0),
        truncated_is=settings.get("vllm_importance_sampling_clip_max"),
    )


def rows_of(logp: torch.Tensor, objective: ObjectiveConfig) -> list[Row]:
    rows, prompt = [], GOLDEN["prompt"]
    for i, length in enumerate(GOLDEN["lengths"]):
        completion = TENSORS["targets"][i, :length].long().tolist()
        correction = None
        if objective.truncated_is is not None:
            ratio = TENSORS["sampler_noise"][i, :length].exp()
            correction = ratio.clamp(max=objective.truncated_is).tolist()
        rows.append(
            Row(
                [0] * prompt + completion,
                prompt,
                TENSORS["advantages"][i].item(),
                old_logprobs=(logp[i] + TENSORS["old_noise"][i])[:length].tolist(),
                ref_logprobs=(logp[i] + TENSORS["ref_noise"][i])[:length].tolist(),
                correction=correction,
            )
        )
    return rows


@pytest.mark.parametrize("name", GOLDEN["variants"])
@pytest.mark.parametrize("budget", [1000, 12])
def test_loss_and_gradients_equal_trl(name, budget):
    expected = GOLDEN["variants"][name]
    objective, temperature = objective_of(expected["settings"]), expected["settings"].get("temperature", 1.0)
    hidden, weight = (TENSORS[k].clone().requires_grad_() for k in ("hidden", "weight"))
    with torch.no_grad():
        logits = hidden @ weight.T / temperature
        logp = torch.log_softmax(logits, -1).gather(-1, TENSORS["targets"].long().unsqueeze(-1)).squeeze(-1)
    rows = rows_of(logp, objective)
    weights = loss_weights(rows, objective.aggregate, GOLDEN["max_tokens"])
    lengths = np.array([len(row.tokens) - 1 for row in rows])
    order = [[i] for i in range(len(rows))] if budget < lengths.sum() else [list(range(len(rows)))]
    total = 0.0
    for part, batch in zip(order, pack(rows, weights, budget, order=order), strict=True):
        loss, _ = policy_loss(FixedHidden(hidden, weight).at(batch, part), batch, objective, temperature)
        loss.backward()
        total += loss.item()
    # our streams are float32: 1e-7 relative on each row
    assert total == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
    torch.testing.assert_close(
        hidden.grad, torch.tensor(expected["d_hidden"], dtype=torch.float64), rtol=2e-6, atol=1e-7
    )
    torch.testing.assert_close(
        weight.grad, torch.tensor(expected["d_weight"], dtype=torch.float64), rtol=2e-6, atol=1e-7
    )


def test_golden_values_tell_variants_apart():
    losses = [round(v["loss"], 9) for v in GOLDEN["variants"].values()]
    assert len(set(losses)) == len(losses)
    assert GOLDEN["trl"] == "1.16.0"
