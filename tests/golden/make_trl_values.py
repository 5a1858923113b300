"""Writes trl_values.json: the loss and gradients of TRL's own GRPOTrainer.compute_loss on fixed small tensors.

Run it with TRL 1.16.0 and torch 2.13.0 installed (TRL is no dependency of r1fast):

    python tests/golden/make_trl_values.py

A real GRPOTrainer is built for every variant, around a model of three parameters that is never called: the one method
replaced is the one that turns token ids into log-probs, which here come from fixed hidden states and a fixed head, so
that the gradients to both can be kept. All in float64. TRL multiplies its KL term by the ratio unless told not to
(DeepSeek-V3.2's correction); R1's objective (DeepSeekMath eq. 3) does not, so it is told not to.
"""

import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

ROWS, LENGTH, HIDDEN, VOCAB, PROMPT, MAX_TOKENS = 6, 7, 4, 9, 2, 11
LENGTHS = [7, 3, 5, 1, 7, 4]
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "grpo-kl-asymmetric": {"loss_type": "grpo", "beta": 0.07, "epsilon": 0.15, "epsilon_high": 0.4},
    "grpo-eps-10": {"loss_type": "grpo", "beta": 0.001, "epsilon": 10.0, "epsilon_high": 10.0},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dapo-kl": {"loss_type": "dapo", "beta": 0.05, "epsilon": 0.2, "epsilon_high": 0.28},
    "bnpo-kl": {"loss_type": "bnpo", "beta": 0.05},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dr_grpo-kl-asymmetric": {"loss_type": "dr_grpo", "beta": 0.02, "epsilon": 0.1, "epsilon_high": 0.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "gspo-kl": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.05, "epsilon": 0.2},
    "temperature": {"loss_type": "grpo", "beta": 0.05, "temperature": 0.7},
    "truncated-is": {"loss_type": "dapo", "beta": 0.05, "vllm_importance_sampling_clip_max": 1.1},
}


def fixed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(20501)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": normal(ROWS, LENGTH, HIDDEN),
        "weight": normal(VOCAB, HIDDEN) * 0.7,
        "targets": torch.randint(VOCAB, (ROWS, LENGTH), generator=generator),
        "old_noise": normal(ROWS, LENGTH) * 0.25,
        "ref_noise": normal(ROWS, LENGTH) * 0.5,
        "sampler_noise": normal(ROWS, LENGTH) * 0.3,
        "advantages": torch.tensor([1.2, -0.7, 0.0, -1.4, 0.4, 0.9], dtype=torch.float64),
    }


def log_probs(hidden, weight, targets, temperature):
    logits = hidden @ weight.T / temperature
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def trainer_for(settings: dict, folder: str) -> GRPOTrainer:
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<eos>": VOCAB - 2, "<pad>": VOCAB - 1}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")  # a path: TRL loads its own reference from it
    tokenizer.save_pretrained(f"{folder}/model")
    args = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], num_generations=2, per_device_train_batch_size=2,
        max_completion_length=MAX_TOKENS, use_bias_correction_kl=False, **settings,
    )  # fmt: skip
    return GRPOTrainer(
        f"{folder}/model", reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": "w1"}] * 4),
    )  # fmt: skip


def measure(settings: dict, tensors: dict, folder: str) -> dict:
    trainer = trainer_for(settings, folder)
    temperature = settings.get("temperature", 1.0)
    hidden = tensors["hidden"].clone().requires_grad_()
    weight = tensors["weight"].clone().requires_grad_()
    logp = log_probs(hidden, weight, tensors["targets"], temperature)
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": tensors["targets"],
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": logp.detach() + tensors["old_noise"],
        "ref_per_token_logps": logp.detach() + tensors["ref_noise"],
        "num_items_in_batch": mask.sum(),
    }
    if "vllm_importance_sampling_clip_max" in settings:
        trainer.use_vllm = True  # only the loss looks at it from here on
        ratio = torch.exp(tensors["sampler_noise"])  # pi_old / pi_sampler, as TRL has it
        inputs["importance_sampling_ratio"] = torch.clamp(ratio, max=settings["vllm_importance_sampling_clip_max"])
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {"d_hidden": hidden.grad.tolist(), "d_weight": weight.grad.tolist()}
    return {"settings": settings, "loss": loss.item(), **gradients}


def main() -> None:
    tensors = fixed_tensors()
    with tempfile.TemporaryDirectory() as folder:
        values = {name: measure(settings, tensors, folder) for name, settings in VARIANTS.items()}
    import trl

    facts = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0], "lengths": LENGTHS, "prompt": PROMPT}
    facts["max_tokens"] = MAX_TOKENS
    document = {**facts, "tensors": {k: v.tolist() for k, v in tensors.items()}, "variants": values}
    Path(__file__).with_name("trl_values.json").write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
