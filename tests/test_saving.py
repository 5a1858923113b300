"""Snapshots beside the next steps: of a copy, one at a time, errors at the next step, a kill leaves the one before."""

import subprocess
import sys
import threading

import pytest
import torch
from micro_run import run_micro_stages
from test_resume import STAGES, results

from r1fast import snapshot
from r1fast.schema import CheckpointConfig
from r1fast.snapshot import SnapshotError
from r1fast.stages import saved, saving
from r1fast.stages.saving import Saver

ALWAYS = CheckpointConfig(background="always")


@pytest.fixture
def gate(monkeypatch):
    """torch.save waits for it."""
    opened, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *given: opened.wait(30) and save(*given))
    yield opened
    opened.set()


def newest(folder):
    found = snapshot.newest(folder, lambda notes: True, pytest.fail)
    return found and (found.step, saved.read(found.path, None))


def test_what_is_written_is_what_was_there_when_it_began(tmp_path, gate):
    saver, state = Saver(tmp_path, ALWAYS), {"part": {"w": torch.ones(3), "list": [torch.zeros(2), "text", None]}}
    saver.save(1, state, {}, (), last=False)
    state["part"]["w"].mul_(7)
    state["part"]["list"][0].add_(1)
    assert saver.saved == 0 and newest(tmp_path) is None
    saver.look()
    gate.set()
    saver.wait()
    step, read = newest(tmp_path)
    assert (saver.saved, step) == (1, 1)
    assert read["part"]["w"].tolist() == [1, 1, 1] and read["part"]["list"][0].tolist() == [0, 0]
    assert read["part"]["list"][1:] == ["text", None]


def test_one_is_under_way_at_a_time(tmp_path, gate):
    saver = Saver(tmp_path, ALWAYS)
    saver.save(1, {"w": torch.ones(1)}, {}, (), last=False)
    threading.Timer(0.2, gate.set).start()
    saver.save(2, {"w": torch.ones(1) * 2}, {}, (), last=True)  # waits for the first, then writes at once
    assert newest(tmp_path)[0] == 2 and saver.saved == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_an_error_is_raised_at_the_next_look_and_once(tmp_path, monkeypatch):
    saver = Saver(tmp_path, ALWAYS)
    saver.save(1, {"w": torch.ones(1)}, {}, (), last=False)
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        saver.save(2, {"w": torch.ones(1)}, {}, (), last=False)
        saver._thread.join()
        with pytest.raises(SnapshotError, match=r"No space left.*step-00000001"):
            saver.look()
    saver.look()
    assert newest(tmp_path)[0] == 1 and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_run_ends_with_one_sentence_and_its_rest_has_the_same_bits(micro, tmp_path, monkeypatch):
    """The disk is full at the second snapshot, which is written beside the steps after it."""
    sft = {"stage": {**STAGES["sft"], "epochs": 4}}
    settings = {"checkpoint": {"steps": 2, "minutes": 0, "background": "always"}}
    save, count = torch.save, [0]

    def full(*given):
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        save(*given)

    whole, out = tmp_path / "whole", tmp_path / "run"
    run_micro_stages(whole, micro, sft)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(SnapshotError, match=r"No space left on device.*step-00000002.*--resume"):
            run_micro_stages(out, micro, sft, settings)
    run_micro_stages(out, micro, sft, settings, resume=True)
    assert results(out) == results(whole)


def test_by_itself_it_is_done_where_the_state_is_large(tmp_path, monkeypatch):
    small, large = {"w": torch.ones(10)}, {"w": torch.ones(1000)}
    monkeypatch.setattr(saving, "PAYS", 2000)
    never = Saver(tmp_path / "never", CheckpointConfig(background="never"))
    auto = Saver(tmp_path, CheckpointConfig())
    for saver, state, beside in ((auto, small, False), (auto, large, True), (never, large, False)):
        saver.save(1, state, {}, (), last=False)
        assert (saver._thread is not None) is beside
        saver.wait()


KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from r1fast.schema import CheckpointConfig
from r1fast.stages.saving import Saver
saver = Saver(Path(sys.argv[1]), CheckpointConfig(background="always"))
saver.save(1, {"w": torch.ones(1 << 18)}, {}, (), last=False)
saver.wait()
save = torch.save
def half(state, file):
    save(state, file)
    os.truncate(file, 1 << 19)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
saver.save(2, {"w": torch.zeros(1 << 18)}, {}, (), last=False)
time.sleep(60)
"""


def test_killed_while_it_is_written_the_one_before_is_used(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # what was half written lies there until the next
    step, state = newest(tmp_path)
    assert step == 1 and state["w"].sum() == 1 << 18
    Saver(tmp_path, ALWAYS).save(2, {"w": torch.ones(1)}, {}, (), last=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
