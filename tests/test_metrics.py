"""The run log and the phase timer."""

import json
import time

import numpy as np
import pytest

from r1fast.metrics import EVENTS, SAMPLES, PhaseTimer, RunLog, read_events, read_rows, write_atomically


def test_events_are_appended_one_flushed_line_each(tmp_path):
    with RunLog(tmp_path) as log:
        log.event(event="step", stage="zero", step=1, reward=0.5)
        assert json.loads((tmp_path / EVENTS).read_text()) == {**read_events(tmp_path)[0]}  # there before close
        log.event(event="step", stage="zero", step=2, reward=np.float32(0.25), words="加")
        log.sample(stage="zero", prompt="3 + 4 ?", completion="7")
    rows = read_events(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["reward"] == 0.25 and rows[1]["words"] == "加"
    assert 0 <= rows[0]["time"] <= rows[1]["time"] < 60
    assert list(read_rows(tmp_path / SAMPLES)) == [{"stage": "zero", "prompt": "3 + 4 ?", "completion": "7"}]


def test_what_json_has_no_number_for_is_null(tmp_path):
    with RunLog(tmp_path) as log:
        log.event(event="step", loss=float("nan"), phases={"a": float("inf"), "b": [1.0, float("-inf")]}, n=np.int64(3))
    line = (tmp_path / EVENTS).read_text()
    row = json.loads(line, parse_constant=pytest.fail)  # strict: NaN and Infinity are not JSON
    assert row["loss"] is None and row["phases"] == {"a": None, "b": [1.0, None]} and row["n"] == 3


def test_a_resumed_log_drops_the_torn_line_and_goes_on_in_time(tmp_path):
    with RunLog(tmp_path) as log:
        log.event(event="step", stage="zero", step=1)
    path = tmp_path / EVENTS
    path.write_text(path.read_text().replace('"time": 0', '"time": 100') + '{"event": "st')
    assert len(read_events(tmp_path)) == 1
    with RunLog(tmp_path) as log:
        log.event(event="step", stage="zero", step=2)
    first, second = read_events(tmp_path)
    assert second["step"] == 2 and second["time"] >= first["time"] >= 100


def test_keep_stages_forgets_the_others(tmp_path):
    with RunLog(tmp_path) as log:
        for stage in ("base", "zero", "base", None):
            log.event(event="step", stage=stage)
            log.sample(stage=stage)
        log.keep_stages(["base"])
        log.event(event="step", stage="later")
    assert [row["stage"] for row in read_events(tmp_path)] == ["base", "base", "later"]
    assert [row["stage"] for row in read_rows(tmp_path / SAMPLES)] == ["base", "base"]


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


class Clock:
    """A perf_counter that only moves when told."""

    now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_phases_add_up_and_never_overlap(clock):
    timer = PhaseTimer()
    with timer("sample"):
        clock.now += 2
        with timer("score"):
            clock.now += 3
        clock.now += 1
    clock.now += 4
    with timer("sample"):
        clock.now += 1
    assert timer.take(other=True) == {"sample": 4.0, "score": 3.0, "other": 4.0}
    with timer("learn"):
        clock.now += 5
        assert timer.take() == {"learn": 5.0}  # also in the middle of a phase
        clock.now += 1
    assert timer.take(other=True) == {"learn": 1.0, "other": 0.0}


def test_a_phase_that_raises_is_closed(clock):
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer("sample"):
        clock.now += 1
        raise RuntimeError
    clock.now += 1
    assert timer.take() == {"sample": 1.0}
