"""Adapters: what peft reads back computes the same, merging is exact both ways, the reference is the base."""

import json
from random import Random

import pytest
import torch
from checkpoints import LAYOUTS, assert_equal, make
from micro_run import run_micro_stages
from rollouts import sampled_groups, tiny_decoder

from r1fast.config import UserError
from r1fast.learn.learner import Learner
from r1fast.learn.losses import log_probs
from r1fast.learn.packing import pack, rows_from_groups
from r1fast.model.lora import (
    BasePolicy,
    adapter_parameters,
    adapters,
    add_adapters,
    base_only,
    fold,
    merged,
    save_adapter,
)
from r1fast.model.weights import load, save
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.schema import LoRAConfig, ObjectiveConfig, OptimizerConfig

ALL = LoRAConfig(rank=3, alpha=6.0)
SOME = LoRAConfig(rank=2, alpha=1.0, targets=("q_proj", "v_proj", "up_proj"))
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
ENDS = torch.tensor([0, 4, 11], dtype=torch.int32)


def with_adapters(model, config: LoRAConfig):
    add_adapters(model, config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B is zero at first, which would hide everything
        for _, _, adapter in adapters(model):
            for b in adapter.b:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.forward_packed(TOKENS, ENDS))


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained():
    model = tiny_decoder()
    before = logits(model)
    add_adapters(model, ALL, 0)
    assert torch.equal(logits(model), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter_parameters(model.config, ALL) > 0
    assert {id(p) for p in trained} == {id(p) for _, _, a in adapters(model) for p in (a.a, *a.b)}


@pytest.mark.parametrize("config", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen2-gqa", "qwen3-gqa"])
def test_peft_loads_what_is_saved_with_equal_logits(name, config, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make(tmp_path / "base", *LAYOUTS[name])
    model, _ = load(tmp_path / "base")
    base = logits(model)
    with_adapters(model, config)
    save_adapter(model, config, str(tmp_path / "base"), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ours = logits(model)
    assert (ours - base).abs().max() > 0.05
    with torch.no_grad():
        for a, b in ((0, 4), (4, 11)):
            assert_equal(ours[a:b], theirs(TOKENS[None, a:b]).logits[0])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == config.rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_the_adapters_and_leaving_it_is_exact(dtype):
    model = with_adapters(tiny_decoder(dtype=dtype), SOME)
    places = [p.data_ptr() for p in model.parameters()]
    weights, beside = bits(model), logits(model)
    fused = [layer.qkv_proj.detach().clone() for layer in model.layers]
    with merged(model):
        together = logits(model)
        assert [p.data_ptr() for p in model.parameters()] == places
        assert not any(
            torch.equal(a, b) for a, b in zip((layer.qkv_proj for layer in model.layers), fused, strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(bits(model), weights, strict=True))
    assert torch.equal(logits(model), beside)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert 0 < (together - beside).abs().max() < bound
    with pytest.raises(RuntimeError, match="in between"), merged(model):
        raise RuntimeError("in between")
    assert all(torch.equal(a, b) for a, b in zip(bits(model), weights, strict=True))


def test_folding_leaves_an_ordinary_model(tmp_path):
    model = with_adapters(tiny_decoder(), ALL)
    with merged(model):
        together = logits(model)
    fold(model)
    assert torch.equal(logits(model), together) and not list(adapters(model))
    save(model, None, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert torch.equal(logits(again), together)


def test_the_reference_is_the_base_and_an_update_moves_the_adapters_alone():
    model = tiny_decoder(dtype=torch.float64)
    groups = sampled_groups(model, prompts=4)
    batches = pack(rows_from_groups(groups, torch.zeros(16)), None, 1000)
    base = log_probs(model, batches)
    with_adapters(model, ALL)
    assert (log_probs(model, batches)[0] - base[0]).abs().max() > 0.01
    assert torch.equal(log_probs(BasePolicy(model), batches)[0], base[0])
    own = [p for p in model.parameters() if not p.requires_grad]
    before, start = [p.detach().clone() for p in own], bits(model)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-2), 10)
    update = learner.train_policy(
        groups, ObjectiveConfig(kl_coef=0.1), random=Random(0), reference=BasePolicy(model), old_logprobs="recompute"
    )
    assert update.kl > 1e-3 and update.grad_norm > 0
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(bits(model), start, strict=True)]
    assert sum(moved) == len(learner.parameters) == sum(1 + len(a.b) for _, _, a in adapters(model))


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    """dB = s dW A^T and dA = s B^T dW, the gradient dW taken by a model that holds W + s B A itself."""
    model = with_adapters(tiny_decoder(dtype=torch.float64), SOME)
    whole = tiny_decoder(dtype=torch.float64)
    for (_, name, adapter), layer in zip(adapters(model), [x for x in whole.layers for _ in range(2)], strict=True):
        with torch.no_grad():
            getattr(layer, name).add_(adapter.delta().double())
    for each in (model, whole):
        each.logits(each.forward_packed(TOKENS, ENDS)).square().mean().backward()
    compared = 0
    for (_, name, adapter), layer in zip(adapters(model), [x for x in whole.layers for _ in range(2)], strict=True):
        gradients = getattr(layer, name).grad.split(adapter.rows)
        targeted = [g for g, is_target in zip(gradients, adapter.targeted, strict=True) if is_target]
        for part, (d_w, b) in enumerate(zip(targeted, adapter.b, strict=True)):
            rows = slice(part * adapter.rank, (part + 1) * adapter.rank)
            torch.testing.assert_close(b.grad, adapter.scale * d_w @ adapter.a[rows].T, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(adapter.a.grad[rows], adapter.scale * b.T @ d_w, rtol=1e-4, atol=1e-7)
            compared += b.grad.abs().sum() > 0
    assert compared == 6


def test_the_sampler_draws_from_the_merged_weights():
    model = with_adapters(tiny_decoder(), ALL)
    sampler, params = Sampler(model), SamplingParams(n=4, max_tokens=6)
    with base_only(model):
        (without,) = sampler.sample([[1, 2, 3]], params)
    with merged(model):
        (group,) = sampler.sample([[1, 2, 3]], params)
    assert [r.logprobs for r in without.rollouts] != [r.logprobs for r in group.rollouts]
    batches = pack(rows_from_groups([group], torch.zeros(4)), None, 1000)
    found = torch.tensor([x for r in group.rollouts for x in r.logprobs])
    torch.testing.assert_close(log_probs(model, batches)[0], found, rtol=0, atol=1e-4)


def test_a_stage_trains_adapters_and_leaves_both_kinds_of_checkpoint(micro, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stages = {
        "sft": {"kind": "sft", "data": [{"task": "totals", "limit": 32}], "batch_examples": 16, "evaluate": False},
        "rl": {
            "kind": "grpo", "steps": 2, "prompts_per_step": 4, "group_size": 4, "evaluate": False,
            "mix": [{"task": "totals", "rewards": {"language": 1.0}}], "sampling": {"max_tokens": 24},
            "objective": {"kl_coef": 0.01},
        },
    }  # fmt: skip
    for stage in stages.values():
        stage |= {"adapters": {"rank": 4}, "optimizer": {"learning_rate": 1e-2}}
    run_micro_stages(tmp_path / "run", micro, stages)
    for name in stages:
        folder = tmp_path / "run" / "stages" / name
        base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        ours, _ = load(folder / "checkpoint")
        plain, _ = load(base)
        tokens = torch.arange(5, 25)[None]
        with torch.no_grad():
            found = ours.logits(ours.forward_packed(tokens[0], torch.tensor([0, 20], dtype=torch.int32)))
            before = plain.logits(plain.forward_packed(tokens[0], torch.tensor([0, 20], dtype=torch.int32)))
            torch.testing.assert_close(adapted(tokens).logits[0], found, rtol=1e-3, atol=1e-3)
        assert (found - before).abs().max() > 0.02


def test_a_reference_that_would_be_refreshed_is_refused(micro, tmp_path):
    stage = {"kind": "grpo", "mix": [{"task": "totals"}], "adapters": {}, "reference_refresh": 4}
    with pytest.raises(UserError, match=r"stages.rl.reference_refresh cannot be kept with adapters"):
        run_micro_stages(tmp_path / "run", micro, {"rl": stage})
