"""What a config.json may say: what would compute something else than the checkpoint means is refused by name."""

from __future__ import annotations

import pytest
import transformers

from r1fast.config import UserError
from r1fast.model.decoder_config import DecoderConfig, token_ids
from r1fast.schema import ShapeConfig


def hf_config(**changes):
    base = {
        "model_type": "qwen3",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "'mistral' is not supported; r1fast reads Llama"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "use_sliding_window is on"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention are not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "2 heads cannot share 3"),
        ({"head_dim": 5}, "head_dim is 5"),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        DecoderConfig.from_hf(hf_config(**changes))


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle():
    """As in Qwen2.5's own configurations: a window is named and switched off, or begins past the last layer."""
    assert DecoderConfig.from_hf(hf_config(use_sliding_window=False, sliding_window=16, max_window_layers=1))
    assert DecoderConfig.from_hf(hf_config(use_sliding_window=True, sliding_window=16, max_window_layers=2))


def test_a_recipes_shape_becomes_a_configuration_and_comes_back():
    for architecture in ("llama", "qwen2", "qwen3"):
        shape = ShapeConfig(architecture=architecture, tie_embeddings=architecture == "qwen2")
        config = DecoderConfig(vocab_size=250, eos_token_ids=(1, 2), pad_token_id=0, **shape.model_dump())
        assert DecoderConfig.from_hf(config.to_hf()) == config
        assert config.qkv_bias == (architecture == "qwen2") and config.qk_norm == (architecture == "qwen3")
    with pytest.raises(UserError, match="'gpt2' is not supported; r1fast reads Llama"):
        DecoderConfig(architecture="gpt2", vocab_size=9, **{**shape.model_dump(exclude={"architecture"})})
    with pytest.raises(UserError, match="hidden_size 66 is no multiple of 4 heads"):
        DecoderConfig(vocab_size=9, **{**shape.model_dump(), "architecture": "llama", "hidden_size": 66})


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_absent_keys_mean_what_they_mean_in_transformers(family):
    absent = ("num_key_value_heads", "head_dim", "model_type")
    bare = {key: value for key, value in hf_config(num_attention_heads=32, hidden_size=64).items() if key not in absent}
    theirs = getattr(transformers, f"{family}Config")(**bare)
    ours = DecoderConfig.from_hf({**bare, "model_type": family.lower()})
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps and ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, token_ids(theirs.eos_token_id))
