"""The whole recipe, small: every stage for real, what it leaves behind, what a resumed run reuses, what is equal."""

import json
import shutil

import pytest
import torch
from micro_run import run_micro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import r1fast
from r1fast.metrics import read_events
from r1fast.stages.inputs import read_rows


@pytest.fixture(scope="module")
def done(micro):
    return micro, json.loads((micro / "summary.json").read_text())


def events(out, kind, stage=None):
    return [e for e in read_events(out) if e["event"] == kind and stage in (None, e["stage"])]


def test_every_stage_finished_in_an_order_that_has_its_inputs_first(done):
    out, summary = done
    finished = [e["stage"] for e in events(out, "stage") if e["status"] == "finished"]
    assert finished == [s["name"] for s in summary["stages"]]
    assert set(finished) == {
        *("base", "zero", "cold_data", "cold_start", "reasoning_rl", "rejection", "sft", "preference"),
        *("all_rl", "distill_data", "student_base", "distill", "student_rl"),
    }
    for before, after in (("zero", "cold_data"), ("cold_data", "cold_start"), ("all_rl", "distill_data")):
        assert finished.index(before) < finished.index(after)


def test_pretraining_learned(done):
    out, _ = done
    losses = [e["loss"] for e in events(out, "step", "base")]
    assert losses[-1] < 0.5 * losses[0]


def test_rl_raises_its_own_reward(done):
    out, _ = done
    rewards = [e["reward"] for e in events(out, "step", "zero")]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    for event in events(out, "step", "zero"):
        assert event["logprob_difference_max"] < 1e-4  # sampler and learner share the weights: fp32 rounding is all
        assert event["phase_seconds"].keys() >= {"sample", "score", "learn"}


def test_the_curve_has_a_point_before_rl_and_at_each_interval(done):
    out, _ = done
    assert [e["step"] for e in events(out, "curve", "zero")] == [0, 4, 8]


def test_general_prompts_join_late_in_the_last_rl(done):
    out, _ = done
    asked = ["preference" in e["rewards"] for e in events(out, "step", "all_rl")]
    assert asked == [False] * 5 + [True] * 3  # after 60% of the eight steps


def test_checkpoints_load_in_transformers_with_equal_logits(done):
    out, _ = done
    for stage in ("base", "all_rl", "distill"):
        folder = out / "stages" / stage / "checkpoint"
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ours, tokenizer = r1fast.load(folder)
        text = [{"role": "user", "content": "compute 3 mon + 4 ?"}]
        tokens = AutoTokenizer.from_pretrained(folder).apply_chat_template(text, add_generation_prompt=True)[
            "input_ids"
        ]
        assert tokens == tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"]
        tokens = torch.tensor(tokens)
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
            got = ours.logits(ours.forward_packed(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)))
        assert expected.abs().max() > 1.0
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    AutoModelForSequenceClassification.from_pretrained(out / "stages" / "preference" / "checkpoint")


def test_kept_samples_are_right_and_readable(done):
    out, _ = done
    rows = read_rows(out / "stages" / "rejection" / "rows.jsonl")
    stats = json.loads((out / "stages" / "rejection" / "stage.json").read_text())["stats"]
    totals = [row for row in rows if row.task == "totals"]
    assert len(totals) == stats["kept"] > 0
    assert len({(row.prompt, row.completion) for row in totals}) == len(totals)
    assert stats["general"] == len(rows) - len(totals) > 0
    assert stats["kept"] + sum(stats["dropped"].values()) == stats["sampled"]
    for row in totals:
        assert row.completion.count("<think>") == row.completion.count("</answer>") == 1
        chinese = any("\u4e00" <= c <= "\u9fff" for c in row.completion)
        assert chinese == (row.meta["language"] == "zh")


def test_the_second_sft_starts_from_the_base(done):
    _, summary = done
    origin = {s["name"]: s["from"] for s in summary["stages"]}
    assert origin["sft"] == "base" and origin["cold_start"] == "base" and origin["distill"] == "student_base"


def test_a_resumed_run_reuses_what_is_whole_and_ends_with_the_same_bits(done, tmp_path):
    """Everything from `sft` on is removed as after a crash: what is done again must be equal bit by bit."""
    out, _ = done
    again = tmp_path / "tiny"
    shutil.copytree(out, again)
    for stage in ("all_rl", "distill_data", "distill"):
        shutil.rmtree(again / "stages" / stage)
    run_micro(again, resume=True)
    status = {e["stage"]: e["status"] for e in events(again, "stage")}
    assert status["sft"] == status["student_rl"] == "reused"
    assert status["all_rl"] == status["distill"] == "finished"
    for stage in ("all_rl", "distill"):
        tensors = "stages", stage, "checkpoint", "model.safetensors"
        assert out.joinpath(*tensors).read_bytes() == again.joinpath(*tensors).read_bytes()


def test_a_changed_setting_redoes_its_stage_and_what_depends_on_it(done, tmp_path):
    out, _ = done
    again = tmp_path / "tiny"
    shutil.copytree(out, again)
    run_micro(again, "stages.preference.pairs=64", resume=True)
    status = {e["stage"]: e["status"] for e in events(again, "stage")}
    assert [s for s, how in status.items() if how == "finished"] == ["preference", "all_rl", "distill_data", "distill"]
