"""Killed at any moment, gone on with: the same bits and the same log as without the kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from micro_run import run_micro_stages

from r1fast.config import UserError
from r1fast.metrics import RunLog, read_events
from r1fast.stages.context import SNAPSHOTS

KILLS = int(os.environ.get("R1FAST_KILLS", "2"))  # docs/reliability.md has the run with 30
SHORT = {"max_tokens": 24}
STAGES = {
    "pretrain": {"kind": "pretrain", "task": "totals", "steps": 40, "evaluate": False},
    "sft": {"kind": "sft", "data": [{"task": "totals", "limit": 64}], "batch_examples": 8, "evaluate": False},
    "grpo": {
        "kind": "grpo",
        "mix": [{"task": "totals"}],
        "steps": 6,
        "prompts_per_step": 6,
        "group_size": 4,
        "mini_batches": 2,
        "sampling": SHORT,
        "objective": {"kl_coef": 0.01},
        "reference_refresh": 2,
        "dynamic_sampling": True,
        "evaluate_every": 2,
        "evaluate": False,
        "optimizer": {"learning_rate": 1e-3},
    },
    "overlap": {
        "kind": "grpo",
        "mix": [{"task": "totals"}],
        "steps": 5,
        "prompts_per_step": 6,
        "group_size": 4,
        "micro_batch_tokens": 100,
        "sampling": SHORT,
        "objective": {"kl_coef": 0.01, "aggregate": "token"},
        "overlap": "always",
        "evaluate": False,
        "optimizer": {"learning_rate": 1e-3},
    },
    "reject": {"kind": "reject", "task": "totals", "prompts": 600, "samples": 1, "sampling": SHORT, "at_least": 0},
    "reward_model": {"kind": "reward_model", "task": "chat", "pairs": 96, "batch_pairs": 8},
}


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs that was not on its way anyhow."""


@pytest.fixture(scope="module")
def whole(micro, tmp_path_factory):
    """Directories of the stages above, each run without interruption, made once each."""
    made = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            run_micro_stages(made[kind], micro, {"stage": STAGES[kind]})
        return made[kind]

    return run


def kill_at(monkeypatch, line: int):
    """The run dies when it is about to write the `line`-th line of its log."""
    written, event = [0], RunLog._write

    def counted(self, name, fields):
        written[0] += 1
        if written[0] == line:
            monkeypatch.setattr(RunLog, "_write", event)
            raise Killed
        event(self, name, fields)

    monkeypatch.setattr(RunLog, "_write", counted)


def results(out: Path) -> dict[str, bytes]:
    """What the stage made: its files, but for the record, which holds times."""
    stage = out / "stages" / "stage"
    files = [p for p in sorted(stage.rglob("*")) if p.is_file() and p.name != "stage.json"]
    return {str(p.relative_to(stage)): p.read_bytes() for p in files}


def told(out: Path) -> list[dict]:
    """The log without what a clock says, or the machine's memory; a whole run has no line that a stage was
    `resumed`, or `reused` because it was finished."""
    clocks = ("time", "seconds", "phase_seconds", "overlap_seconds", "tokens_per_second", "free")
    rows = [{k: v for k, v in row.items() if k not in clocks} for row in read_events(out)]
    return [row for row in rows if row.get("status") not in ("resumed", "reused")]


@pytest.mark.parametrize(("kind", "line", "steps"), [
    ("pretrain", 25, 1),
    ("pretrain", 30, 7),
    ("sft", 9, 3),
    ("grpo", 7, 1),  # in the second step's lines
    ("grpo", 15, 2),
    ("grpo", 18, 1),
    ("overlap", 13, 2),  # in the fourth step's lines: the third one's groups come from the journal
    ("reject", 3, 1),
    ("reward_model", 8, 3),
])  # fmt: skip
def test_a_stage_killed_between_steps_ends_with_the_same_bits(whole, micro, tmp_path, monkeypatch, kind, line, steps):
    out = tmp_path / "run"
    settings = {"checkpoint": {"steps": steps, "minutes": 0, "rollout_seconds": 0}}
    kill_at(monkeypatch, line)
    with pytest.raises(Killed):
        run_micro_stages(out, micro, {"stage": STAGES[kind]}, settings)
    assert list((out / "stages" / "stage" / SNAPSHOTS).iterdir())
    run_micro_stages(out, micro, {"stage": STAGES[kind]}, settings, resume=True)
    assert [row["status"] for row in read_events(out) if row["event"] == "stage"] == ["started", "resumed", "finished"]
    assert results(out) == results(whole(kind))
    assert told(out) == told(whole(kind))
    assert (out / "samples.jsonl").read_bytes() == (whole(kind) / "samples.jsonl").read_bytes()


def test_rollouts_that_were_drawn_are_not_drawn_again(micro, whole, tmp_path, monkeypatch):
    """Killed with two steps since the snapshot: their groups come from the journal, and the bits are the same."""
    from r1fast.rollout.sampler import Sampler

    out, settings = tmp_path / "run", {"checkpoint": {"steps": 2, "minutes": 0, "rollout_seconds": 0}}
    grpo = {"stage": {**STAGES["grpo"], "evaluate_every": 0}}
    plain = tmp_path / "plain"
    run_micro_stages(plain, micro, grpo)
    kill_at(monkeypatch, 15)  # start, memory, step and two samples four times over: in the lines of the fifth step
    with pytest.raises(Killed):
        run_micro_stages(out, micro, grpo, settings)
    journal = sorted(p.name for p in (out / "stages" / "stage" / "rollouts").iterdir())
    assert any(name.startswith("step-00000004") for name in journal)
    assert not any(name.startswith("step-00000000") for name in journal)
    drawn, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *a, **k: drawn.append(1) or sample(self, *a, **k))
    with monkeypatch.context() as patched:
        patched.setattr("r1fast.stages.journal.Journal.write", lambda *a: None)
        run_micro_stages(out, micro, grpo, settings, resume=True)
    rounds = [row["sampling_rounds"] for row in read_events(out) if row["event"] == "step"]
    assert len(drawn) == rounds[-1] < sum(rounds[4:])  # the sixth step's alone
    assert results(out) == results(plain)


def test_a_damaged_snapshot_is_passed_over(whole, micro, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", {"checkpoint": {"steps": 1, "minutes": 0}}
    kill_at(monkeypatch, 9)
    with pytest.raises(Killed):
        run_micro_stages(out, micro, {"stage": STAGES["sft"]}, settings)
    newest = max((out / "stages" / "stage" / SNAPSHOTS).iterdir())
    state = newest / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    run_micro_stages(out, micro, {"stage": STAGES["sft"]}, settings, resume=True)
    (resumed,) = [row for row in read_events(out) if row.get("status") == "resumed"]
    assert resumed["step"] == int(newest.name[5:]) - 1
    assert results(out) == results(whole("sft"))


def test_other_settings_do_not_go_on_from_a_snapshot(micro, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", {"checkpoint": {"steps": 1, "minutes": 0}}
    kill_at(monkeypatch, 9)
    with pytest.raises(Killed):
        run_micro_stages(out, micro, {"stage": STAGES["sft"]}, settings)
    other = {**STAGES["sft"], "batch_examples": 16}
    run_micro_stages(out, micro, {"stage": other}, settings, resume=True)
    assert [r["status"] for r in read_events(out) if r["event"] == "stage"] == ["started", "finished"]


def test_a_full_disk_ends_in_one_sentence_with_the_last_snapshot_whole(micro, whole, tmp_path, monkeypatch):
    import torch

    out, settings = tmp_path / "run", {"checkpoint": {"steps": 2, "minutes": 0}}
    count, write = [0], torch.save

    def full(state, file, *rest):
        count[0] += 1
        if count[0] == 3:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(state, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*step-00000004.*--resume"):
            run_micro_stages(out, micro, {"stage": STAGES["sft"]}, settings)
    run_micro_stages(out, micro, {"stage": STAGES["sft"]}, settings, resume=True)
    assert results(out) == results(whole("sft"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1 MiB, that can be made larger; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long(15)
def test_a_disk_that_is_really_full(recipe, small_disk):
    """Room for the small model but not for a snapshot beside it: one sentence, exit code 2, and what was whole stays
    whole; with more room the run ends with the same bits."""
    path, whole = recipe
    out = small_disk / "run"
    process = start(out, path)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "No space left on device" in errors and "--resume" in errors
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    process = start(out, path, "--resume")
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    assert weights(out) == weights(whole)


def test_a_clock_that_jumps_changes_nothing(whole, micro, tmp_path, monkeypatch):
    """Days forward and back between any two looks: seconds are counted by a clock that no one sets."""
    jumps = random.Random(1)
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + jumps.uniform(-1e6, 1e6))
    settings = {"checkpoint": {"steps": 2, "minutes": 1}}
    run_micro_stages(tmp_path / "run", micro, {"stage": STAGES["grpo"]}, settings)
    assert results(tmp_path / "run") == results(whole("grpo"))
    times = [row["time"] for row in read_events(tmp_path / "run")]
    assert times == sorted(times) and times[-1] < 600


# -- real kills ---------------------------------------------------------------------------------------------------


def start(out: Path, recipe: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "r1fast.train", str(recipe), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **heard
    )


@pytest.fixture(scope="module")
def recipe(micro, tmp_path_factory) -> tuple[Path, Path]:
    """(a recipe of a few seconds with several stages, a directory where it ran to its end)."""
    folder = tmp_path_factory.mktemp("kills")
    out = folder / "whole"
    stages = {name: {**STAGES[name], "evaluate_every": 0} if name == "grpo" else STAGES[name] for name in STAGES}
    stages["sft"] = {**STAGES["sft"], "epochs": 6}
    settings = {"checkpoint": {"steps": 1, "minutes": 0, "rollout_seconds": 0, "background": "always"}}
    run_micro_stages(out, micro, stages, settings)
    path = folder / "recipe.yaml"
    shutil.copy(out / "config.yaml", path)
    return path, out


def weights(out: Path) -> dict[str, bytes]:
    files = [*out.glob("stages/*/checkpoint/model.safetensors"), *out.glob("stages/*/rows.jsonl")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.long(20)
def test_a_run_killed_with_signal_9_at_random_moments(recipe, tmp_path):
    """KILLS kills, each somewhere in what is left of the run, then to the end: weights and log as without them."""
    path, whole = recipe
    out, moments = tmp_path / "run", random.Random(int(os.environ.get("R1FAST_KILL_SEED", "7")))
    seconds = sum(json.loads(f.read_text())["seconds"] for f in whole.glob("stages/*/stage.json"))
    for kill in range(KILLS):
        process = start(out, path, *(["--resume"] if kill else []))
        log, waited = out / "metrics.jsonl", time.monotonic() + 120
        before = log.stat().st_mtime_ns if log.is_file() else 0
        while not (log.is_file() and log.stat().st_mtime_ns != before):
            assert process.poll() is None and time.monotonic() < waited, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds / 2))
        process.kill()
        process.communicate()
    process = start(out, path, "--resume")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert weights(out) == weights(whole)
    assert sorted(map(str, told(out))) == sorted(map(str, told(whole)))


@pytest.mark.long(15)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(recipe, tmp_path, number):
    path, whole = recipe
    out = tmp_path / "a run"
    process = start(out, path, "checkpoint.steps=0")
    waited = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or '"event": "step", "stage": "sft"' not in (
        out / "metrics.jsonl"
    ).read_text():
        assert process.poll() is None and time.monotonic() < waited, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert "--resume" in errors and "a run" in errors
    if not (out / "stages" / "sft" / "stage.json").is_file():
        assert list((out / "stages" / "sft" / SNAPSHOTS).iterdir())
    process = start(out, path, "--resume")
    assert process.communicate(timeout=300)[1] is not None and process.returncode == 0
    assert weights(out) == weights(whole)


# -- numbers that are none ----------------------------------------------------------------------------------------


def break_steps(monkeypatch, bad: set[int]):
    """The loss of the given calls of the learner is not a number."""
    from r1fast.learn.learner import Learner

    step, calls = Learner.step, [0]

    def broken(self, batches, loss):
        calls[0] += 1
        if calls[0] not in bad:
            return step(self, batches, loss)
        return step(self, batches, lambda model, batch: (loss(model, batch)[0] * float("nan"), None))

    monkeypatch.setattr(Learner, "step", broken)


SFT = {"stage": {**STAGES["sft"], "epochs": 4}}  # 32 steps


def alarms(out: Path) -> list[tuple[str, int]]:
    return [(row["name"], row["step"]) for row in read_events(out) if row["event"] == "alarm"]


def test_a_step_that_is_not_finite_is_skipped_and_told(micro, tmp_path, monkeypatch):
    break_steps(monkeypatch, {5, 6, 9})
    run_micro_stages(tmp_path / "run", micro, SFT, {"watchdog": {"nonfinite_steps": 3}})
    assert alarms(tmp_path / "run") == [("nonfinite", 5), ("nonfinite", 6), ("nonfinite", 9)]


def test_several_in_a_row_end_the_run_and_none_of_them_is_saved(micro, tmp_path, monkeypatch):
    break_steps(monkeypatch, {5, 6, 7})
    settings = {"watchdog": {"nonfinite_steps": 3}, "checkpoint": {"steps": 1}}
    with pytest.raises(UserError, match="3 steps in a row, up to step 7"):
        run_micro_stages(tmp_path / "run", micro, SFT, settings)
    newest = max((tmp_path / "run" / "stages" / "stage" / SNAPSHOTS).iterdir())
    assert newest.name == "step-00000004"


def test_rolling_back_goes_on_with_the_data_that_follows(micro, tmp_path, monkeypatch):
    break_steps(monkeypatch, {5, 6, 7})
    settings = {"watchdog": {"nonfinite_steps": 3, "on_nonfinite": "roll_back"}, "checkpoint": {"steps": 2}}
    run_micro_stages(tmp_path / "run", micro, SFT, settings)
    assert alarms(tmp_path / "run")[-1] == ("rolled_back", 7)
    steps = [row for row in read_events(tmp_path / "run") if row["event"] == "step"]
    assert len(steps) == 32 and all(row["loss"] is not None for row in steps[7:])
    rates = [row["learning_rate"] for row in steps]
    assert rates[7:10] == rates[4:7]  # the schedule went back with the weights


def test_rolling_back_again_and_again_ends_too(micro, tmp_path, monkeypatch):
    break_steps(monkeypatch, set(range(5, 33)))
    settings = {"watchdog": {"nonfinite_steps": 2, "on_nonfinite": "roll_back"}, "checkpoint": {"steps": 1}}
    with pytest.raises(UserError, match="2 steps in a row, up to step 12"):
        run_micro_stages(tmp_path / "run", micro, SFT, settings)
    assert [name for name, _ in alarms(tmp_path / "run")].count("rolled_back") == 3
