"""What `auto` means on this machine: the one place where a device and a dtype are chosen."""

from __future__ import annotations

from r1fast.config import UserError


def choose_device(asked: str) -> str:
    """"cpu" or "cuda" for "auto", "cpu" or "cuda"; UserError where a GPU is asked for and none is there."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA GPU here; use --device cpu or auto")
    return asked


def choose_dtype(asked: str, device: str) -> str:
    """"float32" or "bfloat16"; "auto" is float32 on a CPU and bfloat16 on a GPU."""
    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" else "float32"
