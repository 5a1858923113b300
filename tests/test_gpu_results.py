"""What benchmarks/on_gpu.sh leaves: the file of results and its table, from a run that went wrong in places."""

import json
import subprocess
from pathlib import Path

import pytest

gpu_results = pytest.importorskip("benchmarks.gpu_results")
ROOT = Path(__file__).parent.parent


def row(name: str, median: float, fraction: float) -> dict:
    extra = {"GB/s": 3000.0, "GFLOP/s": 5.0, "ceiling GB/s": 4000.0, "ceiling GFLOP/s": 9.0, "bound": "GB/s"}
    return {"name": name, "stats": {"median": median}, "extra_info": {**extra, "fraction of ceiling": fraction}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        row("test_op[paged_attention 64 contexts forward [triton]]", 2e-4, 0.3),
        row("test_op[paged_attention 64 contexts forward [cuda]]", 1e-4, 0.75),
        row("test_other[x]", 1.0, 0.1),
    ]
    (tmp_path / "times.json").write_text(json.dumps({"benchmarks": rows}))
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_cuda" name="good"/>'
        '<testcase classname="tests.test_cuda" name="bad"><failure/></testcase>'
        '<testcase classname="tests.test_cuda" name="left out"><skipped/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "table.txt").write_text("op cuda\n")
    return tmp_path


def test_results_and_their_table(folder):
    results = gpu_results.collect(folder)
    assert results["tests"] == {"passed": 1, "skipped": 1, "failed": ["tests.test_cuda::bad"]}
    assert results["table"] == "op cuda\n" and "peers" not in results
    assert json.loads(json.dumps(results)) == results
    lines = gpu_results.table(results).splitlines()
    timed = [line for line in lines if line.startswith("| paged_attention")]
    assert timed == [
        "| paged_attention 64 contexts forward | cuda | 100.0 | 3000 GB/s | 75% |",
        "| paged_attention 64 contexts forward | triton | 200.0 | 3000 GB/s | 30% |",
    ]
    assert lines[-2:] == ["Tests: 1 passed, 1 failed, 1 skipped.", "- failed: tests.test_cuda::bad"]


def test_the_file_is_named_by_card_and_commit(folder):
    results = gpu_results.collect(folder) | {"machine": {"device": "NVIDIA H200 (x)", "commit": "0123456789abcdef"}}
    assert gpu_results.target(results) == ROOT / "benchmarks" / "results" / "nvidia-h200-x-0123456789.json"


def test_a_test_run_that_died_counts_as_failed(tmp_path):
    assert gpu_results.tests(tmp_path / "none.xml")["failed"] and gpu_results.times(tmp_path / "none.json") == []


def test_the_script_is_bash():
    found = subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "on_gpu.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
