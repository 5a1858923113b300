"""What each op is to reach on an H200, as data. `python -m benchmarks.gpu.ops` measures beside them.

A floor is the larger of the bytes that must move over the card's copy bandwidth, and the FLOPs over its product rate.
Where the numbers come from: measured and published rates of the best known kernels, and the model of roofline.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.shapes import QWEN

Kind = Literal["fraction", "microseconds", "times", "MiB"]


@dataclass(frozen=True, slots=True)
class Target:
    """`what`: of a row of the part, by prefix. `kind`: fraction of the floor, at least; microseconds, at most; times
    faster than `peer`, at least; MiB allocated, at most."""

    what: str
    kind: Kind
    value: float
    peer: str = ""

    def met(self, row: dict, peers: dict[str, float]) -> bool | None:
        """None where the row or the peer has no such number. peers: microseconds of each on the same work."""
        if self.kind == "times":
            theirs = peers.get(self.peer)
            return None if theirs is None else theirs / row["microseconds"] >= self.value
        found = row.get(self.kind)
        if found is None:
            return None
        return found >= self.value if self.kind == "fraction" else found <= self.value

    def __str__(self) -> str:
        if self.kind == "times":
            return f"≥ {self.value:g}x {self.peer}"
        if self.kind == "fraction":
            return f"≥ {self.value:.0%} of the floor"
        return f"≤ {self.value:g} {'µs' if self.kind == 'microseconds' else self.kind}"


OPS = (
    Target("group_advantage 1M", "microseconds", 5),  # two L2-resident passes: bound by the launch
    Target("group_advantage 64M", "fraction", 0.85),
    Target("rms_norm", "fraction", 0.88),
    Target("swiglu", "fraction", 0.88),
    Target("rope", "fraction", 0.80),
    Target("paged_append", "fraction", 0.80),
    Target("AdamW", "fraction", 0.85),
    Target("sample_token", "microseconds", 85),  # B = 512, 151,936 float32 logits: 72 of them are the floor
    Target("paged_attention", "fraction", 0.80),
    Target("linear_grpo_loss 0.5B", "fraction", 0.57),
    Target("linear_grpo_loss 1.5B", "fraction", 0.66),
    Target("linear_grpo_loss 7B", "fraction", 0.76),
    Target("linear_grpo_loss", "times", 1.2, "TRL"),
    Target("linear_grpo_loss", "times", 5.0, "Liger"),
    # 1.9 GiB beside the float32 gradient of the head, 4 bytes a weight
    *(
        Target(f"linear_grpo_loss {n}", "MiB", 1945 + c.vocab_size * c.hidden_size // (1 << 18))
        for n, c in QWEN.items()
    ),
)
SAMPLING_FRACTION = 0.70  # of the roofline of decoding
STEP_SECONDS = {"1.5B": 19.0}  # 32 x 16 completions of about 1,000 tokens
STEP_TIMES_TRL = 3.0


def of(what: str) -> list[Target]:
    """The targets of a row; of those that differ in length only the longest prefix of a kind and peer counts."""
    found: dict[tuple, Target] = {}
    for target in OPS:
        key = (target.kind, target.peer)
        if what.startswith(target.what) and (key not in found or len(target.what) > len(found[key].what)):
            found[key] = target
    return list(found.values())
