"""The graph of stages, fingerprints, and runs that are interrupted, resumed and changed; stages are fakes here."""

import io
import json
import random

import pytest
import torch
import yaml
from rich.console import Console

from r1fast import graph
from r1fast.config import UserError, load_recipe
from r1fast.metrics import read_events
from r1fast.progress import PlainProgress
from r1fast.recipe import finished_stages, run
from r1fast.stages.context import StageOutcome
from r1fast.summary import claims, phase_totals, table

RECIPE = """\
name: fake
threads: 1
model: {template: words, max_length: 160}
tasks:
  totals: {kind: totals}
  chat: {kind: general}
evaluation: {task: totals, limit: 4, samples: 2, sampling: {max_tokens: 64}}
stages:
  base: {kind: pretrain, task: totals}
  zero: {kind: grpo, from: base, mix: [{task: totals}], sampling: {max_tokens: 64}}
  rows: {kind: reject, from: zero, task: totals, sampling: {max_tokens: 64}}
  sft: {kind: sft, from: base, data: [{stage: rows}, {task: totals, limit: 3}]}
  liking: {kind: reward_model, from: sft, task: chat}
  all_rl:
    kind: grpo
    from: sft
    reward_model: liking
    mix: [{task: totals}, {task: chat, rewards: {preference: 1.0}}]
    sampling: {max_tokens: 64}
  student: {kind: pretrain, task: totals, steps: 7}
  distill: {kind: distill, from: student, teacher: all_rl, data: [{stage: rows}]}
  student_rl: {kind: grpo, from: student, mix: [{task: totals}], sampling: {max_tokens: 64}}
"""
NAMES = ["base", "zero", "rows", "sft", "liking", "all_rl", "student", "distill", "student_rl"]
PASS_AT_1 = {"base": 0.1, "zero": 0.6, "sft": 0.5, "all_rl": 0.6, "student": 0.1, "distill": 0.5, "student_rl": 0.4}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "fake.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(recipe_file):
    return lambda *overrides: load_recipe(str(recipe_file), list(overrides))


# -- graph --------------------------------------------------------------------------------------------------------


def test_order_keeps_the_files_where_it_may(load):
    assert graph.order(load()) == NAMES


def test_order_follows_what_is_read(load, recipe_file):
    recipe = yaml.safe_load(RECIPE)
    names = list(recipe["stages"])
    for seed in range(5):
        random.Random(seed).shuffle(names)
        recipe_file.write_text(
            yaml.safe_dump({**recipe, "stages": {n: recipe["stages"][n] for n in names}}, sort_keys=False)
        )
        ordered = graph.order(load())
        assert sorted(ordered) == sorted(NAMES)
        for edge in graph.edges(load()):
            assert ordered.index(edge.source) < ordered.index(edge.target)


def test_edges(load):
    found = {(e.source, e.target, e.kind) for e in graph.edges(load())}
    assert found == {
        ("base", "zero", "from"),
        ("zero", "rows", "from"),
        ("base", "sft", "from"),
        ("rows", "sft", "data"),
        ("sft", "liking", "from"),
        ("sft", "all_rl", "from"),
        ("liking", "all_rl", "reward model"),
        ("student", "distill", "from"),
        ("rows", "distill", "data"),
        ("all_rl", "distill", "teacher"),
        ("student", "student_rl", "from"),
    }
    assert graph.dependents(load(), {"liking"}) == {"liking", "all_rl", "distill"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.zero.from=bse", "stages.zero.from is 'bse', which is no stage (did you mean 'base'?)"),
        ("stages.zero.from=rows", "needs a checkpoint (from) of stage 'rows', which is of kind reject"),
        ("stages.sft.data.0.stage=zero", "needs supervised rows (data) of stage 'zero', which is of kind grpo"),
        ("stages.sft.data.0.stage=row", "stages.sft.data.0.stage is 'row', which is no stage (did you mean 'rows'?)"),
        ("stages.all_rl.reward_model=sft", "needs a reward model (reward model) of stage 'sft'"),
        (
            "stages.distill.teacher=all-rl",
            "stages.distill.teacher is 'all-rl', which is no stage (did you mean 'all_rl'?)",
        ),
        ("stages.zero.from=zero", "form a circle, so none can be first: zero reads zero"),
        ("stages.base={kind: sft, from: sft, data: [{task: totals}]}", "base reads sft reads base"),
        ("stages.rows=null", "stages.sft.data.0.stage is 'rows', which is no stage"),
    ],
)
def test_a_wrong_arrow_is_named(load, override, says):
    with pytest.raises(UserError) as error:
        graph.order(load(override))
    assert says in str(error.value)


# -- fingerprints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", set(NAMES)),
        ("stages.zero.steps=7", {"zero", "rows", "sft", "liking", "all_rl", "distill"}),
        ("stages.distill.epochs=1", {"distill"}),
        ("stages.liking.pairs=9", {"liking", "all_rl", "distill"}),
        ("model.max_length=161", set(NAMES)),
        ("evaluation.samples=3", set(NAMES)),  # rows and liking are not evaluated, but read stages that are
        ("stages.student_rl=null", set()),
        ("device=cpu", set()),
        ("threads=2", set()),
        ("description=other", set()),
        ("stages.late={kind: evaluate, from: zero}", set()),
    ],
)
def test_a_fingerprint_changes_with_what_the_stage_depends_on(load, override, changed):
    before, after = graph.fingerprints(load()), graph.fingerprints(load(override))
    assert {name for name in before if name in after and before[name] != after[name]} == changed
    assert len(set(before.values())) == len(NAMES)


def test_an_evaluation_concerns_the_stages_that_are_evaluated(load):
    off = [f"stages.{name}.evaluate=false" for name in ("base", "zero", "sft", "student", "distill")]
    before, after = graph.fingerprints(load(*off)), graph.fingerprints(load(*off, "evaluation.samples=3"))
    assert {n for n in NAMES if before[n] != after[n]} == {"all_rl", "student_rl", "distill"}  # distill reads all_rl


def test_a_fingerprint_covers_the_content_of_files(load, tmp_path):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    overrides = [f"stages.sft.data.1={{path: {rows}}}", "stages.student=null", "stages.student_rl=null"]
    overrides += ["stages.distill.from=model", f"model.path={model}"]

    def prints(content: str) -> dict[str, str]:
        rows.write_text(content)
        return graph.fingerprints(load(*overrides))

    before = prints("a")
    assert prints("a") == before
    after = prints("b")
    assert {n for n in before if before[n] != after[n]} == {"sft", "liking", "all_rl", "distill"}
    (model / "config.json").write_text("{ }")
    assert {n for n, print_ in prints("b").items() if after[n] != print_} == {"distill"}


def test_a_tasks_block_concerns_who_uses_it_and_whoever_makes_a_vocabulary(load):
    task = "tasks.chat.kind=totals"
    before, after = graph.fingerprints(load()), graph.fingerprints(load(task))
    assert before["base"] != after["base"]
    from_model = ["stages.base=null", "stages.zero.from=model", "stages.sft.from=model"]
    before, after = graph.fingerprints(load(*from_model)), graph.fingerprints(load(*from_model, task))
    assert before["zero"] == after["zero"] and before["liking"] != after["liking"]


def test_stage_seeds_are_stable_and_differ():
    assert graph.stage_seed(0, "base") == graph.stage_seed(0, "base")
    seeds = {graph.stage_seed(seed, name) for seed in range(20) for name in NAMES}
    assert len(seeds) == 20 * len(NAMES) and all(0 <= seed < 2**31 for seed in seeds)


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
    assert found["all_rl"]["value"] == pytest.approx(10) and found["all_rl"]["holds"] is False
    assert found["distill"]["value"] == pytest.approx(10) and found["distill"]["holds"] is True
    assert found["in"]["value"] == pytest.approx(6 / 7, abs=1e-3) and found["in"]["holds"] is True
    assert len(found) == 5  # and student_rl's
    worse = {**scores, "distill": evaluation(0.4)}
    assert [c["holds"] for c in claims(load(), worse) if "distilling" in c["claim"]] == [False]
    assert claims(load(), {**scores, "student": None})[-2]["claim"].startswith("cons@2")


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
