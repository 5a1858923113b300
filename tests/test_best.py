"""The best snapshot of an RL stage: chosen by what was measured, kept while others go, its weights left at the end."""

import json

import pytest
from micro_run import run_micro_stages
from test_resume import STAGES, Killed, kill_at, results

from r1fast.config import UserError, load_recipe
from r1fast.metrics import read_events
from r1fast.stages.best import Best
from r1fast.stages.grpo import GRPOStageRun


def test_by_pass_at_1_each_new_best_is_due_and_ties_are_not():
    best, due = Best("pass@1", 100), []
    for step, value in ((10, 0.2), (20, 0.5), (30, 0.5), (40, 0.4), (50, 0.6)):
        best.rewarded(step, 9.0)  # not asked for
        best.measured(step, value)
        due.append(best.due(step))
        assert not best.due(step + 1)
        best.saved(step)
    assert due == [True, True, False, False, True] and (best.step, best.score) == (50, 0.6)


def test_a_best_that_was_not_saved_is_none():
    """As after a step whose gradient was not finite."""
    best = Best("pass@1", 100)
    best.measured(10, 0.9)
    best.saved(11)
    best.measured(20, 0.5)
    best.saved(20)
    assert (best.step, best.score) == (20, 0.5)


def test_by_reward_windows_are_compared_and_a_resumed_one_goes_on():
    rewards = [0, 0, 1, 1, 9, 0, 3, 3, 2, 2]

    def run(best, first, last):
        for step in range(first, last + 1):
            best.rewarded(step, rewards[step - 1])
            best.saved(step)
        return best

    whole = run(Best("reward", 40), 1, 10)
    assert (whole.step, whole.score) == (6, 4.5)  # of two steps, not the 9 of one
    resumed = Best("reward", 40)
    resumed.load_state_dict(run(Best("reward", 40), 1, 5).state_dict())
    assert run(resumed, 6, 10).state_dict() == whole.state_dict()


def test_a_metric_that_a_stage_has_not_is_refused():
    from r1fast.check import check

    recipe = load_recipe("tiny", ["checkpoint.best=pass@1", "stages.zero.evaluate_every=0"])
    with pytest.raises(UserError, match=r"stages.zero does not measure.*evaluate_every"):
        check(recipe)


@pytest.fixture
def scripted(monkeypatch):
    """pass@1 of the curve by step, whatever is measured; the weights at each, as they were."""
    import torch

    script, weights, curve = {0: 0.1, 2: 0.3, 4: 0.9, 6: 0.2}, {}, GRPOStageRun.curve

    def measure(self, step):
        curve(self, step)
        weights[step] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return script[step]

    monkeypatch.setattr(GRPOStageRun, "curve", measure)
    return weights, torch


@pytest.mark.parametrize("adapters", [None, {"rank": 2, "alpha": 4.0}], ids=["whole", "adapters"])
def test_the_best_weights_are_left_and_a_kill_changes_nothing(micro, tmp_path, monkeypatch, scripted, adapters):
    from r1fast.model.weights import load

    weights, torch = scripted
    stage = {**STAGES["grpo"], "adapters": adapters}
    if adapters:
        stage.pop("reference_refresh")
    settings = {"checkpoint": {"steps": 1, "minutes": 0, "keep": 1}}
    plain, out = tmp_path / "plain", tmp_path / "run"
    run_micro_stages(plain, micro, {"stage": stage}, settings)
    with monkeypatch.context() as patched:
        kill_at(patched, 22)  # in the sixth step
        with pytest.raises(Killed):
            run_micro_stages(out, micro, {"stage": stage}, settings)
    kept = sorted(p.name for p in (out / "stages" / "stage" / "snapshots").iterdir())
    assert kept[0] == "step-00000004" and len(kept) == 2
    run_micro_stages(out, micro, {"stage": stage}, settings, resume=True)
    assert results(out) == results(plain)
    record = json.loads((out / "stages" / "stage" / "stage.json").read_text())
    assert record["stats"]["best"] == {"metric": "pass@1", "score": 0.9, "step": 4}
    best, _ = load(out / "stages" / "stage" / "best")
    last, _ = load(out / "stages" / "stage" / "checkpoint")
    assert not all(torch.equal(a, b) for a, b in zip(best.parameters(), last.parameters(), strict=True))
    if not adapters:
        assert all(torch.equal(v, best.state_dict()[k]) for k, v in weights[4].items())
        assert all(torch.equal(v, last.state_dict()[k]) for k, v in weights[6].items())
    assert [row["status"] for row in read_events(out) if row["event"] == "stage"] == ["started", "resumed", "finished"]


def test_the_best_that_is_the_last_is_not_written_twice(micro, tmp_path):
    stage = {**STAGES["grpo"], "evaluate_every": 6}
    run_micro_stages(tmp_path / "run", micro, {"stage": stage})
    record = json.loads((tmp_path / "run" / "stages" / "stage" / "stage.json").read_text())
    assert record["stats"]["best"]["step"] == 6 and not (tmp_path / "run" / "stages" / "stage" / "best").exists()
