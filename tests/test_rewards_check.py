"""`python -m r1fast.rewards --check`, and rewards and tasks of one's own from a file."""

import json
import sys

import pytest

from r1fast import plugins, rewards
from r1fast.config import UserError, load_recipe
from r1fast.rewards import base, pool
from r1fast.rewards.__main__ import main
from r1fast.rewards.pool import RewardPool

OWN = """
import os, time
from r1fast.rewards import Reward, register
from r1fast.tasks import Task
from r1fast.tasks import register as register_task
from r1fast.types import Problem

@register("own_{name}")
class Own(Reward):
    cheap = False

    def judge(self, completion, reference):
        if completion == "die":
            os._exit(1)
        if completion == "hang":
            time.sleep(100)
        return len(completion) / 10

@register_task("own_{name}")
class OwnTask(Task):
    verifier = "own_{name}"

    def problems(self, split, count=None, seed=0):
        return [Problem(str(i), f"say {{i}}", str(i), self.name, {{"language": "en"}}) for i in range(count or 8)]
"""


@pytest.fixture(autouse=True)
def as_before():
    """Settings, plugins and pools of a test end with it."""
    settings, loaded = base._settings, dict(plugins._loaded)
    yield
    pool.close_shared()
    base._settings = settings
    for path in set(plugins._loaded) - set(loaded):
        sys.modules.pop(plugins._loaded.pop(path), None)


def own(folder, name):
    path = folder / f"{name}.py"
    path.write_text(OWN.format(name=name))
    return str(path)


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_table_tells_values_failures_and_disagreement(tmp_path, capsys):
    rows = [
        {"completion": "\\boxed{2}", "answer": "2", "label": 1},
        {"completion": "\\boxed{3}", "answer": "2", "label": True},
        {"completion": "\\boxed{4}", "answer": "2", "label": 0},
        {"completion": "\\boxed{4}", "answer": "", "label": 0},
        {"completion": "\x00\ud800", "reference": "2"},
    ]
    assert main(["--check", written(tmp_path, *rows), "--rewards", "math,format"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "math" in line and "│" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:10] == ["math", "5", "0.250", "75.0%", "0.0%", "25.0%", "0", "1", "1", "1 of 3"]
    assert "math failed 1x: ValueError: the reference is empty" in out
    assert "math disagrees on line 2: 0, the label is 1" in out
    assert "format disagrees on line 1" in out


def test_a_reward_that_mostly_fails_is_told_by_the_exit_code(tmp_path, capsys):
    path = written(
        tmp_path, {"completion": "1", "answer": "none", "reward": "gsm8k"}, {"completion": "2", "reward": "format"}
    )
    assert main(["--check", path]) == 1
    assert "gsm8k failed on more than 20%" in capsys.readouterr().err
    assert main(["--check", path, "max_failures=1"]) == 0


def test_the_rewards_of_a_recipe(tmp_path, capsys):
    row = {"completion": "<think> 3 + 4 </think> <answer> 7 </answer>", "answer": "7", "language": "en", "label": 1}
    path = written(tmp_path, row)
    assert main(["--check", path, "--recipe", "gsm8k"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("gsm8k", "format"))
    assert main(["--check", path, "--recipe", "tiny", "--accuracy", "exact"]) in (0, 1)
    assert "exact" in capsys.readouterr().out
    assert main(["--check", path, "--recipe", "tiny"]) == 2
    assert "--accuracy NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", ["--rewards", "math"], "holds no rows"),
        ("{", ["--rewards", "math"], "rows.jsonl:1: not JSON"),
        ("[]", ["--rewards", "math"], "rows.jsonl:1: a row is a JSON object"),
        ('{"completion": 1}', ["--rewards", "math"], "text `completion`"),
        ('{"completion": "x", "label": "good"}', ["--rewards", "math"], "`label` must be a number"),
        ('{"completion": "x"}', [], "no reward to try"),
        ('{"completion": "x"}', ["--rewards", "maths"], "did you mean 'math'?"),
        ('{"completion": "x"}', ["--rewards", "math", "sandbx=rlimits"], "did you mean 'sandbox'?"),
        ('{"completion": "x"}', ["--rewards", "overlong"], "rewards.overlong.max_tokens"),
        ('{"completion": "x"}', ["--rewards", "judge"], "rewards.judge"),
        ('{"completion": "x"}', ["--plugin", "nowhere.py"], "nowhere.py is no Python file"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, content, arguments, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert main(["--check", str(path), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_missing_file(tmp_path, capsys):
    assert main(["--check", str(tmp_path / "none.jsonl"), "--rewards", "math"]) == 2
    assert "cannot be read" in capsys.readouterr().err


# -- a file of one's own ----------------------------------------------------------------------------------------------


def test_a_reward_from_a_file_runs_in_the_workers_like_any_other(tmp_path):
    plugins.load([own(tmp_path, "first")])
    with RewardPool(workers=1, deadline=1.0) as workers:
        scores = workers.run([("own_first", text, None) for text in ("abc", "die", "hang", "abcde")])
    assert [score.value for score in scores] == [0.3, 0.0, 0.0, 0.5]
    assert "died" in scores[1].error and "no verdict" in scores[2].error and scores[3].error is None
    plugins.load([str(tmp_path / "first.py")])  # again is once
    assert rewards.get("own_first")("ab").value == 0.2


def test_a_file_that_is_loaded_late_is_known_to_the_workers_too(tmp_path):
    plugins.load([own(tmp_path, "early")])
    assert rewards.get("own_early")("abc").value == 0.3  # the process's own pool is at work
    plugins.load([own(tmp_path, "late")])
    scores = pool.shared().run([("own_late", "ab", None), ("own_early", "abcd", None)])
    assert [(score.value, score.error) for score in scores] == [(0.2, None), (0.4, None)]


def test_a_recipe_names_the_file_and_may_use_what_it_registers(tmp_path):
    from r1fast.check import check

    path = own(tmp_path, "second")
    overrides = [
        f"plugins=[{path}]",
        "tasks.math={kind: own_second}",
        "stages.zero.mix=[{task: math, rewards: {accuracy: 1.0, own_second: 0.5}}]",
    ]
    assert check(load_recipe("r1-zero", overrides), need_inputs=False)["math"].verifier == "own_second"


def test_a_file_that_fails_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(UserError, match=r"plugins: .*broken.py fails as it is loaded: ZeroDivisionError"):
        plugins.load([str(path)])
    assert str(path) not in plugins.loaded()
