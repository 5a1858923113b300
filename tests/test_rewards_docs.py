"""docs/rewards.md: every reward has its line, its recipe is one, and its example works."""

import re
from pathlib import Path

import yaml

from r1fast import plugins, rewards
from r1fast.config import load_recipe
from r1fast.schema import GRPOStage, JudgeConfig, RewardsConfig

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_every_reward_has_its_line():
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    own = {name for name in rewards.names() if type(rewards.get(name)).__module__.startswith("r1fast.rewards.")}
    assert named == own | {"preference", "safety"}


def test_the_recipe_lines_are_a_recipe():
    first, judge = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    stage = GRPOStage.model_validate(first["stages"]["rl"])
    assert stage.safety_model == "careful" and RewardsConfig.model_validate(first["rewards"]) == RewardsConfig()
    assert JudgeConfig.model_validate(judge["rewards"]["judge"]).budget == 10_000
    assert load_recipe("tiny", ["plugins=[my_reward.py]"]).plugins == ["my_reward.py"]


def test_the_example_works(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "my_reward.py"
    path.write_text(example)
    plugins.load([str(path)])
    short = rewards.get("short")
    assert short.attempt("<think> " + "word " * 50 + "</think> ten", None).value == 1.0
    assert short.attempt("word " * 50, None).value == 0.0
