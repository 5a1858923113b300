"""Who has had his share makes way: the order of a pool's items, how many stand still, what becomes of them when their
worker dies, and how a program is stopped."""

import contextlib
import itertools
import os
import threading
import time
from pathlib import Path

import pytest
import rewards_for_tests  # noqa: F401 - registers rewards that misbehave, and one that makes way

from r1fast.rewards import Score, base, lane, pool, sandbox
from r1fast.rewards.pool import RewardPool
from r1fast.rewards.process import Worker
from r1fast.rewards.programs import Limits, execute
from r1fast.rewards.watch import Exceeded, Watch, tree
from r1fast.schema import RewardsConfig

needs_bubblewrap = pytest.mark.skipif(
    sandbox.why_not("bubblewrap") is not None, reason=str(sandbox.why_not("bubblewrap"))
)


@pytest.fixture(scope="module")
def workers():
    with RewardPool(workers=1) as workers:
        yield workers


numbers = itertools.count()


def done(workers, *completions):
    """When each of these was done; none may fail. The last word tells equal ones apart."""
    scores = workers.run([("courteous", f"{what} #{next(numbers)}", None) for what in completions])
    assert [score.error for score in scores] == [None] * len(scores)
    return [score.value for score in scores]


def test_fresh_items_come_before_parked_ones_and_those_in_their_order(workers):
    one, two, *fresh = done(workers, "park", "park", *["sleep:0.01"] * 5)
    assert sorted(fresh) == fresh and fresh[-1] < one < two
    assert len(workers._workers) == 1 and workers.restarts == 0  # those who stand still need no worker of their own


def test_no_more_stand_still_than_may(monkeypatch, workers):
    monkeypatch.setattr(pool, "STANDING", 2)
    one, two, three, fresh = done(workers, "park", "park", "park", "")
    assert one < fresh < two < three
    monkeypatch.setattr(pool, "RESIDENT", 1000)
    small, large, fresh = done(workers, "park:400", "park:700", "")
    assert large < fresh < small
    monkeypatch.setattr(base, "_settings", RewardsConfig(sandbox="rlimits"))
    one, two, fresh = done(workers, "park", "park", "")
    assert one < fresh < two


def test_who_waits_goes_on_beside_the_lanes_and_as_many_as_may(monkeypatch, workers):
    monkeypatch.setattr(pool, "STANDING", 2)
    *sleepers, fresh = done(workers, *["leave sleep:0.5"] * 4, "")
    assert sorted(sleepers)[1] < fresh and max(sleepers) - min(sleepers) > 0.45  # the lane was held while three slept
    back, *fresh = done(workers, "leave sleep:0.1 hold", *["sleep:0.1"] * 4)
    assert max(fresh) < back  # what it starts next has a lane as any other


def test_no_time_passes_for_who_stands_still():
    with RewardPool(workers=1, deadline=1.0) as workers:
        done(workers, "park sleep:0.3", *["sleep:0.4"] * 3)
        scores = workers.run([("courteous", "sleep:0.6 park sleep:0.6", None), ("courteous", "sleep:0.1", None)])
        assert scores[0].error == "courteous: no verdict within 1 s" and scores[1].error is None


def test_a_worker_that_dies_costs_those_who_stand_by_nothing(workers):
    before = workers.restarts
    scores = workers.run([("courteous", word, None) for word in ("park", "leave sleep:0.2", "die", "sleep:0.01")])
    assert workers.restarts == before + 1
    assert scores[2] == Score(0.0, "courteous: the verifier's process died (exit code 3)")
    assert all(scores[i].error is None for i in (0, 1, 3)) and scores[3].value < scores[0].value


def test_a_worker_whose_pool_is_gone_ends_though_items_stand_still():
    worker = Worker()
    worker.send(7, ("courteous", "park", None), 60.0)
    while worker.jobs[7].place != "parked":
        worker.receive()
    worker.process.stdin.close()
    assert worker.process.wait(20) == 0


# -- programs -------------------------------------------------------------------------------------------------------

FAMILY = """
import os
for _ in range(3):
    if os.fork() == 0:
        break
while True:
    pass
"""


class Looking:
    """A lane that looks at the programs that make way, and gives it back after a while."""

    held = True

    def __init__(self, seconds):
        self.seconds, self.states, self.left = seconds, [], 0

    def leave(self, resident):
        self.held, self.left = False, resident

    def park(self, resident):
        time.sleep(self.seconds)
        for pid in tree(os.getpid()):
            if b"/sandbox/harness.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                self.states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        self.held = True


def in_lane(place, source, limits):
    """What `execute` gives, in a thread of its own, as in a worker."""
    found = []

    def run():
        lane.current.set(place)
        try:
            found.append(execute(source, "", limits, "bubblewrap"))
        except Exceeded as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


@needs_bubblewrap
def test_a_program_stands_still_with_all_it_has_started_and_goes_on_as_if_nothing_were():
    place = Looking(1.0)
    assert in_lane(place, FAMILY, Limits(seconds=0.8)) == "no end within 0.8 s"
    assert len(place.states) >= 4 and set(place.states) == {"T"}
    place = Looking(1.0)
    right = "import time\nwhile time.process_time() < 0.3: pass\nprint('done')"
    assert in_lane(place, right, Limits(seconds=0.8)) == (0, b"done\n")  # that second of standing still is not its own
    assert place.states


@needs_bubblewrap
def test_a_program_that_sleeps_leaves_its_lane_and_comes_back_to_compute():
    place = Looking(0.1)
    assert in_lane(place, "import time\ntime.sleep(0.6)\nprint('done')", Limits()) == (0, b"done\n")
    assert place.left > 1 << 20 and not place.held and not place.states
    place = Looking(0.1)
    source = "import time\ntime.sleep(0.6)\nwhile time.process_time() < 0.4: pass\nprint('done')"
    assert in_lane(place, source, Limits()) == (0, b"done\n")
    assert place.left and place.held and set(place.states) == {"T"}


@needs_bubblewrap
def test_right_programs_that_take_long_are_right_among_many_short_ones():
    def item(number, seconds):
        source = f"import time\nwhile time.process_time() < {seconds}: pass\nprint({number})"
        return "code", source, {"tests": [{"input": "", "output": str(number)}], "seconds": 1}

    long = {number: 0.4 for number in range(0, 30, 10)}
    with RewardPool(workers=2) as workers:
        scores = workers.run([item(number, long.get(number, 0.0)) for number in range(30)])
        assert scores == [Score(1.0)] * 30 and workers.restarts == 0 and len(workers._workers) == 2


@needs_bubblewrap
def test_what_a_program_has_queued_is_not_held_against_it_when_it_ends(monkeypatch):
    """The kernel's record of it ends with the process, which may be seen before its end is."""
    with contextlib.ExitStack() as stack:
        program = sandbox.start("probe", {"solution.py": b""}, Limits())
        stack.callback(program.close)
        watch = Watch([program], Limits(seconds=1.0))
        watch.wait_ready()
        watch.began -= 2.0
        queued = iter(["0 1500000000 9", *["0 1000 9"] * 99])
        monkeypatch.setattr(Path, "read_text", lambda path: next(queued))
        watch.check()
        watch.check()
        watch.began -= 1.0
        with pytest.raises(Exceeded):
            watch.check()
