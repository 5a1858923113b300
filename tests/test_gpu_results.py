"""benchmarks/on_gpu.sh: parts that crash or take too long lose nothing, results are added to, tables tell it all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

gpu_results = pytest.importorskip("benchmarks.gpu_results")
from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import profile, right, roofline, sanitizer, targets  # noqa: E402
from benchmarks.gpu.shapes import QWEN  # noqa: E402

ROOT = Path(__file__).parent.parent
CARD = {"device": "NVIDIA H200 (x)", "commit": "0123456789abcdef", "torch": "2.11", "uncommitted": False}

# A part without torch, which takes seconds to import: leaves a row as a Report does, then does as its name says.
BEGIN = """
import json, os, subprocess, sys, time
def leave(**more):
    with open(f"{sys.argv[2]}/{sys.argv[0].rsplit('part_', 1)[1][:-3]}.json", "w") as file:
        json.dump({"rows": [{"what": "first", "by": "me"}], **more}, file)
leave()
"""
SCRIPTS = {
    "good": "",
    "crashes": "print('the last words', flush=True); os.kill(os.getpid(), 11)",
    "refuses": "sys.exit('no such thing')",
    "finds": "leave(wrong='2 tests failed'); sys.exit(1)",
    "hangs": "leave(child=subprocess.Popen(['sleep', '60']).pid); time.sleep(60)",
}


@pytest.fixture
def parts(tmp_path, monkeypatch) -> dict[str, gpu.Part]:
    for name, body in SCRIPTS.items():
        (tmp_path / f"part_{name}.py").write_text(BEGIN + body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {name: gpu.Part(name, f"part_{name}", 30.0) for name in SCRIPTS}


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def test_whatever_becomes_of_a_part_its_rows_are_kept_and_the_next_one_runs(tmp_path, parts):
    path, said = tmp_path / "results" / "card.json", []
    run = gpu.Run(tmp_path / "work", gpu_results.Results(path, CARD), 5.0, said.append)
    hangs = gpu.Part("hangs", "part_hangs", 1.0)
    order = [parts["crashes"], parts["refuses"], parts["finds"], hangs, parts["good"]]
    assert run.run(order, together=False) is False
    found = json.loads(path.read_text())["parts"]
    assert found["good"]["state"] == "done"
    assert found["crashes"]["state"] == "failed: signal 11: the last words"
    assert found["refuses"]["state"] == "failed: exit code 1: no such thing"
    assert found["finds"]["state"] == "failed: 2 tests failed" and "wrong" not in found["finds"]
    assert found["hangs"]["state"] == "stopped after its 1 s" and not alive(found["hangs"]["child"])
    assert all(part["rows"][0] == {"what": "first", "by": "me"} for part in found.values())
    assert said[-1].startswith("good: done")


def test_a_later_call_adds_to_the_file_of_the_same_card_and_commit(tmp_path, parts):
    path = tmp_path / "card.json"
    gpu_results.Results(path, CARD).put("ops", {"state": "done", "seconds": 1, "rows": []})
    run = gpu.Run(tmp_path / "work", gpu_results.Results(path, CARD), 5.0, lambda _: None)
    assert run.run([parts["good"]], together=True)
    assert set(json.loads(path.read_text())["parts"]) == {"ops", "good"}
    assert gpu_results.Results(path, CARD | {"torch": "2.13"}).data["parts"] == {}
    path.write_text("{")  # cut short
    assert gpu_results.Results(path, CARD).data["parts"] == {}


def test_parts_for_which_no_time_is_left_are_said_not_to_have_run(tmp_path, parts):
    results = gpu_results.Results(tmp_path / "card.json", CARD)
    assert not gpu.Run(tmp_path, results, 0.01, lambda _: None).run([parts["good"]], together=False)
    assert results.data["parts"]["good"] == {"state": "not run: the time was used up", "seconds": 0.0, "rows": []}


def test_parts_are_chosen_with_what_they_need(tmp_path):
    names = [part.name for part in gpu.chosen("step,tests", tmp_path)]
    assert names == ["checkpoints", "tests", "ceilings", "step"]
    (tmp_path / "ceilings.json").write_text("{}")
    assert [part.name for part in gpu.chosen("ops", tmp_path)] == ["ops"]
    assert gpu.chosen("", tmp_path) == list(gpu.PARTS)
    with pytest.raises(SystemExit, match="no part is called opps; there are checkpoints, warm"):
        gpu.chosen("opps", tmp_path)


def test_the_file_is_named_by_card_and_commit():
    assert gpu_results.target(CARD) == ROOT / "benchmarks" / "results" / "nvidia-h200-x-0123456789.json"


def results(**parts) -> dict:
    return {"machine": CARD, "parts": {name: {"state": "done", "seconds": 3.4, **part} for name, part in parts.items()}}


def test_the_tables(tmp_path):
    verdicts = [{"target": "≥ 88% of the floor", "met": True}, {"target": "≥ 1.2x TRL", "met": False}]
    rows = [
        {"what": "swiglu", "by": "triton", "microseconds": 71.25, "fraction": 0.904, "MiB": 12.0, "targets": verdicts},
        {"what": "swiglu by Liger", "skipped": "ModuleNotFoundError: No module named 'liger_kernel'"},
    ]
    step = {"what": "1.5B", "by": "r1fast", "seconds": 17.5, "phases": {"sample": 9.25, "learn": 8.0}, "fraction": 0.5}
    bars = {"what": "1.5B, lane 0", "line": "█ ", "busy": 1.5, "dearest": "a kernel"}
    found = results(ops={"rows": rows}, step={"rows": [step], "1.5B within 19 s": True}, profile={"rows": [bars]})
    lines = gpu_results.table(found).splitlines()
    assert lines[0] == "NVIDIA H200 (x), torch 2.11, commit 0123456789." and "| ops | done | 3 |" in lines
    assert "| what | by | microseconds | fraction | MiB | targets |" in lines
    expected = "| swiglu | triton | 71.25 | 90% | 12 | ≥ 88% of the floor: met, ≥ 1.2x TRL: **missed** |"
    assert expected in lines
    assert "- swiglu by Liger: ModuleNotFoundError: No module named 'liger_kernel'" in lines
    assert "| 1.5B | r1fast | 17.5 | sample 9.25, learn 8 | 50% |" in lines and "- 1.5B within 19 s: yes" in lines
    assert "    █  1.5B, lane 0, busy 1.5 s, mostly a kernel" in lines
    (tmp_path / "nvidia.json").write_text(json.dumps(found))
    (tmp_path / "other.json").write_text("{}")
    assert gpu_results.page_part(tmp_path).count("## NVIDIA H200 (x)") == 1
    (tmp_path / "nvidia.json").unlink()
    assert gpu_results.page_part(tmp_path) == gpu_results.NOTHING


def test_a_file_that_holds_no_results_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.json").write_text("[")
    monkeypatch.setattr(sys, "argv", ["gpu_results", str(tmp_path / "x.json")])
    assert gpu_results.main() == 2 and "holds no results" in capsys.readouterr().err


def test_targets_are_met_or_missed_or_not_to_be_told():
    head = {"what": "linear_grpo_loss 1.5B", "microseconds": 100.0, "fraction": 0.65, "MiB": 2800.0}
    told = {str(target): target.met(head, {"TRL": 121.0}) for target in targets.of(head["what"])}
    assert told == {"≥ 66% of the floor": False, "≥ 1.2x TRL": True, "≥ 5x Liger": None, "≤ 2835 MiB": True}
    assert [str(target) for target in targets.of("group_advantage 1M")] == ["≤ 5 µs"]
    assert targets.of("varlen_attention, 16 of 1024, forward") == []


def test_the_rooflines_are_those_of_the_notes():
    """k tokens/s of decoding and s of a step that gpu_state_of_the_art.md models for one H200, rounded there."""
    for name, context, floor, real in (("0.5B", 1024, 232, 162), ("1.5B", 2048, 56, 44)):
        for at, expected in ((roofline.Efficiency(), floor), (roofline.REALISTIC, real)):
            seconds = roofline.decode_step(QWEN[name], roofline.H200, 512, context, at=at)
            assert 512 / seconds / 1000 == pytest.approx(expected, rel=0.1)


def test_what_pytest_said_is_counted_line_by_line_however_it_ended():
    said = """
tests/test_cuda.py::test_a[x-1] PASSED                     [ 10%]
tests/test_cuda.py::test_b[a b] FAILED                     [ 20%]
tests/test_cuda.py::test_c SKIPPED (no memory)             [ 30%]
[gw1] [ 40%] PASSED tests/test_kernels.py::test_forward[rope-cuda]
[gw0] [ 50%] ERROR tests/test_kernels.py::test_backward[rope-cuda]
tests/test_cuda.py::test_d Fatal Python error: Segmentation fault"""
    failed = ["tests/test_cuda.py::test_b[a b]", "tests/test_kernels.py::test_backward[rope-cuda]"]
    assert right.outcome(said) == {"passed": 2, "skipped": 1, "failed": 2, "names": failed}


FAKE = """
import subprocess, sys
assert sys.argv[1] == "--tool" and sys.argv[3] == "--print-limit"
print("========= COMPUTE-SANITIZER", flush=True)
subprocess.run(sys.argv[5:])
print("=========     at sample_rows(float const*)+0x120 in csrc/cuda/sample_token.cu:77")
said = {"memcheck": "ERROR SUMMARY: 3 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}
print("========= " + said[sys.argv[2]])
"""


def test_what_the_sanitizer_said(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    fake = [sys.executable, str(tmp_path / "fake.py")]
    ran = [sys.executable, "-c", "print('[\"rope tiny x\", \"swiglu tiny y\"]')"]
    found = sanitizer.check(fake, "memcheck", ran, 30)
    assert (found["errors"], found["holds"], found["ops"]) == (3, False, ["rope", "swiglu"])
    assert found["at"] == ["sample_rows(float const*)"] and found["runs"] == 2
    assert sanitizer.check(fake, "racecheck", ran, 30)["holds"] is True
    with pytest.raises(RuntimeError, match="exit code 1: Device not supported"):
        silent = [sys.executable, "-c", "import sys; sys.exit('Device not supported')"]
        sanitizer.check(silent, "memcheck", ran, 30)


def test_the_timeline_counts_what_ran_beside_what():
    spans = profile.union([(2.0, 3.0), (0.0, 1.0), (0.5, 1.5), (3.0, 4.0)])
    assert spans == [(0.0, 1.5), (2.0, 4.0)]
    assert profile.shares(spans, 0.0, 4.0, slices=4) == [1.0, 0.5, 1.0, 1.0]
    assert profile.overlap([spans, [(1.0, 2.5)], [(1.2, 1.3)]]) == pytest.approx(0.5 + 0.5)
    assert profile.overlap([spans]) == 0.0


def test_the_script_is_bash():
    found = subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "on_gpu.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
