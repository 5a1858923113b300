"""Checkpoints of the measured models, for contenders that load one from a folder; made while other parts run.

The weights are random and never draw the end of a sequence (benchmarks/whole_step.py), so that every completion has its
full length. A folder is there once its name is: it is written under another one first.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.gpu.measure import DEVICE, SMALL, Report, arguments
from benchmarks.gpu.shapes import MODELS
from benchmarks.whole_step import Shape, make_checkpoint
from r1fast.model.decoder import DecoderConfig


def shape_of(c: DecoderConfig, **work) -> Shape:
    """`work`: prompts, group, prompt, completion."""
    dtype = "float32" if SMALL else "bfloat16"
    sizes = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim, "inner": c.intermediate_size}
    return Shape(
        hidden=c.hidden_size, layers=c.layers, vocabulary=c.vocab_size, device=DEVICE, dtype=dtype,
        **sizes, **work,
    )  # fmt: skip


def place(folder: Path, name: str) -> Path:
    return folder / "checkpoints" / name


def wait_for(folder: Path, name: str, seconds: float) -> Path:
    """The checkpoint's folder. TimeoutError where nobody makes it in time."""
    found, deadline = place(folder, name), time.monotonic() + seconds
    while not found.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the checkpoint of {name} was not there after {seconds:.0f} s")
        time.sleep(0.2)
    return found


def main() -> int:
    options = arguments("checkpoints", __doc__).parse_args()
    report = Report("checkpoints", options.folder)
    for name, config in MODELS.items():
        target = place(options.folder, name)
        if target.is_dir():
            continue
        start, fresh = time.monotonic(), target.with_name(f"{name}.new")
        make_checkpoint(shape_of(config), fresh)
        fresh.rename(target)
        report.add(what=name, seconds=round(time.monotonic() - start, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
