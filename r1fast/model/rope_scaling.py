"""Rotary frequencies for every `rope_scaling` that r1fast reads, as transformers computes them.

A checkpoint is only right with the frequencies it was trained on, so the formulas follow
`transformers.modeling_rope_utils` term by term, in float32; tests/test_model.py compares the logits.

- default: RoPE (Su et al. 2021, eq. 15), theta^(-2i/D).
- linear: position interpolation (Chen et al. 2023), every frequency divided by `factor`.
- dynamic: NTK-aware scaling that grows with the longest sequence seen. Here the length is *fixed* at the
  checkpoint's `max_position_embeddings`, where the formula gives the default frequencies: equal to transformers for
  every sequence up to that length. Past it transformers changes the frequencies between calls, which no cached key
  can follow (a key rotated earlier would no longer match), so r1fast keeps them as they are.
- llama3: Llama 3.1's smooth split between kept and divided frequencies.
- yarn: NTK-by-parts (Peng et al. 2023, eqs. 17-23), with its attention factor multiplied into the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from r1fast.config import UserError, shown

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def read_rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) of a Hugging Face configuration, in either of its spellings.

    transformers 5 writes one dict `rope_parameters` (theta inside), earlier versions `rope_theta` and `rope_scaling`
    (with `type` for `rope_type` in the oldest). The scaling comes back with `rope_type` and, for the types that need
    it, `original_max_position_embeddings` filled in. Raises UserError for a type r1fast does not have.
    """
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if isinstance(found, Mapping) and isinstance(found.get("full_attention"), Mapping):
        found = found["full_attention"]  # transformers 5, written per kind of layer
    found = _of_numbers(found)
    theta = float(found.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    if kind not in ROPE_TYPES:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported; r1fast has {', '.join(ROPE_TYPES)}")
    partial = found.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported; r1fast rotates whole heads")
    if kind == "default":
        return theta, None
    if kind in ("llama3", "yarn"):
        original = hf.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = original or hf.get("max_position_embeddings")
    missing = [key for key in _REQUIRED[kind] if found.get(key) is None]
    if missing:
        raise UserError(f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}")
    return theta, {"rope_type": kind, **found}


def _of_numbers(found: Any) -> dict[str, Any]:
    """A copy of a block of rope settings; UserError where it is none, or a value is not a usable number."""
    if not isinstance(found, Mapping):
        raise UserError(f"config.json: rope_scaling must be an object, not {shown(found)}")
    for key, value in found.items():
        named = key in ("rope_type", "type")
        number = isinstance(value, int | float) and (isinstance(value, bool) or 0 < value < 1e30)
        if value is not None and not (isinstance(value, str) if named else number):
            what = "text" if named else "a number above 0"
            raise UserError(f"config.json: {key} of the rope scaling must be {what}, not {shown(value)}")
    return dict(found)


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int
) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] radians a position, the factor that cos and sin are multiplied by)."""
    plain = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, theta, scaling, max_positions)
    return plain, 1.0  # default, and dynamic at its fixed length


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Wavelengths past the old context are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > context / low, plain / factor, between)
    return torch.where(wavelength < context / high, plain, scaled)


def _yarn(plain: Tensor, theta: float, scaling: Mapping[str, Any], max_positions: int) -> tuple[Tensor, float]:
    dim = 2 * plain.numel()
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)

    def dimension(rotations: float) -> float:  # the one that turns so often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: a ramp of no width would divide by zero
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept, float(attention)
