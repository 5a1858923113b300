"""The command `python -m r1fast.evaluate`: its numbers, its file, and what it says to bad input."""

import json

import pytest
from micro_run import run_micro_stages

from r1fast.evaluate import find_task, kind_of_rows, main
from r1fast.metrics import read_events
from r1fast.rollout.sampler import Sampler


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GSM8K = {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (GSM8K, "gsm8k"),
        ({"problem": "What is 2 + 2?", "answer": "4", "solution": "..."}, "math"),
        ({"question": "What is 2 + 2?", "answer": "4"}, "jsonl"),
        ({"question": "What is 2 + 2?", "answer": 4}, "jsonl"),
    ],
)
def test_the_kind_of_a_file_is_read_from_its_first_row(tmp_path, row, kind):
    assert kind_of_rows(rows_file(tmp_path / "rows.jsonl", [row])) == kind


def test_every_row_of_a_named_file_is_a_problem(tmp_path):
    rows = [{**GSM8K, "question": f"What is {i} + 2?"} for i in range(40)]
    task = find_task(str(rows_file(tmp_path / "rows.jsonl", rows)), None)
    problems = task.problems("test", None, 0)
    assert len(problems) == 40 and len({p.id for p in problems}) == 40
    assert len(task.problems("test", 7, 0)) == 7


def test_the_numbers_are_those_of_the_completions_it_writes(micro, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    model = str(micro / "stages" / "cold_start" / "checkpoint")
    command = [model, "--task", "totals", "--limit", "24", "--samples", "4", "--max-tokens", "40", "--out", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == found["problems"] == 24
    correct = [value for row in found["rows"] for value in row["correct"]]
    assert len(correct) == 96 and found["pass@1"] == pytest.approx(sum(correct) / 96)
    for row in found["rows"]:
        assert len(row["completions"]) == 4
        for text, right in zip(row["completions"], row["correct"], strict=True):
            assert not right or row["answer"] in text.split()
    shown = capsys.readouterr().out
    assert f"{found['pass@1']:.3f}" in shown and "cons@4" in shown


def test_an_interrupted_command_goes_on_with_the_same_numbers(micro, tmp_path, capsys, monkeypatch):
    model = str(micro / "stages" / "cold_start" / "checkpoint")
    command = [model, "--task", "totals", "--limit", "24", "--samples", "4", "--max-tokens", "40", "--out"]
    assert main([*command, str(tmp_path / "whole.json")]) == 0
    out, stream, drawn = tmp_path / "parts.json", Sampler.stream, []

    def stopping(self, prompts, params, **more):
        for found in stream(self, prompts, params, **more):
            if len(drawn) == 10:
                raise KeyboardInterrupt
            drawn.append(found[1].prompt.id)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "stream", stopping)
        assert main([*command, str(out)]) == 130
    assert f"goes on from {out}.partial" in capsys.readouterr().err and not out.exists()
    assert main([*command[:-2], "41", "--out", str(out)]) == 2
    assert "another sampling" in capsys.readouterr().err
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "stream", lambda self, prompts, p: asked.extend(prompts) or stream(self, prompts, p))
        assert main([*command, str(out)]) == 0
    assert len(asked) == 14 and not {p.id for p in asked} & set(drawn)
    whole, parts = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "parts.json"))
    assert {**whole, "seconds": 0} == {**parts, "seconds": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "whole.json"]


def test_an_interrupted_stage_of_a_recipe_goes_on_with_the_same_numbers(micro, tmp_path, monkeypatch):
    """The kind `evaluate`, and the evaluation behind another stage; each is stopped in the middle of its samples."""
    stages = {
        "exam": {"kind": "evaluate"},
        "sft": {"kind": "sft", "data": [{"task": "totals", "limit": 64}], "batch_examples": 16, "epochs": 1},
    }
    whole = run_micro_stages(tmp_path / "whole", micro, stages)
    stream, drawn, told = Sampler.stream, [], []

    def stopping(self, prompts, params, **more):
        for found in stream(self, prompts, params, **more):
            if len(told) < 2 and len(drawn) % 50 == 20:
                told.append(len(drawn))
                drawn.append(None)
                raise KeyboardInterrupt
            drawn.append(found[1].prompt.id)
            yield found

    monkeypatch.setattr(Sampler, "stream", stopping)
    for attempt in range(3):
        if attempt < 2:
            with pytest.raises(KeyboardInterrupt):
                run_micro_stages(tmp_path / "parts", micro, stages, resume=attempt > 0)
        else:
            parts = run_micro_stages(tmp_path / "parts", micro, stages, resume=True)
    per_stage = 4 * 32  # the protocol's own samples, at temperature 1, greedy, and of general prompts
    assert len([one for one in drawn if one]) == 2 * per_stage and len(told) == 2
    for left, right in zip(whole["stages"], parts["stages"], strict=True):
        assert {**left["evaluation"], "seconds": 0} == {**right["evaluation"], "seconds": 0}
    lines = [[r for r in read_events(tmp_path / n) if r["event"] == "evaluation"] for n in ("whole", "parts")]
    assert len(lines[0]) == len(lines[1]) == 2


def test_a_missing_checkpoint_is_told_before_the_data_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("r1fast.evaluate.find_task", lambda *_: pytest.fail("the data set was loaded"))
    assert main([str(tmp_path / "gone"), "--task", "aime24"]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "totols"], "totols"),
        (["--task", "missing.jsonl"], "no such file"),
        (["--task", "chat.jsonl"], "not a JSON object"),
        (["--task", "general"], "no right answers"),
        (["--task", "bytes.jsonl"], "not a JSON object"),
        (["--task", "list.jsonl"], "not list"),
        (["--task", "totals", "--samples", "0"], "--samples"),
        (["--task", "totals", "--max-tokens", "0"], "--max-tokens"),
        (["--task", "totals", "--temperature", "-1"], "--temperature is -1.0"),
        (["--task", "totals", "--temperature", "nan"], "--temperature is nan"),
        (["--task", "totals", "--top-p", "3"], "--top-p is 3.0"),
        (["--task", "totals", "--out", "gone/numbers.json"], "--out gone/numbers.json"),
        (["--task", "totals", "--sampels", "2"], "--sampels"),
        ([], "--task"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(micro, tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "chat.jsonl").write_text("hello\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    monkeypatch.chdir(tmp_path)
    assert main([str(micro / "stages" / "base" / "checkpoint"), *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--task", "totals"]) == 2
    assert "nowhere" in capsys.readouterr().err
