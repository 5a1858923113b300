"""Real input: every stage of the preset `gsm8k` on GSM8K's own rows, from a checkpoint that transformers wrote.

The checkpoint is random, so nothing is right and nothing is learned; what is proved is that the stages run on foreign
weights and a foreign tokenizer, that the real verifier judges, and that what is written loads back with equal logits.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from micro_run import Silent
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import r1fast
from r1fast.config import load_recipe
from r1fast.metrics import read_events
from r1fast.recipe import run

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
RL = ("zero", "reasoning_rl", "all_rl")
SETTINGS = (
    "threads=1",
    "evaluation.limit=4",
    "evaluation.samples=2",
    "evaluation.curve_limit=2",
    "evaluation.curve_samples=2",
    "evaluation.sampling.max_tokens=16",
    *(f"stages.{name}.steps=2" for name in RL),
    *(f"stages.{name}.prompts_per_step=2" for name in RL),
    *(f"stages.{name}.group_size=2" for name in RL),
    *(f"stages.{name}.evaluate_every=2" for name in RL),
    *(f"stages.{name}.sampling.max_tokens=16" for name in (*RL, "cold_data", "rejection", "distill_data")),
    *(f"stages.{name}.prompts=4" for name in ("cold_data", "rejection", "distill_data")),
    *(f"stages.{name}.samples=2" for name in ("cold_data", "rejection", "distill_data")),
    *(f"stages.{name}.at_least=0" for name in ("cold_data", "rejection", "distill_data")),
    "stages.cold_start.data=[{stage: cold_data}, {task: gsm8k, limit: 12}]",
    "stages.rejection.general=[{task: chat, limit: 12}]",
    "stages.distill_data.general=[{task: chat, limit: 12}]",
    *(f"stages.{name}.batch_examples=8" for name in ("cold_start", "sft", "distill")),
    *(f"stages.{name}.epochs=1" for name in ("cold_start", "sft", "distill")),
    "stages.preference.pairs=8",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    if not DATA.is_file():
        pytest.skip(f"GSM8K's rows are not at {DATA}")
    path = tmp_path_factory.mktemp("rows") / "gsm8k.jsonl"
    path.write_text("".join(line + "\n" for line in DATA.read_text().splitlines()[:400]))
    return path


def byte_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


@pytest.fixture(scope="module")
def checkpoint(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer(json.loads(line)["question"] for line in rows.read_text().splitlines())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=0, pad_token_id=1, **sizes
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(rows, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "gsm8k"
    recipe = load_recipe("gsm8k", [f"model.path={checkpoint}", f"data={rows}", *SETTINGS])
    return out, run(recipe, out, progress=Silent())


def test_every_stage_ran(done):
    out, summary = done
    kinds = {s["kind"] for s in summary["stages"]}
    assert kinds == {"evaluate", "grpo", "reject", "sft", "reward_model", "distill"}
    steps = [e for e in read_events(out) if e["event"] == "step" and e["stage"] == "zero"]
    assert len(steps) == 2
    for step in steps:
        assert set(step["rewards"]) == {"accuracy", "format"} and step["errors"] == 0
        assert step["logprob_difference_max"] < 1e-4


def test_checkpoints_load_back_in_transformers_with_equal_logits(done):
    out, _ = done
    for stage in ("zero", "all_rl", "distill"):
        folder = out / "stages" / stage / "checkpoint"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs) is transformers.Qwen2ForCausalLM
        ours, tokenizer = r1fast.load(folder)
        tokens = torch.tensor(tokenizer("Natalia sold clips to 48 of her friends.").input_ids)
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
            got = ours.logits(ours.forward_packed(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)))
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_stages_changed_the_weights_that_they_trained(done, checkpoint):
    out, _ = done
    before = r1fast.load(checkpoint)[0].head_weight
    after = r1fast.load(out / "stages" / "cold_start" / "checkpoint")[0].head_weight
    assert (before - after).abs().max() > 1e-6


def test_the_written_solutions_and_the_template_are_the_papers(done):
    out, _ = done
    _, tokenizer = r1fast.load(out / "stages" / "zero" / "checkpoint")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("A conversation between User and Assistant.") and text.endswith("Assistant:")
    assert "<think>" in text and "2 + 2?" in text
