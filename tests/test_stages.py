"""Stages in the settings that the small whole run does not use: dynamic sampling, reference refresh, overlong shaping,
a KL term, GSPO, pointwise reward models, evaluation as a stage, rows from a file."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from micro_run import run_micro_stages

from r1fast.config import UserError
from r1fast.metrics import read_events
from r1fast.stages.drawing import Draws, shares
from r1fast.stages.pretrain import batches_of
from r1fast.stages.reject import keep, why_dropped
from r1fast.types import Prompt, Rollout, RolloutGroup

RL = {
    "kind": "grpo",
    "steps": 4,
    "prompts_per_step": 8,
    "group_size": 4,
    "mix": [{"task": "totals", "rewards": {"accuracy": 1.0, "format": 0.2}}],
    "sampling": {"max_tokens": 40},
    "evaluate": False,
    "optimizer": {"learning_rate": 6e-4},
}


def steps_of(out, stage):
    return [e for e in read_events(out) if e["event"] == "step" and e["stage"] == stage]


@pytest.mark.parametrize(
    ("active", "step", "expected"),
    [((1.0, 3.0), 0, [8, 0]), ((1.0, 3.0), 5, [2, 6]), ((2.0, 1.0), 5, [5, 3])],
)
def test_shares_add_up_and_follow_the_entries_that_are_active(active, step, expected):
    first = (0, 5)
    sources = [
        SimpleNamespace(entry=SimpleNamespace(share=s), first_step=f) for s, f in zip(active, first, strict=True)
    ]
    assert shares(sources, step, 8) == expected


def group(rewards):
    prompt = Prompt("p", (1,), "p", "1", "totals")
    return RolloutGroup(prompt, [Rollout([5], [-0.1], "stop", reward=r) for r in rewards], 0)


def drawn_from(batches, rounds=3, want=2):
    """Draws.draw over scripted rounds; the learner must be given what is drawn."""
    draws, added = Draws.__new__(Draws), {}
    draws.stage = SimpleNamespace(prompts_per_step=want, dynamic_sampling=True, dynamic_rounds=rounds)
    script, asked = iter(batches), []

    def sample(step, count, drawn, learning):
        asked.append((count, drawn.rounds))
        return next(script)

    draws._round = sample
    drawn = draws.draw(0, SimpleNamespace(add=added.__setitem__))
    assert added == dict(enumerate(drawn.groups))
    return drawn, asked


def test_dynamic_sampling_replaces_groups_without_variance():
    dead, live, other = group([1.0, 1.0]), group([0.0, 1.0]), group([1.0, 0.0])
    drawn, asked = drawn_from([[dead, live], [other]])
    assert drawn.groups == [live, other] and drawn.sampled == [dead, live, other]
    assert asked == [(2, 0), (1, 1)]  # only what is missing is drawn again


def test_dynamic_sampling_gives_up_and_fills_the_step_with_what_it_has():
    dead = group([1.0, 1.0])
    drawn, asked = drawn_from([[dead, dead]] * 3)
    assert len(asked) == 3 and drawn.groups == [dead, dead]


def test_rl_with_a_reference_that_is_refreshed(micro, tmp_path):
    stage = {**RL, "objective": {"kl_coef": 0.1, "kl_kind": "k3"}, "reference_refresh": 2, "mini_batches": 2}
    run_micro_stages(tmp_path / "run", micro, {"kl": stage})
    kl = [step["kl"] for step in steps_of(tmp_path / "run", "kl")]
    # Two optimizer steps over each set of rollouts: the second mini-batch has moved, the first has moved only when the
    # reference is older than the policy. After step 2 the reference is the policy again, so KL falls.
    assert all(k > 0 for k in kl) and kl[2] < kl[1]


def test_dynamic_sampling_overlong_shaping_and_gspo_run_and_report(micro, tmp_path):
    objective = {"importance": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence"}
    stage = {**RL, "dynamic_sampling": True, "overlong": {"window": 34}, "objective": objective, "mini_batches": 2}
    run_micro_stages(tmp_path / "run", micro, {"gspo": stage})
    for step in steps_of(tmp_path / "run", "gspo"):
        assert step["groups_sampled"] >= 8 and step["sampling_rounds"] >= 1
        assert -1.0 <= step["rewards"]["overlong"] < 0.0


def test_recomputed_old_logprobs_with_truncated_importance_sampling(micro, tmp_path):
    stage = {**RL, "old_logprobs": "recompute", "objective": {"truncated_is": 2.0, "aggregate": "constant"}}
    run_micro_stages(tmp_path / "run", micro, {"tis": stage})
    for step in steps_of(tmp_path / "run", "tis"):
        assert step["old_logprobs"] == "learner" and step["logprob_difference_max"] < 1e-4


def test_a_pointwise_reward_model_that_reads_whole_responses(micro, tmp_path):
    stage = {"kind": "reward_model", "task": "chat", "objective": "pointwise", "scores": "response", "pairs": 256}
    stage |= {"batch_pairs": 32, "epochs": 3, "optimizer": {"learning_rate": 2e-3}}
    mix = [{"task": "chat", "rewards": {"safety": 1.0, "repetition": 0.1}}]
    rl = {**RL, "steps": 2, "mix": mix, "safety_model": "safety"}
    run_micro_stages(tmp_path / "run", micro, {"safety": stage, "careful": rl})
    for step in steps_of(tmp_path / "run", "careful"):
        asked = step["rewards"]
        assert 0.0 < asked["safety"] < 1.0 and -1.0 < asked["repetition"] <= 0.0
        assert step["failures"] == {}
        assert step["reward"] == pytest.approx(asked["safety"] + 0.1 * asked["repetition"])
    stats = json.loads((tmp_path / "run/stages/safety/stage.json").read_text())["stats"]
    assert stats["held_out_accuracy"] > 0.6 and stats["held_out_pairs"] == 200


def test_evaluation_as_a_stage_with_its_own_protocol(micro, tmp_path):
    protocol = {"task": "totals", "limit": 48, "samples": 2, "greedy": False, "sampling": {"max_tokens": 40}}
    start = str(micro / "stages" / "cold_start" / "checkpoint")
    run_micro_stages(tmp_path / "run", micro, {"exam": {"kind": "evaluate", "from": start, "protocol": protocol}})
    found = json.loads((tmp_path / "run/stages/exam/stage.json").read_text())["evaluation"]
    assert found["problems"] == 48 and found["k"] == 2 and found["greedy"] is None
    assert 0.0 < found["pass@1"] < 1.0 and found["pass@1_low"] <= found["pass@1"] <= found["pass@1_high"]


def test_sft_on_a_file_of_rows_leaves_out_what_is_too_long(micro, tmp_path):
    rows = [{"prompt": "compute 3 mon + 4 ?", "completion": "<think> 3 mon + 4 = 7 </think> <answer> 7 </answer>"}] * 8
    rows.append({"prompt": "compute 3 mon + 4 ?", "completion": "7 " * 200})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"kind": "sft", "data": [{"path": str(path)}], "evaluate": False, "epochs": 1, "batch_examples": 4}
    run_micro_stages(tmp_path / "run", micro, {"tune": stage})
    stats = json.loads((tmp_path / "run/stages/tune/stage.json").read_text())["stats"]
    assert (stats["rows"], stats["left_out"], stats["steps"]) == (8, 1, 2)


def test_a_checkpoint_that_solves_nothing_stops_rejection_with_the_reasons(micro, tmp_path):
    stage = {"kind": "reject", "task": "totals", "prompts": 4, "samples": 2, "sampling": {"max_tokens": 2}}
    with pytest.raises(UserError, match=r"kept 0 of 8 samples.*unfinished"):
        run_micro_stages(tmp_path / "run", micro, {"keep": stage})


@pytest.mark.parametrize(
    ("text", "rewards", "finish", "reason"),
    [
        ("<think> 3 </think> <answer> 3 </answer>", {}, "stop", None),
        ("<think> 3 </think> <answer> 3 </answer>", {}, "length", "unfinished"),
        ("<think> 3 </think> <answer> 3 </answer>", {"accuracy": 0.0}, "stop", "accuracy below 1"),
        ("<think> 3 </think> <answer> 3 </answer>", {"language": 0.5}, "stop", "language below 0.9"),
    ],
)
def test_the_first_broken_rule_is_named(text, rewards, finish, reason):
    stage = SimpleNamespace(require=["accuracy", "format", "language"], readable=0.9, max_paragraph=2000)
    rollout = Rollout([5], [-0.1], finish, text, {"accuracy": 1.0, "format": 1.0, "language": 1.0, **rewards})
    assert why_dropped(rollout, group([0.0]), stage) == reason


def test_each_prompt_keeps_so_many_different_samples():
    texts = [f"<think> {i} </think> <answer> 3 </answer>" for i in (1, 1, 2, 3, 4)]
    right = {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    rollouts = [Rollout([5], [-0.1], "stop", text, right) for text in texts]
    stage = SimpleNamespace(
        require=["accuracy", "format", "language"], readable=1.0, max_paragraph=2000, keep_per_prompt=2
    )
    dropped = Counter()
    kept = keep(RolloutGroup(Prompt("p", (1,), "p", "3", "totals"), rollouts, 0), stage, dropped)
    assert [row.completion for row in kept] == [texts[0], texts[2]]
    assert dropped == {"duplicate": 1, "more than keep_per_prompt": 2}


def test_the_curriculum_is_the_easy_share_of_the_steps(micro, tmp_path, monkeypatch):
    begun, taken = [], []

    def told(rows, budget):
        """batches_of, which notes for every batch the how-manieth corpus it is of; one begins when first asked."""
        begun.append(rows)
        corpus = len(begun)
        for batch in batches_of(rows, budget):
            taken.append(corpus)
            yield batch

    monkeypatch.setattr("r1fast.stages.pretrain.batches_of", told)
    stage = {"kind": "pretrain", "task": "totals", "steps": 8, "curriculum": 0.25, "evaluate": False}
    run_micro_stages(tmp_path / "run", micro, {"base": stage})
    assert taken == [1] * 2 + [2] * 6


def test_verifiers_that_fail_stop_the_run_with_their_words(micro, tmp_path):
    stage = {**RL, "mix": [{"task": "totals", "rewards": {"accuracy": 1.0, "overlong": 1.0, "length": 0.0}}]}
    settings = {"max_failures": 0.2, "overlong": {"max_tokens": 40, "window": 20}}
    run_micro_stages(tmp_path / "run", micro, {"short": {**stage, "steps": 1}}, {"rewards": settings})
    (step,) = steps_of(tmp_path / "run", "short")
    assert -1.0 <= step["rewards"]["overlong"] <= 0.0 and step["failures"] == {}
    assert -0.5 <= step["rewards"]["length"] <= 0.5
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    stage["mix"][0]["rewards"] = {"accuracy": 1.0, "broken": 0.5}
    with pytest.raises(UserError, match=r"32 of 64 scores of a step failed.*broken: RuntimeError: out of paper"):
        run_micro_stages(tmp_path / "two", micro, {"stopped": stage}, {"plugins": [str(plugin)]})


BROKEN = """
from r1fast.rewards import Reward, register

@register("broken")
class Broken(Reward):
    def judge(self, completion, reference):
        raise RuntimeError("out of paper")
"""
