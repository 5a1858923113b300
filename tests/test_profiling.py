"""`profile=true` leaves a trace and a table of what a step's time goes to."""

import json
import re

import torch
from micro_run import run_micro_stages

from r1fast.stages.profiling import named_ops
from r1fast_kernels import load_ops, native, rms_norm

STAGES = {
    "rl": {
        "kind": "grpo", "steps": 3, "prompts_per_step": 4, "group_size": 2, "mix": [{"task": "totals"}],
        "sampling": {"max_tokens": 16}, "evaluate": False, "objective": {"kl_coef": 0.1},
    },
    "sft": {
        "kind": "sft", "data": [{"task": "totals", "limit": 8}], "batch_examples": 8, "epochs": 1, "evaluate": False,
    },
}  # fmt: skip


def test_a_profile_is_written_and_names_the_ops(micro, tmp_path):
    run_micro_stages(tmp_path / "run", micro, STAGES, {"profile": True})
    for name in ("rl", "sft"):  # the first of three steps is left out; one alone is not
        folder = tmp_path / "run" / "stages" / name / "profile"
        trace = json.loads((folder / "trace.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        backend = "reference" if native.cpu_unavailable() else "cpu"
        loss = "linear_grpo_loss" if name == "rl" else "linear_cross_entropy"
        attention = "prefix_attention" if name == "rl" else "varlen_attention"
        assert {f"{loss} [{backend}]", f"{attention} [{backend}]", f"{attention} [{backend}] backward"} <= names
        lines = (folder / "table.md").read_text().splitlines()
        rows = [re.fullmatch(r"\| (.+?) \| ([\d.]+) \| (\d+)% \| ([\d.]+) \|", line) for line in lines[2:12]]
        assert len(lines) == 14 and all(rows)
        times = [float(row[2]) for row in rows]
        assert times == sorted(times, reverse=True) and times[0] > 0
        whole = float(re.fullmatch(r"\| a step \| ([\d.]+) \| 100% \| \|", lines[-1])[1])
        assert sum(times) <= whole * 1.05
    plain = run_micro_stages(tmp_path / "plain", micro, {"sft": STAGES["sft"]})
    assert plain and not (tmp_path / "plain" / "stages" / "sft" / "profile").exists()


def test_names_are_only_for_the_time_of_a_profile():
    op = load_ops()["rms_norm"]
    before = dict(op.backends)
    x, weight = torch.randn(3, 8), torch.ones(8)
    expected = rms_norm(x, weight, 1e-6)
    with named_ops():
        assert op.backends != before
        assert torch.equal(rms_norm(x, weight, 1e-6), expected)
    assert op.backends == before
