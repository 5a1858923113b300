"""Snapshots on disk: whole or not there, damage found and named, a full disk that costs nothing; and asking to stop."""

import errno
import json
import os
import signal

import pytest

from r1fast import snapshot
from r1fast.snapshot import MANIFEST, SnapshotError, newest, write
from r1fast.stop import Stopped, StopRequest


def save(directory, step, text="state", **keep):
    files = {"a": lambda file: file.write_text(text), "b": lambda file: file.write_bytes(b"")}
    return write(directory, step, files, {"k": 1}, **keep)


def find(directory, usable=lambda notes: True):
    told = []
    return newest(directory, usable, told.append), told


def test_what_is_written_is_found(tmp_path):
    save(tmp_path / "s", 3, "three")
    found, told = find(tmp_path / "s")
    assert (found.step, found.notes, found.file("a").read_text(), told) == (3, {"k": 1}, "three", [])


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000030"]
    assert find(tmp_path)[0].step == 30


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find(tmp_path / "none") == (None, [])


def cut(path):
    os.truncate(path / "a", 2)


def flip(path):
    data = bytearray((path / "a").read_bytes())
    data[1] ^= 4
    (path / "a").write_bytes(data)


def edit(change):
    def damage(path):
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(change(manifest)))

    return damage


DAMAGE = {
    "cut short": (cut, "a has 2 bytes, 3 were written"),
    "a flipped bit": (flip, "a does not have the checksum"),
    "a missing file": (lambda path: (path / "b").unlink(), "b is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), f"there is no {MANIFEST}"),
    "half a manifest": (lambda path: os.truncate(path / MANIFEST, 20), "cannot be read (JSONDecodeError)"),
    "a manifest of something else": (edit(lambda m: {"step": 1}), "cannot be read (KeyError)"),
    "a list for a manifest": (edit(lambda m: [1]), "cannot be read (TypeError)"),
    "another format": (edit(lambda m: {**m, "format": 99}), "its format is 99"),
    "a step that is no number": (edit(lambda m: {**m, "step": "x"}), "cannot be read (TypeError)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name):
    save(tmp_path, 1, "one")
    damaged = save(tmp_path, 2, "two").path
    do, why = DAMAGE[name]
    do(damaged)
    found, told = find(tmp_path)
    assert found.step == 1 and found.file("a").read_text() == "one"
    assert len(told) == 1 and str(damaged) in told[0] and why in told[0]


def test_one_of_other_inputs_is_passed_over_in_silence(tmp_path):
    save(tmp_path, 1)
    assert find(tmp_path, lambda notes: notes["k"] == 2) == (None, [])


def test_a_damaged_step_is_written_again(tmp_path):
    cut(save(tmp_path, 2).path)
    save(tmp_path, 2, "new")
    assert find(tmp_path)[0].file("a").read_text() == "new"


FULL = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")


@pytest.mark.parametrize("how", FULL, ids=["from the system", "from torch"])
def test_a_full_disk_leaves_the_last_one_as_it_was(tmp_path, how):
    save(tmp_path, 1, "one")

    def fail(file):
        file.write_text("half")
        raise how

    with pytest.raises(SnapshotError, match=r"cannot be written.*the last whole snapshot is step-00000001.*--resume"):
        write(tmp_path, 2, {"a": fail}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find(tmp_path)[0].file("a").read_text() == "one"


def test_a_mistake_of_the_writer_is_not_taken_for_a_full_disk(tmp_path):
    def fail(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write(tmp_path, 1, {"a": fail}, {})


@pytest.mark.parametrize("stop_after", ["a", "b", MANIFEST, "folder"])
def test_a_kill_while_writing_leaves_nothing_that_is_read(tmp_path, monkeypatch, stop_after):
    """Killed after each sync in turn: the unfinished folder is never read, and goes with the next snapshot."""

    class Killed(BaseException):
        pass

    save(tmp_path, 1, "one")
    sync = snapshot._sync

    def killed(path):
        sync(path)
        if path.name == stop_after or (stop_after == "folder" and path.name.startswith(".step")):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_sync", killed)
        with pytest.raises(Killed):
            save(tmp_path, 2, "two")
    assert find(tmp_path)[0].step == 1
    assert any(p.name.startswith(".step") for p in tmp_path.iterdir())
    save(tmp_path, 3, "three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


# -- asking to stop ---------------------------------------------------------------------------------------------


def test_a_signal_waits_for_the_step():
    said = []
    stop = StopRequest(said.append)
    with stop.listening(), stop.step():
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and "SIGTERM" in said[0] and "saved" in said[0]
        with pytest.raises(KeyboardInterrupt) as second:
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(second.value, Stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_a_step_ends_at_once(number):
    stop = StopRequest()
    before = signal.getsignal(number)
    with pytest.raises(Stopped), stop.listening():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


# -- the best, beside the newest --------------------------------------------------------------------------------


def test_a_spared_step_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, str(step), keep=2, spare=(2,))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (2, 5, 6)]
    assert snapshot.of_step(tmp_path, 2, pytest.fail).file("a").read_text() == "2"
    save(tmp_path, 7, spare=(6,))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (6, 7)]


def test_what_is_written_is_never_pruned(tmp_path):
    """Also where folders of later steps lie there, of a run that went back."""
    for step in (8, 9, 3):
        path = save(tmp_path, step, keep=1).path
    assert path.is_dir()


def test_a_kill_while_pruning_leaves_no_half_of_a_snapshot(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, **_):
        for file in list(path.glob("*"))[:1]:
            file.unlink()
            raise Killed

    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_best_is_named(tmp_path):
    cut(save(tmp_path, 2).path)
    told = []
    assert snapshot.of_step(tmp_path, 2, told.append) is None and snapshot.of_step(tmp_path, 9, told.append) is None
    assert "a has 2 bytes" in told[0] and "no manifest" in told[1]
