"""Recipes from YAML and overrides: what is read is what runs, and every mistake is one sentence with its place."""

import pytest
import yaml

from r1fast.config import UserError, dump_recipe, load_recipe, presets
from r1fast.schema import RecipeConfig

RECIPE = """\
name: small
tasks:
  totals: {kind: totals}
stages:
  base:
    kind: pretrain
    task: totals
  zero:
    kind: grpo
    from: base
    mix:
      - {task: totals, rewards: {accuracy: 1.0, format: 0.2}}
    objective: &rl {kl_coef: 0.0}
  more:
    kind: grpo
    from: zero
    mix:
      - {task: totals}
    objective: *rl
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def load(path, *overrides) -> RecipeConfig:
    return load_recipe(str(path), list(overrides))


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_under_their_own_name_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert presets()[name] == recipe.description and len(recipe.description) > 20
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load(saved) == recipe


def test_the_saved_recipe_is_complete(recipe_file):
    saved = yaml.safe_load(dump_recipe(load(recipe_file)))
    assert saved["stages"]["zero"]["from"] == "base"
    assert saved["stages"]["zero"]["objective"]["kl_kind"] == "k3"
    assert saved["stages"]["zero"]["optimizer"]["learning_rate"] == 3e-6
    assert set(saved) == set(RecipeConfig.model_fields)


def test_the_papers_numbers():
    zero = load_recipe("r1-zero").stages["zero"]
    assert (zero.optimizer.learning_rate, zero.objective.kl_coef, zero.sampling.temperature) == (3e-6, 0.001, 1.0)
    assert (zero.group_size, zero.prompts_per_step, zero.steps, zero.reference_refresh) == (16, 32, 10400, 400)
    assert zero.mix[0].rewards == {"accuracy": 1.0, "format": 1.0}
    r1 = load_recipe("r1").stages
    assert r1["reasoning_rl"].objective.clip_low == r1["reasoning_rl"].objective.clip_high == 10
    assert r1["reasoning_rl"].mix[0].rewards["language"] == 1.0
    assert r1["sft"].from_ == "model" and r1["sft"].batch_examples == 128
    assert (r1["sft"].optimizer.learning_rate, r1["sft"].optimizer.final) == (5e-5, 0.1)
    late = r1["all_rl"].mix[1]
    assert r1["all_rl"].steps - round(late.start * r1["all_rl"].steps) == 400
    assert r1["all_rl"].sampling.temperature == 0.7
    assert (r1["preference"].optimizer.learning_rate, r1["preference"].batch_pairs) == (6e-6, 256)
    student = load_recipe("distill").stages["distill"]
    assert (student.batch_examples, student.optimizer.learning_rate, student.optimizer.final) == (64, 1e-4, 0.1)


def test_overrides(recipe_file):
    recipe = load(
        recipe_file,
        "seed=3",
        "stages.zero.optimizer.learning_rate=1e-4",
        "stages.zero.mix.0.rewards.language=0.5",
        "stages.zero.mix.0.rewards.format=null",
        "stages.zero.overlong.window=8",
        "tasks.totals.options.total_max=60",
        "tasks.chat={kind: general}",
        "model.path=some/where",
        "stages.zero.objective.clip_high=10",
    )
    zero = recipe.stages["zero"]
    assert recipe.seed == 3 and recipe.model.path == "some/where"
    assert zero.optimizer.learning_rate == 1e-4 and zero.overlong.window == 8
    assert zero.mix[0].rewards == {"accuracy": 1.0, "language": 0.5}
    assert recipe.tasks["totals"].options == {"total_max": 60} and recipe.tasks["chat"].kind == "general"
    # An anchor in the file gives two stages one block; an override of the one must not reach the other.
    assert zero.objective.clip_high == 10 and recipe.stages["more"].objective.clip_high == 0.2


def test_null_removes_a_stage_and_leaves_optional_values_empty(recipe_file):
    assert list(load(recipe_file, "stages.more=null").stages) == ["base", "zero"]
    assert load(recipe_file, "stages.zero.reference_refresh=null").stages["zero"].reference_refresh is None


WRONG = [
    (
        ["stages.zero.optimizer.lerning_rate=1"],
        "unknown key 'lerning_rate' in stages.zero.optimizer",
        "'learning_rate'",
    ),
    (["stages.zero.mix.0.shre=2"], "unknown key 'shre' in stages.zero.mix.0", "'share'"),
    (["modl.path=x"], "unknown key 'modl' in the recipe", "'model'"),
    (["qqq=1"], "unknown key 'qqq' in the recipe", "known are name, description"),
    (["stages.zero.steps=abc"], "stages.zero.steps must be a whole number", '"abc"'),
    (["stages.zero.steps=3.5"], "stages.zero.steps must be a whole number", "3.5"),
    (["stages.zero.steps=yes"], "stages.zero.steps must be a whole number", "true"),
    (["stages.zero.steps=0"], "stages.zero.steps should be greater than 0", "not 0"),
    (["stages.zero.evaluate=1"], "stages.zero.evaluate must be true or false", "not 1"),
    (["stages.zero.mix.0.start=1"], "stages.zero.mix.0.start should be less than 1", "not 1"),
    (["stages.zero.objective.kl_kind=k4"], "stages.zero.objective.kl_kind must be 'k1', 'k2' or 'k3'", '"k4"'),
    (["stages.zero.optimizer.betas=[0.9]"], "stages.zero.optimizer.betas", "needs 2 values"),
    (["stages.zero.optimizer.learning_rate=.nan"], "stages.zero.optimizer.learning_rate", "not"),
    (["model=3"], "model must be a mapping", "not 3"),
    (["model.path=5"], "model.path must be text", "not 5"),
    (["seed.x=3"], "seed is 0, which has no keys", "override 'seed.x=3'"),
    (["stages.zero.kind=gprp"], "stages.zero.kind is 'gprp'", "'grpo'"),
    (["stages.zreo.steps=5"], "the recipe has no stage 'zreo'", "'zero'"),
    (["tasks.total.path=x"], "the recipe has no task 'total'", "'totals'"),
    (["stages.zero.mix.3.share=1"], "stages.zero.mix is a list", "0..0"),
    (["stages.zreo=null"], "removes what is not there", "'zero'"),
    (["stages.zero"], "not of the form key.path=value", "'stages.zero'"),
    (["stages..zero=1"], "not of the form key.path=value", "'stages..zero=1'"),
    (["seed=[1"], "malformed YAML value", "'seed=[1'"),
    (["seed=x", "model=3", "qqq=1"], "(and 2 more)", "must be"),
]


@pytest.mark.parametrize(("overrides", "says", "also"), WRONG, ids=lambda v: v[0] if isinstance(v, list) else None)
def test_a_wrong_override_is_one_sentence_that_names_it(recipe_file, overrides, says, also):
    recipe_file.write_text("seed: 0\n" + RECIPE)
    with pytest.raises(UserError) as error:
        load(recipe_file, *overrides)
    text = str(error.value)
    assert says in text and also in text and "\n" not in text
    assert any(override in text for override in overrides)


FILES = [
    ("stages: [\n", ":2: malformed YAML"),
    ("name: a\nname: b\n", ":2: malformed YAML: the key 'name' is given twice"),
    ("- 1\n", "a recipe is a mapping"),
    ("", "a recipe is a mapping"),
    ("name: a\nstages: {}\n", "the recipe needs the key 'tasks'"),
    (RECIPE.replace("    task: totals\n", ""), "stages.base needs the key 'task'"),
    (RECIPE.replace("    from: base", "    form: base"), "unknown key 'form' in stages.zero (did you mean 'from'?)"),
    (RECIPE.replace("    kind: pretrain\n", ""), "stages.base needs the key 'kind'"),
]


@pytest.mark.parametrize(("text", "says"), FILES)
def test_a_wrong_file_is_one_sentence_with_its_path(recipe_file, text, says):
    recipe_file.write_text(text)
    with pytest.raises(UserError) as error:
        load(recipe_file)
    assert says in str(error.value) and str(recipe_file) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_recipe_lists_the_presets(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'tinny' \(did you mean 'tiny'\?\); presets are .*gsm8k.*tiny"):
        load_recipe("tinny")
    with pytest.raises(UserError, match=r"no recipe file .*gone\.yaml"):
        load_recipe(str(tmp_path / "gone.yaml"))


def test_numbers_without_a_point_and_dates_are_read_as_meant(recipe_file):
    recipe_file.write_text(RECIPE.replace("kl_coef: 0.0", "kl_coef: 1e-3") + "description: 2024-01-01\n")
    recipe = load(recipe_file)
    assert recipe.stages["zero"].objective.kl_coef == 1e-3
    assert recipe.description == "2024-01-01"
