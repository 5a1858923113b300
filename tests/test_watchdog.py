"""A hang is found, told and ended; what a healthy run does is not taken for one."""

import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from r1fast.metrics import PhaseTimer
from r1fast.stop import Stalled, StopRequest
from r1fast.watchdog import STALLED, Watchdog


def config(**changes):
    values = {"enabled": True, "factor": 3.0, "least_seconds": 0.2, "first_seconds": 0.2, **changes}
    return SimpleNamespace(**values)


def test_deadlines_are_learned_from_the_run():
    timer = PhaseTimer()
    dog = Watchdog(timer, None, config(least_seconds=0.0001, first_seconds=9.0), None)
    assert dog.allowed("learn") == 9.0
    for seconds in (0.02, 0.05, 0.01):
        with timer("learn"):
            time.sleep(seconds)
    assert 0.05 <= timer.longest["learn"] < 0.5
    assert dog.allowed("learn") == pytest.approx(3 * timer.longest["learn"])
    assert dog.allowed("sample") == 9.0
    dog.config = config(least_seconds=100.0)
    assert dog.allowed("learn") == 100.0


def test_the_timer_says_what_is_running():
    timer = PhaseTimer()
    assert timer.running() == (None, 0.0)
    with timer("learn"):
        with timer("logprob"):
            assert timer.running()[0] == "logprob"
        phase, seconds = timer.running()
        assert phase == "learn" and seconds >= timer.longest["logprob"]


def test_a_hang_is_told_with_the_stacks_and_ended(tmp_path):
    timer, stop = PhaseTimer(), StopRequest(lambda text: None)
    release = threading.Event()

    def waits_for_a_peer():
        release.wait(30)

    worker = threading.Thread(target=waits_for_a_peer)
    worker.start()
    try:
        with (
            pytest.raises(Stalled, match=r"'sample' has taken .* allowed .*stall-\d+.txt"),
            stop.listening(),
            Watchdog(timer, tmp_path, config(), stop.stalled, every=0.05),
            stop.step(),  # in a step a first signal would wait: this one must not
            timer("sample"),
        ):
            for _ in range(600):
                time.sleep(0.05)
    finally:
        release.set()
        worker.join()
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert "waits_for_a_peer" in text and "test_a_hang_is_told" in text and "processes below" in text


def test_a_slow_step_that_ends_in_time_is_left_alone(tmp_path):
    said, timer = [], PhaseTimer()
    with Watchdog(timer, tmp_path, config(first_seconds=5.0, least_seconds=5.0), said.append, every=0.02):
        for _ in range(5):
            with timer("sample"):
                time.sleep(0.05)
        time.sleep(0.3)  # between phases nothing is counted
    assert not said and not list(tmp_path.iterdir())


def test_a_watchdog_that_is_off_does_nothing(tmp_path):
    said, timer = [], PhaseTimer()
    with Watchdog(timer, tmp_path, config(enabled=False), said.append, every=0.01), timer("sample"):
        time.sleep(0.4)
    assert not said


def test_a_main_thread_that_does_not_hear_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("r1fast.watchdog.GRACE", 0.1)
    said, left, timer = [], [], PhaseTimer()
    with Watchdog(timer, tmp_path, config(), said.append, leave=left.append, every=0.02), timer("sample"):
        time.sleep(1.0)
    assert left == [STALLED] and len(said) == 1


def test_native_code_that_holds_the_lock_is_ended_by_the_system(tmp_path):
    """A loop in C that never lets Python run: only faulthandler's thread is left to end it."""
    code = f"""
        import re, sys
        from types import SimpleNamespace
        from pathlib import Path
        import r1fast.watchdog as w
        from r1fast.metrics import PhaseTimer
        w.UNHEARD = 0.5
        config = SimpleNamespace(enabled=True, factor=3.0, least_seconds=0.5, first_seconds=0.5)
        timer = PhaseTimer()
        with w.Watchdog(timer, Path({str(tmp_path)!r}), config, print, every=0.05), timer("sample"):
            import time; time.sleep(0.2)
            re.match("(a+)+b", "a" * 60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Timeout" in done.stderr and "re/__init__.py" in done.stderr
