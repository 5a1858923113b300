"""Keys are in the environment alone: no file of a run holds one, nothing that is printed does, and no recipe may."""

import pytest
from micro_run import run_micro_stages
from test_judge import Endpoint
from test_resume import STAGES

from r1fast.config import UserError, load_recipe
from r1fast.metrics import read_events
from r1fast.report import write_report
from r1fast.rewards import judge
from r1fast.train import main

KEY = "sk-proj-Zx81QpVeryWellKept00421"


@pytest.mark.parametrize("recipe_key", ["OPENAI_API_KEY", "JUDGE_KEY_2"])
def test_a_whole_run_holds_no_key(micro, tmp_path, monkeypatch, capfd, recipe_key):
    """The endpoint says the key back, in an answer, and in the errors of most requests; hub tokens are there too."""
    asked = []

    def say(prompt):
        asked.append(prompt)
        return f"Verdict: {len(asked) % 9 + 1}" if len(asked) % 3 else (500, f"bad key {KEY}".encode())

    for name in (recipe_key, "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setattr(judge, "WAIT", 0.0)
    endpoint = Endpoint(say)
    stage = {**STAGES["grpo"], "steps": 2, "dynamic_sampling": False, "evaluate_every": 0}
    stage["mix"] = [{"task": "totals", "rewards": {"accuracy": 1.0, "judge": 0.5}}]
    asks = {"url": endpoint.url, "model": "m", "key": recipe_key, "tries": 1}
    asks["cache"] = str(tmp_path / "run" / "judge.sqlite")
    settings = {"rewards": {"judge": asks, "max_failures": 1.0, "workers": 1}, "profile": True}
    (tmp_path / "run").mkdir()
    run_micro_stages(tmp_path / "run", micro, {"stage": stage}, settings)
    write_report(tmp_path / "run")
    assert asked and all(headers["Authorization"] == f"Bearer {KEY}" for headers in endpoint.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "judge.sqlite"} <= names
    steps = [row for row in read_events(tmp_path / "run") if row["event"] == "step"]
    assert all(row["errors"] and row["failures"] for row in steps)  # what failed is told, without it
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"rewards.judge.key={KEY}", "environment variable"),
        ("rewards.judge.key=0123456789abcdef0123456789abcdef", "environment variable"),
        ("rewards.judge.key=AKIA7Q2Z8X1C4V6B9N3M5", "environment variable"),
        (f"rewards.judge.url=https://me:{KEY}@host/v1", "without user, password or query"),
        (f"rewards.judge.url=https://host/v1?api-key={KEY}", "without user, password or query"),
        (f"rewards.judge.api_key={KEY}", "unknown key 'api_key'"),
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_said_again(tmp_path, capfd, override, words):
    base = ["rewards.judge={url: 'http://127.0.0.1:1/v1', model: m}", override]
    with pytest.raises(UserError, match=words) as refused:
        load_recipe("tiny", base)
    secret = override.partition("=")[2]
    assert secret not in str(refused.value) and KEY not in str(refused.value)
    assert main(["tiny", *base, "--out", str(tmp_path / "run")]) == 2
    assert KEY not in "".join(capfd.readouterr()) and not (tmp_path / "run").exists()
    judge_block = f"rewards: {{judge: {{url: 'http://h/v1', model: m, key: {KEY}}}}}"
    (tmp_path / "mine.yaml").write_text(f"name: x\ntasks: {{}}\nstages: {{}}\n{judge_block}\n")
    with pytest.raises(UserError) as refused:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert KEY not in str(refused.value)
