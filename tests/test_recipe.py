"""Runs that are interrupted, resumed and changed, and what they claim; stages are fakes here."""

import io
import json
import random

import pytest
import torch
from fake_recipe import NAMES, RECIPE
from rich.console import Console

from r1fast import graph
from r1fast.config import UserError, load_recipe
from r1fast.metrics import read_events
from r1fast.progress import PlainProgress
from r1fast.recipe import finished_stages, run, told_before_resuming
from r1fast.stages.context import StageOutcome
from r1fast.summary import claims, phase_totals, table

PASS_AT_1 = {"base": 0.1, "zero": 0.6, "sft": 0.5, "all_rl": 0.6, "student": 0.1, "distill": 0.5, "student_rl": 0.4}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "fake.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(recipe_file):
    return lambda *overrides: load_recipe(str(recipe_file), list(overrides))


# -- running ------------------------------------------------------------------------------------------------------


class Stages:
    """Stands in for r1fast.stages: writes what a stage of its kind writes, made of its seed, of what it reads and of
    the global generators; and remembers who ran."""

    def __init__(self):
        self.ran: list[str] = []
        self.stop_at: tuple[str, BaseException] | None = None

    def __call__(self, ctx):
        self.ran.append(ctx.name)
        ctx.progress.stage(ctx.name, ctx.stage.kind, 2)
        ctx.log.event(
            event="step", stage=ctx.name, kind=ctx.stage.kind, step=1, tokens=10, phase_seconds={"learn": 2.0}
        )
        drawn = [random.random(), torch.rand(1).item()]
        read = [
            (ctx.artifacts[e.source] / "out.txt").read_text() for e in graph.edges(ctx.recipe) if e.target == ctx.name
        ]
        (ctx.directory / "out.txt").write_text(json.dumps([ctx.name, ctx.seed, drawn, read]))
        if self.stop_at and self.stop_at[0] == ctx.name:
            raise self.stop_at[1]
        ctx.progress.update(2, loss=1.0)
        score = PASS_AT_1.get(ctx.name)
        return StageOutcome({"steps": 2}, None if score is None else evaluation(score), "half a line")


def evaluation(score: float) -> dict:
    shares = dict.fromkeys(("format", "language", "greedy", "pass@1_t1"), 0.5)
    return {
        "pass@1": score,
        "pass@1_low": score,
        "pass@1_high": score,
        "cons@k": score,
        "k": 2,
        "length": 9.0,
        **shares,
    }


@pytest.fixture
def stages(monkeypatch):
    fake = Stages()
    monkeypatch.setattr("r1fast.stages.run_stage", fake)
    return fake


def go(recipe, out, **how):
    with open("/dev/null", "w") as nowhere:
        return run(recipe, out, progress=PlainProgress(file=nowhere), **how)


def outputs(out):
    return {name: (out / "stages" / name / "out.txt").read_text() for name in NAMES}


def steps(out):
    return [event["stage"] for event in read_events(out) if event["event"] == "step"]


def test_a_run_leaves_what_it_promises(load, stages, tmp_path):
    out = tmp_path / "run"
    summary = go(load(), out)
    assert stages.ran == NAMES and finished_stages(out) == NAMES
    assert load_recipe(str(out / "config.yaml")) == load()
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [stage["name"] for stage in summary["stages"]] == NAMES
    assert summary["stages"][1]["evaluation"]["pass@1"] == 0.6 and summary["stages"][1]["from"] == "base"
    assert summary["phase_seconds"] == {"learn": 18.0} and summary["tokens_per_second"] == {"learn": 5.0}
    record = json.loads((out / "stages" / "zero" / "stage.json").read_text())
    assert record["outputs"] == {"out.txt": (out / "stages" / "zero" / "out.txt").stat().st_size}
    assert record["seed"] == graph.stage_seed(0, "zero") and record["seconds"] > 0
    told = [(e["stage"], e["status"]) for e in read_events(out) if e["event"] == "stage"]
    assert told == [(name, status) for name in NAMES for status in ("started", "finished")]


def test_resume_reuses_what_is_whole(load, stages, tmp_path):
    out = tmp_path / "run"
    first = go(load(), out)
    stages.ran.clear()
    again = go(load(), out, resume=True)
    assert stages.ran == []
    assert [s["evaluation"] for s in again["stages"]] == [s["evaluation"] for s in first["stages"]]
    assert again["phase_seconds"] == first["phase_seconds"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("no memory")], ids=repr)
def test_interrupted_is_uninterrupted(load, stages, tmp_path, stop):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(load(), whole)
    stages.ran.clear()
    stages.stop_at = ("liking", stop)
    with pytest.raises(type(stop)):
        go(load(), broken)
    assert finished_stages(broken) == NAMES[:4]
    assert not (broken / "summary.json").exists()
    with (broken / "metrics.jsonl").open("a") as log:
        log.write('{"event": "step", "sta')
    stages.stop_at = None
    stages.ran.clear()
    go(load(), broken, resume=True)
    assert stages.ran == NAMES[4:]
    assert outputs(broken) == outputs(whole) and steps(broken) == steps(whole)


def test_resume_does_again_what_was_lost_and_all_that_reads_it(load, stages, tmp_path):
    out = tmp_path / "run"
    go(load(), out)
    before = outputs(out)
    (out / "stages" / "rows" / "out.txt").write_text("cut")
    stages.ran.clear()
    go(load(), out, resume=True)
    assert stages.ran == ["rows", "sft", "liking", "all_rl", "distill"]
    assert outputs(out) == before and sorted(steps(out)) == sorted(NAMES)


@pytest.mark.parametrize("torn", ["", "{", "[]"])
def test_a_record_that_cannot_be_read_counts_as_none(load, stages, tmp_path, torn):
    out = tmp_path / "run"
    go(load(), out)
    (out / "stages" / "distill" / "stage.json").write_text(torn)
    stages.ran.clear()
    go(load(), out, resume=True)
    assert stages.ran == ["distill"]


def test_resume_after_a_change_runs_only_what_changed(load, stages, tmp_path):
    out = tmp_path / "run"
    go(load(), out)
    stages.ran.clear()
    go(load("stages.liking.pairs=9"), out, resume=True)
    assert stages.ran == ["liking", "all_rl", "distill"]
    assert load_recipe(str(out / "config.yaml")).stages["liking"].pairs == 9


def test_a_change_that_is_interrupted_is_not_taken_for_done(load, stages, tmp_path):
    """A lost upstream stage is made again; killed right after it, what reads it must still be done again."""
    out = tmp_path / "run"
    go(load(), out)
    (out / "stages" / "rows" / "out.txt").unlink()
    stages.stop_at = ("sft", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(load(), out, resume=True)
    stages.stop_at = None
    stages.ran.clear()
    go(load(), out, resume=True)
    assert stages.ran == ["sft", "liking", "all_rl", "distill"]
    assert sorted(steps(out)) == sorted(NAMES)


def test_a_resume_with_the_wrong_settings_stopped_in_time_costs_one_stage(load, stages, tmp_path):
    out = tmp_path / "run"
    go(load(), out)
    wrong = load("seed=5")
    told = told_before_resuming(wrong, out)
    assert "seed 0 -> 5" in told and ", ".join(NAMES) in told
    assert told_before_resuming(load(), out) is None
    stages.stop_at = (NAMES[0], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(wrong, out, resume=True)
    assert finished_stages(out) == NAMES[1:]
    stages.stop_at = None
    stages.ran.clear()
    go(load(), out, resume=True)
    assert stages.ran[0] == NAMES[0] and sorted(steps(out)) == sorted(NAMES)


def test_an_existing_run_is_never_overwritten_silently(load, stages, tmp_path):
    out = tmp_path / "run"
    go(load(), out)
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--fresh"):
        go(load(), out)
    (out / "mine.txt").write_text("kept")
    stages.ran.clear()
    go(load(), out, fresh=True)
    assert stages.ran == NAMES and (out / "mine.txt").read_text() == "kept"
    assert steps(out) == NAMES


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"fresh": True}], ids=str)
def test_what_is_no_run_is_left_alone(load, stages, tmp_path, how):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("1")
    with pytest.raises(UserError, match="not empty and not a run"):
        go(load(), out, **how)
    assert [path.name for path in out.iterdir()] == ["chapter.txt"] and not stages.ran


def test_resume_of_nothing_begins(load, stages, tmp_path):
    go(load(), tmp_path / "new", resume=True)
    assert stages.ran == NAMES


def test_bad_input_is_found_before_any_work(load, stages, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError):
        go(load("stages.zero.mix.0.task=chat"), out)  # accuracy of what has no right answer
    assert not out.exists() and not stages.ran


# -- claims -------------------------------------------------------------------------------------------------------


def test_claims_are_measured_and_told_also_when_they_fail(load):
    scores = {name: evaluation(score) for name, score in PASS_AT_1.items()}
    scores["student"]["cons@k"] = 0.05
    found = {claim["claim"].split(":")[1].split()[0]: claim for claim in claims(load(), scores)}
    assert found["zero"]["value"] == pytest.approx(50) and found["zero"]["holds"] is True
    assert found["zero"]["unit"] == "points"
    assert found["all_rl"]["value"] == pytest.approx(10) and found["all_rl"]["holds"] is False
    assert found["distill"]["value"] == pytest.approx(10) and found["distill"]["holds"] is True
    assert found["in"]["value"] == pytest.approx(600 / 7, abs=1e-3) and found["in"]["holds"] is True
    assert len(found) == 5  # and student_rl's
    worse = {**scores, "distill": evaluation(0.4)}
    assert [c["holds"] for c in claims(load(), worse) if "distilling" in c["claim"]] == [False]
    assert claims(load(), {**scores, "student": None})[-2]["claim"].startswith("cons@2")


def test_the_gain_over_a_checkpoint_from_outside_is_measured_where_it_was_evaluated(load):
    outside = ["stages.base=null", "stages.zero.from=model", "stages.sft.from=model"]
    scores = {name: evaluation(score) for name, score in PASS_AT_1.items()} | {"start": evaluation(0.2)}
    assert not [c for c in claims(load(*outside), scores) if "zero" in c["claim"]]
    recipe = load(*outside, "stages.start={kind: evaluate, from: model}")
    found = [c for c in claims(recipe, scores) if "zero" in c["claim"]]
    assert [c["value"] for c in found] == [pytest.approx(40)] and "from model 20.0%" in found[0]["claim"]


@pytest.mark.parametrize(("width", "titles"), [(200, ["kind", "95%", "greedy"]), (80, [])])
def test_the_table_fits_the_terminal(load, stages, tmp_path, width, titles):
    summary = go(load(), tmp_path / "run")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(summary, width))
    lines = console.export_text().splitlines()
    header = next(line for line in lines if "stage" in line)
    assert all(title in header for title in ["pass@1", "cons@2", "format", "language", "length", *titles])
    assert ("kind" in header) == bool(titles) and "…" not in header
    zero = next(line for line in lines if line.startswith("│ zero"))
    assert zero.split("│")[4 if titles else 2].strip() == "60.0"
    assert any(line.startswith("✗ RL adds at least 25 points of pass@1: all_rl 60.0% from sft 50.0%") for line in lines)


def test_phase_totals():
    events = [
        {"event": "step", "tokens": 100, "phase_seconds": {"sample": 2.0, "other": 1.0}},
        {"event": "step", "tokens": 50, "phase_seconds": {"sample": 1.0, "learn": 0.5}},
        {"event": "curve", "seconds": 4.0},
        {"event": "evaluation", "seconds": 3.0},
    ]
    seconds, rates = phase_totals(events)
    assert seconds == {"sample": 3.0, "other": 1.0, "learn": 0.5, "evaluate": 7.0}
    assert rates == {"sample": 50.0, "learn": 100.0}
