"""Checkpoints: what is written loads in transformers with equal logits, and what is broken is named."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from checkpoints import LAYOUTS, LENGTHS, ROPES, assert_equal, make, packed, their_logits
from safetensors.torch import load_file, save_file

import r1fast
from r1fast.config import UserError
from r1fast.model import weights
from r1fast.model.decoder import Decoder, DecoderConfig
from r1fast.model.reward_model import RewardModel
from r1fast.model.tokenizer import apply_template, build_word_tokenizer, set_template
from r1fast.model.weights import load, load_reward_model, save, save_reward_model

WORDS = [f"w{i}" for i in range(56)]  # with the five specials: a vocabulary of 61, the checkpoints' own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_checkpoints_load_in_transformers_with_equal_logits(tmp_path, layout):
    rope = ROPES[{"Llama": "llama3", "Qwen2": "yarn", "Qwen3": "default"}[LAYOUTS[layout][0]]]
    make(tmp_path / "theirs", *LAYOUTS[layout], rope)
    model, tokenizer = load(tmp_path / "theirs")
    assert tokenizer is None
    with torch.no_grad():  # so that what is saved is this model and not the file it came from
        for parameter in model.parameters():
            parameter.mul_(1.1)
    save(model, None, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert back.dtype == torch.float32
    tokens, cu_seqlens = packed()
    ours = model.logits(model.forward_packed(tokens, cu_seqlens))
    assert_equal(their_logits(back, tokens), ours.detach())
    again, _ = load(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(again.logits(again.forward_packed(tokens, cu_seqlens)), ours)


def test_sharded_checkpoints_are_read_and_written(tmp_path, monkeypatch):
    theirs = make(tmp_path / "theirs", *LAYOUTS["qwen3-gqa"])
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model, _ = load(tmp_path / "sharded")
    tokens, cu_seqlens = packed()
    logits = model.logits(model.forward_packed(tokens, cu_seqlens))
    assert_equal(logits, their_logits(theirs, tokens))
    monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000)
    save(model, None, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_equal(their_logits(back, tokens), logits.detach())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_converted_and_kept(tmp_path, dtype):
    make(tmp_path / "theirs", *LAYOUTS["qwen2-gqa"])
    model, _ = load(tmp_path / "theirs", dtype=dtype)
    assert model.dtype == weights.DTYPES[dtype]
    save(model, None, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == weights.DTYPES[dtype]
    assert torch.equal(back.get_input_embeddings().weight, model.embedding)
    assert load(tmp_path / "ours", dtype="auto")[0].dtype == torch.float32
    with pytest.raises(UserError, match="dtype 'float8' is unknown"):
        load(tmp_path / "ours", dtype="float8")


def test_the_tokenizer_travels_with_its_chat_template(tmp_path):
    model = Decoder(
        DecoderConfig(vocab_size=61, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, head_dim=8)
    )
    model.initialize(0)
    save(model, build_word_tokenizer(WORDS), tmp_path / "tiny")
    model, tokenizer = load(tmp_path / "tiny")
    assert model.config.eos_token_ids == (tokenizer.eos_token_id,)  # filled from the tokenizer when it was saved
    assert model.config.pad_token_id == tokenizer.pad_token_id
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    messages = [{"role": "user", "content": "w3 w1"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(apply_template(tokenizer, "w3 w1")) == expected and len(expected) == 4
    set_template(tokenizer, "paper")
    save(model, tokenizer, tmp_path / "paper")
    assert load(tmp_path / "paper")[1].chat_template == tokenizer.chat_template != theirs.chat_template


def test_every_end_of_sequence_id_is_known(tmp_path):
    """Qwen2.5-Instruct keeps its second one in generation_config.json alone."""
    make(tmp_path, *LAYOUTS["qwen2-gqa"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    model, _ = load(tmp_path)
    assert model.config.eos_token_ids == (1, 7)
    save(model, None, tmp_path / "ours")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id == [1, 7]


@pytest.mark.parametrize("layout", ["llama-mha", "qwen2-tied", "qwen3-gqa"])
def test_reward_models_load_in_transformers(tmp_path, layout):
    make(tmp_path / "policy", *LAYOUTS[layout])
    model, _ = load(tmp_path / "policy")
    reward_model = RewardModel.from_decoder(model, seed=1)
    save_reward_model(reward_model, None, tmp_path / "reward")
    tokens, cu_seqlens = packed()
    tokens[tokens == model.config.pad_token_id] = 5  # transformers looks for the last token that is not the pad
    scores = reward_model(tokens, cu_seqlens).detach()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert theirs.num_labels == 1
    with torch.no_grad():
        expected = torch.cat([theirs(part[None]).logits[0] for part in tokens.split(list(LENGTHS))])
    assert_equal(scores, expected)
    back, _ = load_reward_model(tmp_path / "reward")
    assert torch.equal(back(tokens, cu_seqlens), scores)
    with pytest.raises(UserError, match=r"score\.weight"):
        load(tmp_path / "reward")


def test_a_reward_model_needs_a_pad(tmp_path):
    config = DecoderConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, head_dim=8
    )
    with pytest.raises(UserError, match="needs a pad token id"):
        save_reward_model(RewardModel(Decoder(config, head=False)), None, tmp_path / "reward")
    save_reward_model(RewardModel(Decoder(config, head=False)), build_word_tokenizer(WORDS), tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["pad_token_id"] == 0


# -- broken checkpoints ---------------------------------------------------------------------------------------


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(tensors):
    del tensors["model.layers.1.self_attn.k_proj.bias"]


def add(tensors):
    tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2)


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "'model.layers.1.self_attn.k_proj.bias' is missing"),
        (add, "'model.layers.0.mlp.extra.weight' is in the files which this architecture does not have"),
        (reshape, r"'model.norm.weight' is \[3\], config.json says \[48\]"),
    ],
)
def test_a_broken_checkpoint_names_its_tensor(tmp_path, change, said):
    make(tmp_path, *LAYOUTS["qwen2-gqa"])
    edit_tensors(tmp_path, change)
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_tied_checkpoints_may_carry_their_head(tmp_path):
    theirs = make(tmp_path, *LAYOUTS["qwen2-tied"])
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1}))
    tokens, cu_seqlens = packed()
    model, _ = load(tmp_path)
    assert_equal(model.logits(model.forward_packed(tokens, cu_seqlens)), their_logits(theirs, tokens))


def test_a_tokenizer_that_the_embedding_cannot_hold_is_refused(tmp_path):
    make(tmp_path, *LAYOUTS["qwen2-gqa"])
    build_word_tokenizer([*WORDS, "one-more"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer has 62 tokens, its embedding only 61"):
        load(tmp_path)


def test_the_public_names_are_these():
    assert r1fast.load is load and r1fast.save is save


def test_a_folder_that_is_no_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    make(tmp_path / "whole", *LAYOUTS["qwen2-gqa"])
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors is missing .*convert"):
        load(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load(tmp_path / "whole")


# -- atomic writing -------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole(tmp_path):
    make(tmp_path / "theirs", *LAYOUTS["qwen3-gqa"])
    model, _ = load(tmp_path / "theirs")
    target = tmp_path / "new" / "checkpoint"
    target.mkdir(parents=True)
    (target / "stale.bin").write_text("old")
    save(model, None, target)
    assert not (target / "stale.bin").exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["checkpoint"]  # nothing temporary is left


@pytest.mark.parametrize("step", ["_write_tensors", "_sync"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    make(tmp_path / "theirs", *LAYOUTS["qwen3-gqa"])
    model, _ = load(tmp_path / "theirs")
    save(model, None, tmp_path / "checkpoint")
    before = {name: os.stat(tmp_path / "checkpoint" / name).st_mtime_ns for name in os.listdir(tmp_path / "checkpoint")}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, None, tmp_path / "checkpoint")
    after = {name: os.stat(tmp_path / "checkpoint" / name).st_mtime_ns for name in os.listdir(tmp_path / "checkpoint")}
    assert after == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "theirs"]
