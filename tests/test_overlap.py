"""Scoring and learning that begin while others are still being drawn: in the same order, and to the same bits, as when
all are waited for."""

import threading
import time
from random import Random

import pytest
from micro_run import run_micro_stages

from r1fast.config import UserError
from r1fast.learn.policy import PolicyLearning
from r1fast.metrics import PhaseTimer, read_events
from r1fast.parallel import World
from r1fast.rollout.sampler import Sampler
from r1fast.stages.overlap import Feed, Scoring

# -- the parts ------------------------------------------------------------------------------------------------------


def test_groups_are_scored_aside_and_those_that_came_meanwhile_together():
    calls, first, go = [], threading.Event(), threading.Event()

    def score(indices, groups):
        calls.append((indices, threading.current_thread().name))
        first.set()
        assert go.wait(10)
        return [group.upper() for group in groups]

    with Scoring(score, aside=True) as scoring:
        scoring.add([(4, "a")])
        assert first.wait(10)
        scoring.add([(2, "b"), (0, "c")])
        scoring.add([(1, "d")])
        assert not scoring.ready(4)
        go.set()
        assert [scoring.result(i) for i in (0, 1, 2, 4)] == ["C", "D", "B", "A"]
        assert scoring.ready(2)
    assert [indices for indices, _ in calls] == [[4], [2, 0, 1]]
    assert {name for _, name in calls} == {"scoring"}
    assert scoring.seconds > 0


def test_cheap_scores_are_there_at_once_in_the_same_thread():
    with Scoring(lambda indices, groups: [threading.current_thread() for _ in groups], aside=False) as scoring:
        scoring.add([(0, "a")])
        assert scoring.ready(0) and scoring.result(0) is threading.current_thread()


@pytest.mark.parametrize("aside", [False, True])
def test_what_scoring_raises_is_raised_where_the_score_is_asked_for(aside):
    def score(indices, groups):
        raise UserError("no such language")

    with Scoring(score, aside) as scoring:
        scoring.add([(0, "a"), (1, "b")])
        for index in (1, 0):
            with pytest.raises(UserError, match="no such language"):
                scoring.result(index)


@pytest.mark.parametrize("when", ["after", "between", "beside"])
def test_groups_are_learned_from_in_the_order_in_which_they_finished(when):
    order, learned = [3, 0, 4, 1, 2], []
    random = Random(5)

    def score(indices, groups):
        time.sleep(random.random() / 100)
        return groups

    with Scoring(score, aside=True) as scoring:
        feed = Feed(lambda index, group: learned.append((index, group)), scoring, when, "cpu", PhaseTimer())
        for index in order:
            scoring.add([(index, f"group {index}")])
            feed.finished(index)
            time.sleep(random.random() / 50)
        before = len(learned)
        feed.rest()
    assert learned == [(index, f"group {index}") for index in order]
    assert feed.order == order
    assert before == 0 if when == "after" else before > 0


@pytest.mark.parametrize("when", ["after", "between", "beside"])
def test_what_learning_raises_ends_the_step(when):
    def learn(index, group):
        raise UserError("out of memory with a single micro-batch")

    with Scoring(lambda indices, groups: groups, aside=False) as scoring, pytest.raises(UserError, match="single"):
        feed = Feed(learn, scoring, when, "cpu", PhaseTimer())
        scoring.add([(0, "a")])
        feed.finished(0)
        feed.rest()


def test_what_was_learned_beside_the_sampler_was_waited_for_by_nobody():
    begun = threading.Semaphore(0)

    def learn(index, group):
        begun.release()
        time.sleep(0.01)

    with Scoring(lambda indices, groups: groups, aside=False) as scoring:
        feed = Feed(learn, scoring, "beside", "cpu", PhaseTimer())
        scoring.add([(0, "a"), (1, "b")])
        for index in (0, 1):
            feed.finished(index)
            assert begun.acquire(timeout=10)
        feed.rest()  # the first one is behind it, the second is under way
    assert feed.seconds >= 0.02 and feed.seconds - feed.waited["learn"] >= 0.009


# -- a whole stage --------------------------------------------------------------------------------------------------

SLOW = """
import time
from r1fast.rewards import Reward, register

@register("slow")
class Slow(Reward):
    cheap = False

    def judge(self, completion, reference):
        time.sleep(len(completion) % 4 / 200)
        return len(completion) % 5 / 4
"""
STAGE = {
    "kind": "grpo",
    "steps": 3,
    "prompts_per_step": 8,
    "group_size": 4,
    "mix": [{"task": "totals", "rewards": {"slow": 1.0, "accuracy": 1.0}}],
    "sampling": {"max_tokens": 40},
    "objective": {"kl_coef": 0.05, "aggregate": "token"},
    "micro_batch_tokens": 150,
    "evaluate": False,
    "optimizer": {"learning_rate": 2e-3},
}
CLOCKS = ("time", "seconds", "phase_seconds", "overlap_seconds", "tokens_per_second", "free")


@pytest.fixture(scope="module")
def runs(micro, tmp_path_factory):
    """way -> (weights, events, what happened in order) of one stage; `beside` is a GPU's way, here with a thread."""
    plugin = tmp_path_factory.mktemp("plugin") / "slow.py"
    plugin.write_text(SLOW)
    found = {}
    for way in ("never", "auto", "always", "beside"):
        out, happened = tmp_path_factory.mktemp(way) / "run", []
        with pytest.MonkeyPatch.context() as patched:
            add, sample = PolicyLearning.add, Sampler.sample

            def added(self, index, group, now=False, add=add, happened=happened):
                happened.append("early" if now else "late")
                add(self, index, group, now)

            def sampled(self, *args, sample=sample, happened=happened, **more):
                groups = sample(self, *args, **more)
                happened.append("drawn")
                return groups

            patched.setattr(PolicyLearning, "add", added)
            patched.setattr(Sampler, "sample", sampled)
            if way == "beside":
                patched.setattr("r1fast.stages.drawing.way", lambda stage, device: "beside")
            stage = {**STAGE, "overlap": "always" if way == "beside" else way}
            run_micro_stages(out, micro, {"rl": stage}, {"plugins": [str(plugin)]})
        weights = (out / "stages" / "rl" / "checkpoint" / "model.safetensors").read_bytes()
        found[way] = weights, [e for e in read_events(out) if e["event"] == "step"], happened
    return found


@pytest.mark.parametrize("way", ["auto", "always", "beside"])
def test_overlapped_is_sequential_bit_for_bit(runs, way):
    weights, events, _ = runs[way]
    expected, sequential, _ = runs["never"]
    assert weights == expected
    plain = [[{k: v for k, v in e.items() if k not in CLOCKS} for e in told] for told in (events, sequential)]
    assert plain[0] == plain[1]
    assert len(events) == 3 and all(event["grad_norm"] > 0 for event in events)


def test_groups_are_learned_from_when_the_recipe_says(runs):
    assert runs["never"][2] == (["drawn"] + ["late"] * 8) * 3
    assert runs["auto"][2] == (["drawn"] + ["early"] * 8) * 3
    for way in ("always", "beside"):
        happened = runs[way][2]
        assert happened.count("early") == 24 and happened.count("drawn") == 3
        assert "early" in happened[: happened.index("drawn")]


def test_the_seconds_that_nobody_waited_for_are_told(runs):
    for way, (_, events, _) in runs.items():
        for event in events:
            seconds = event["overlap_seconds"]
            assert set(seconds) == {"score", "learn"} and min(seconds.values()) >= 0
            assert seconds["learn"] == 0 or way == "beside"  # else it is in the phase `learn`


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dynamic_sampling": True}, "overlap=always and dynamic_sampling exclude each other"),
        ({"adapters": {"rank": 2}}, "overlap=always and adapters exclude"),
        ({"objective": {"truncated_is": 2.0}}, "overlap=always and objective.truncated_is exclude"),
    ],
)
def test_an_overlap_that_cannot_be_is_one_sentence(micro, tmp_path, changes, words):
    mix = [{"task": "totals", "rewards": {"accuracy": 1.0}}]
    with pytest.raises(UserError, match=words):
        run_micro_stages(tmp_path / "run", micro, {"rl": {**STAGE, "mix": mix, "overlap": "always", **changes}})
    assert not (tmp_path / "run" / "stages" / "rl").exists()


def test_of_several_processes_none_begins_early(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("r1fast.stages.drawing.world", lambda: World(0, 2))
    mix = [{"task": "totals", "rewards": {"accuracy": 1.0}}]
    with pytest.raises(UserError, match="for a single process, here are 2"):
        run_micro_stages(tmp_path / "run", micro, {"rl": {**STAGE, "mix": mix, "overlap": "always"}})
