"""What `auto` means on this machine: the one place where a device and a dtype are chosen, and its free memory read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1fast.config import UserError

if TYPE_CHECKING:
    import torch


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


def free_memory(device: torch.device | str) -> int:
    """Bytes that a new allocation on `device` could take."""
    import torch

    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: assume a small machine
        return 4 << 30
