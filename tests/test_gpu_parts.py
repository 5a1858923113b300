"""The parts of benchmarks/on_gpu.sh run here in small, in this process: what they call is there and gives numbers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu")
from benchmarks import first_device_test  # noqa: E402
from benchmarks.gpu import ceilings, checkpoints, determinism, exactness, measure, ops, sanitizer, step  # noqa: E402
from benchmarks.gpu import profile as profile_part  # noqa: E402
from benchmarks.gpu import sampling as sampling_part  # noqa: E402
from r1fast_kernels import load_ops  # noqa: E402
from r1fast_kernels.triton_support import triton_version  # noqa: E402

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in small, and so without a GPU")


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """A part as a command: its file, read back."""
    rates = [{"what": name, "per second": 1e10} for name in ("copy", "bfloat16", "float32")]
    (tmp_path / "ceilings.json").write_text(json.dumps({"rows": rates}))

    def run(module, name: str, *more: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, "--folder", str(tmp_path), *more])
        assert module.main() == 0
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_ceilings(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "SIZE", 64)
    assert all(row["per second"] > 0 for row in ask(ceilings, "ceilings")["rows"])
    assert set(measure.ceilings(tmp_path)) == {"copy", "product"}


def test_every_kind_of_work_runs_on_its_backends(ask, monkeypatch):
    monkeypatch.setattr(ops, "seconds", lambda run: (run(), 1e-3)[1])
    alone = [replace(work, peers={}) for work in ops.Works()]  # peers take their seconds
    monkeypatch.setattr(ops, "Works", lambda: alone)
    rows = ask(ops, "ops")["rows"]
    measured = [row for row in rows if "microseconds" in row]
    by = {name for row in measured for name in load_ops() if row["what"].startswith(name)}
    assert by == set(load_ops()) - {"linear_logprob", "prefix_attention", "qkv_rope"}  # the last is rms_norm and rope
    assert all(row["fraction"] > 0 and row["by"] in ("cpu", "torch", "reference") for row in measured)
    assert any(row["targets"] for row in measured)
    assert [row["what"] for row in rows if "skipped" in row] in ([], ["AdamW tiny by apex"])


def test_what_is_compared_between_processes_and_what_is_sanitized():
    first = determinism.digests()
    assert len(first) > 60 and first == determinism.digests()
    assert determinism.digest([torch.zeros(3)]) != determinism.digest([torch.zeros(3).copysign(torch.tensor(-1.0))])
    with_cpu = {name for name, op in load_ops().items() if "cpu" in op.backends}
    assert {name.split()[0] for name in sanitizer.cases()} == with_cpu


def test_the_difference_of_sampler_and_trainer():
    found = exactness.compared("tiny", exact=False)
    assert found["tokens"] == exactness.PROMPTS * exactness.GROUP * exactness.NEW and 0 < found["max"] < 1e-4


def test_a_product_that_depends_on_its_rows_is_told(tmp_path, monkeypatch):
    told = {"qkv": {"rows that differ": [3], "microseconds": 10.0}, "o": {"rows that differ": [], "microseconds": 10.0}}
    off = {name: {"rows that differ": [], "microseconds": 12.0} for name in told}
    monkeypatch.setattr(first_device_test, "ask", lambda *_, environment=None: off if environment else told)
    report = measure.Report("x", tmp_path)
    first_device_test.cublas(report)
    holds = {row["what"]: row["holds"] for row in report.data["rows"]}
    assert holds == {"cublas as it comes": False, "cublas with its workspaces off": True, "cublas cost": False}
    assert "other bits in qkv at [3]" in report.data["rows"][0]["verdict"]


class Stepping:
    """Stands in for a process of benchmarks.whole_step."""

    def __init__(self, who, shape, checkpoint, settings):
        if who == "TRL" and shape.completion == step.BRIEF:
            self.seconds = 6.0
        else:
            self.seconds = 2.0
        self.shape = shape

    def step(self):
        tokens = self.shape.prompts * self.shape.group * self.shape.completion
        return {"seconds": self.seconds, "phases": {"sample": 1.0, "learn": 0.5}, "tokens": tokens, "peak": 1 << 20}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_steps_are_put_beside_each_other(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "Contender", Stepping)
    checkpoints.place(tmp_path, "tiny").mkdir(parents=True)
    found = ask(step, "step", "--seconds", "60")
    assert found["tiny: TRL over r1fast at 8 tokens"] == 3.0
    assert [row["by"] for row in found["rows"]] == ["r1fast", "r1fast", "TRL"]
    assert all(0 < row["fraction"] < 1 and row["phases"]["sample"] == 1.0 for row in found["rows"])


def test_the_rate_of_decoding_leaves_out_what_both_calls_cost(tmp_path, monkeypatch, ask):
    per_token = 1e-3

    class Drawing:
        def __init__(self, *_):
            pass

        def sample(self, case, forget=False):
            return {"seconds": 5.0 + case.new * per_token, "MiB": 7.0}

        def close(self):
            pass

    monkeypatch.setattr(sampling_part, "Contender", Drawing)
    checkpoints.place(tmp_path, "tiny").mkdir(parents=True)
    rows = ask(sampling_part, "sampling", "--seconds", "60")["rows"]
    assert [row["tokens/s"] for row in rows] == [sampling_part.SEQUENCES / per_token] * 3
    assert rows[0]["by"] == "r1fast" and rows[0]["fraction unshared"] > 0 and rows[-1]["by"] == "continuous batching"


def test_a_profile_of_a_step(tmp_path, ask):
    ask(checkpoints, "checkpoints")
    rows = ask(profile_part, "profile", "--seconds", "60")["rows"]
    assert "| a step |" in rows[0]["table"] and "[cpu]" in rows[0]["table"]
    assert rows[1]["what"] == "tiny, lane 0" and len(rows[1]["line"]) == profile_part.SLICES and rows[1]["busy"] > 0
    assert rows[-1]["what"] == "tiny, overlap" and math.isfinite(rows[-1]["share"])


def test_times_on_a_card_are_the_medians_of_its_own_clock(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.clock

        def elapsed_time(self, other):
            return other.at - self.at

    def run():
        Event.clock += 2.5  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "FLUSH", 1 << 10)
    monkeypatch.setattr(measure.torch, "empty", lambda *_, device, **more: torch.zeros(8))
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    assert measure.seconds(run) == pytest.approx(2.5e-3)


COMPILE = """
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_compile import Stub, usage
driver.set_active(Stub(90))
from benchmarks import first_device_test as test
launch, seen = JITFunction.run, []
JITFunction.run = lambda self, *a, grid, warmup, **o: seen.append(launch(self, *a, grid=grid, warmup=True, **o))
a, b = torch.empty(96, 1024, dtype=torch.bfloat16), torch.empty(128, 1024, dtype=torch.bfloat16)
for tile, *more in ((64, 64, 64, 4), 512), ((64, 16, 64, 4), 0), ((128, 256, 64, 8), 0), ((32, 128, 64, 4), 0):
    seen.clear()
    test.product(a, b, tile, *more)
    ptx = seen[0].asm["ptx"]
    print(tile[0], "wgmma.mma_async" in ptx, "mma.sync" in ptx, usage(ptx, 90)[1])
"""


@pytest.mark.skipif(triton_version() is None, reason="triton is not installed")
def test_the_first_device_test_compares_the_instructions_that_it_says(clean_environment):
    """Compiled for Hopper: wgmma for tiles of 64 rows and more, mma.sync for smaller ones, nothing spilled."""
    path = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, "-c", COMPILE]
    child = subprocess.run(command, env={**clean_environment, **path}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    lines = [line.split() for line in child.stdout.splitlines()]
    assert len(lines) == 4
    for rows, wgmma, mma_sync, spilled in lines:
        large = int(rows) >= 64
        assert (wgmma, mma_sync, spilled) == (str(large), str(not large), "0"), lines


def test_a_question_that_takes_too_long_or_fails_is_said(monkeypatch):
    wrong = SimpleNamespace(returncode=3, stderr="a\nValueError: no\n", stdout="")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: wrong)
    with pytest.raises(RuntimeError, match=r"^ValueError: no$"):
        measure.ask("x", "y")
    with pytest.raises(RuntimeError, match="time of this part is used up"):
        measure.ask("x", "y", seconds=0.5)
