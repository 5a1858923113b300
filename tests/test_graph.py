"""The graph of stages: what reads what, in which order, and what a fingerprint covers."""

import random

import pytest
import yaml
from fake_recipe import NAMES, RECIPE

from r1fast import graph
from r1fast.config import UserError, load_recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "fake.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(recipe_file):
    return lambda *overrides: load_recipe(str(recipe_file), list(overrides))


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


def test_a_fingerprint_covers_the_files_of_a_task(load, tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    overrides = [f"tasks.chat={{kind: jsonl, path: {train}, options: {{test_path: {test}}}}}", f"data={train}"]
    overrides += ["stages.base=null", "stages.zero.from=model", "stages.sft.from=model", "stages.student=null"]
    overrides += ["stages.distill.from=model", "stages.student_rl=null", "tasks.totals.path=elsewhere"]

    def prints(*contents: str) -> dict[str, str]:
        train.write_text(contents[0])
        test.write_text(contents[1])
        return graph.fingerprints(load(*overrides))

    before = prints("a", "b")
    for changed in (prints("c", "b"), prints("a", "c")):  # liking and all_rl use chat, and distill reads all_rl
        assert {name for name in before if before[name] != changed[name]} == {"liking", "all_rl", "distill"}


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
