"""The shape of a decoder: read from and written to a Hugging Face config.json, and nothing else.

Field names are those of the recipe's `ShapeConfig`, so `DecoderConfig(vocab_size=V, **shape.model_dump())` builds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1fast.config import UserError, shown
from r1fast.model.rope_scaling import read_rope

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model_type -> prefix of the class names
_SUPPORTED = "r1fast reads Llama ('llama'), Qwen2 and Qwen2.5 ('qwen2') and Qwen3 ('qwen3') checkpoints"
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and switches of one dense decoder. Raises UserError where the sizes do not fit each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    architecture: str = "qwen3"  # "llama" | "qwen2" | "qwen3"
    max_positions: int = 512
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": ..., "factor": ...}; None: default
    norm_eps: float = 1e-6
    attention_bias: bool = False  # of q, k, v and o; Qwen2 ignores it: always q, k, v and never o
    mlp_bias: bool = False  # Llama only
    tie_embeddings: bool = False  # the head is the embedding table
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # generation stops at any of these; the first is the one written in training
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UserError(f"architecture {self.architecture!r} is not supported; {_SUPPORTED}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name} is {getattr(self, name)}, it must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"model: {self.heads} heads cannot share {self.kv_heads} kv_heads evenly")
        if self.head_dim % 2:
            raise UserError(f"model: head_dim is {self.head_dim}, rotary embeddings need an even one")
        if self.architecture == "llama" and self.hidden_size % self.heads:
            raise UserError(
                f"model: hidden_size {self.hidden_size} is no multiple of {self.heads} heads, "
                "which transformers asks of a Llama; change one, or use architecture qwen3"
            )

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "qwen2" or self.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.architecture != "qwen2" and self.attention_bias

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "qwen3"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """From the content of a config.json; UserError for what r1fast cannot compute exactly."""
        _of_the_right_kind(hf)
        kind = hf.get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(f"config.json: model_type {kind!r} is not supported; {_SUPPORTED}")
        missing = [key for key in _REQUIRED if hf.get(key) is None]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        _refuse(hf)
        heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
        theta, scaling = read_rope(hf)
        return cls(
            architecture=kind,
            vocab_size=hf["vocab_size"],
            hidden_size=hidden,
            intermediate_size=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            # the defaults are transformers': a key that is absent must mean what it means there
            kv_heads=hf.get("num_key_value_heads", None if kind == "llama" else 32) or heads,
            head_dim=hf.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
            max_positions=hf.get("max_position_embeddings") or (2048 if kind == "llama" else 32768),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            attention_bias=kind != "qwen2" and bool(hf.get("attention_bias")),
            mlp_bias=kind == "llama" and bool(hf.get("mlp_bias")),
            tie_embeddings=bool(hf.get("tie_word_embeddings")),
            bos_token_id=hf.get("bos_token_id", 1 if kind == "llama" else None),
            eos_token_ids=token_ids(hf.get("eos_token_id", 2 if kind == "llama" else None)),
            pad_token_id=hf.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json, with RoPE in the spelling that transformers before 5 read, and 5 reads."""
        hf: dict[str, Any] = {
            "architectures": [f"{ARCHITECTURES[self.architecture]}ForCausalLM"],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
        if self.architecture != "qwen2":
            hf["attention_bias"] = self.attention_bias
        if self.architecture == "llama":
            hf["mlp_bias"] = self.mlp_bias
        else:
            hf["use_sliding_window"] = False
        return hf


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Hugging Face writes one id, several or none; here always a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


_INTEGERS = (
    *_REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("bos_token_id", "pad_token_id", "max_window_layers", "sliding_window"),
)
_NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_LARGEST = 2**40  # of any whole number in a config.json; more is a mistake or an attack, and overflows later


def _of_the_right_kind(hf: object) -> None:
    """UserError where a value that is read below is not what its key says: the file may be anybody's."""
    if not isinstance(hf, Mapping):
        raise UserError(f"config.json: it must hold an object, not {shown(hf)}")
    if not isinstance(hf.get("model_type"), str | None) or not isinstance(hf.get("hidden_act"), str | None):
        raise UserError("config.json: model_type and hidden_act must be text")
    for key in _INTEGERS:
        if not _is_whole(hf.get(key)):
            raise UserError(f"config.json: {key} must be a whole number, not {shown(hf[key])}")
    for key in _NUMBERS:
        if not _is_number(hf.get(key)):
            raise UserError(f"config.json: {key} must be a number above 0, not {shown(hf[key])}")
    ends, kinds = hf.get("eos_token_id"), hf.get("layer_types")
    if not (_is_whole(ends) or (isinstance(ends, list) and None not in ends and all(map(_is_whole, ends)))):
        raise UserError(f"config.json: eos_token_id must be a token id or a list of them, not {shown(ends)}")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(each, str) for each in kinds)):
        raise UserError(f"config.json: layer_types must be a list of names, not {shown(kinds)}")


def _is_whole(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30)


def _refuse(hf: Mapping[str, Any]) -> None:
    """What would load and then compute something else than the checkpoint means."""
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: hidden_act {hf['hidden_act']!r} is not supported; r1fast computes SwiGLU ('silu')"
        )
    if hf.get("quantization_config"):
        raise UserError("config.json: quantised checkpoints are not supported; use the bfloat16 or float32 one")
    kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UserError(
            f"config.json: layers of type {', '.join(sorted(kinds))} are not supported; only full attention"
        )
    first = hf.get("max_window_layers", 28)  # transformers' default of both Qwens
    some = first is None or first < hf["num_hidden_layers"]
    if some and hf.get("use_sliding_window") and hf.get("sliding_window", 4096):
        raise UserError(
            "config.json: use_sliding_window is on; r1fast computes full attention only, so set it to false"
        )
