"""The whole-step benchmark: what its parts compute, and that our side of it runs the stage it says it runs."""

import json

import pytest
import torch

from benchmarks import step_profile, vs_trl
from benchmarks.whole_step import Shape, make_checkpoint, r1fast_steps, texts
from r1fast.model.weights import load
from r1fast_kernels import use_backend

SMALL = Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, inner=48, vocabulary=64, prompts=2, group=4)
SMALL = vs_trl.replace(SMALL, prompt=(3, 6), completion=9)


def test_useful_operations_are_those_that_torch_counts(tmp_path):
    """The products of a forward pass over one prompt and its completion, and of a backward one."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = vs_trl.replace(SMALL, prompts=1, group=1, prompt=(5, 5))
    make_checkpoint(shape, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    tokens, ends = torch.arange(3, 17), torch.tensor([0, 14], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter, use_backend("reference"):  # torch's products: it counts no others
        hidden = model.forward_packed(tokens, ends)
        model.logits(hidden[-shape.completion :])
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    pairs = shape.mean_prompt**2 / 2 + shape.completion * (shape.mean_prompt + shape.completion / 2)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert shape.flops(True)["logprob"] == pytest.approx(counted + attention * pairs)
    assert shape.flops(True)["learn"] == 3 * shape.flops(True)["logprob"]
    unshared = vs_trl.replace(shape, group=8).flops(False)["logprob"]
    assert unshared == pytest.approx(8 * shape.flops(True)["logprob"])


def test_the_stage_takes_steps_of_full_length_by_phase(tmp_path):
    make_checkpoint(SMALL, tmp_path / "model")
    told, left = [], iter([True, True, False])

    def say(seconds, phases, tokens):
        told.append((seconds, phases, tokens))

    r1fast_steps(SMALL, tmp_path / "model", {}, lambda: next(left), say)
    for seconds, phases, tokens in told:
        assert tokens == 2 * 4 * 9
        assert set(phases) <= set(vs_trl.PHASES) and {"sample", "logprob", "learn"} <= set(phases)
        assert 0.9 * seconds < sum(phases.values()) <= seconds
    assert len(told) == 2


def test_prompts_have_the_lengths_that_were_asked_for():
    lengths = [len(text.split()) for text in texts(Shape(), 200)]
    assert (min(lengths), max(lengths)) == (24, 42) and sum(lengths) / 200 == pytest.approx(Shape().mean_prompt, abs=1)


def pair(ours: float, theirs: float) -> dict:
    def step(seconds: float, imports: float) -> dict:
        phases = {"sample": 0.5 * seconds, "learn": 0.5 * seconds}
        return {"seconds": seconds, "phases": phases, "tokens": 100, "peak": 2e8, "imports": imports}

    return {"r1fast": step(ours, 1.5e8), "TRL": step(theirs, 1e8)}


def test_the_table_shows_medians_and_the_spread_of_the_pairs_ratios():
    entry = {
        "commit": "abc",
        "trl": {"micro_batch": 8},
        "ours": {},
        "peak_flops": 1e11,
        "flops": {"shared": {"sample": 1e11}, "unshared": {}},
    }
    entry |= {"pairs": [pair(2.0, 8.0), pair(1.0, 6.0), pair(4.0, 20.0)]}
    machine = {"processor": "P", "threads": 2, "torch": "2", "trl": "1", "transformers": "5"}
    table = vs_trl.table({"machine": machine, "cases": {"3M, 8 x 8, KL on": entry, "not yet": {"pairs": []}}})
    ours, theirs = table.splitlines()[2:4]
    assert ours == "| 3M, 8 x 8, KL on | r1fast | 2.00 | 1.00 | 0.00 | 0.00 | 1.00 | 0.00 | 50 | 1 | 200 | 50 |"
    assert theirs.endswith("| TRL | 8.00 | 4.00 | 0.00 | 0.00 | 4.00 | 0.00 | 12 | 5.00 (4.00–6.00) | 200 | 100 |")
    assert "- 3M, 8 x 8, KL on, at abc, 3 pairs: 50% of 100 GFLOP/s; peak memory 1.00 of TRL's" in table
    assert "without the imports 0.50; TRL with {" in table and "not yet" not in table


def test_settings_that_were_tried_are_remembered_and_the_best_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(vs_trl, "RESULTS", tmp_path)
    results = vs_trl.Results()
    assert results.best("case") == vs_trl.TRIED[0]
    results.data["tried"]["case"] = [{"settings": {"a": 1}, "seconds": 2.0}, {"settings": {"a": 2}, "seconds": 1.0}]
    results.write()
    again = vs_trl.Results()
    assert again.best("case") == {"a": 2}
    monkeypatch.setattr(vs_trl, "peak_rate", lambda: 1.0)
    first = again.case("case", {"a": 2}, {})
    first["pairs"].append("measured")
    assert again.case("case", {"a": 2}, {}) is first
    assert again.case("case", {"a": 3}, {})["pairs"] == []  # other settings: measured anew
    assert json.loads(results.path.read_text())["machine"]["threads"] == torch.get_num_threads()


def test_the_time_that_it_will_take_is_said_from_what_was_measured_or_from_the_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(vs_trl, "RESULTS", tmp_path)
    monkeypatch.setattr(vs_trl, "peak_rate", lambda: 1e11)
    results, name = vs_trl.Results(), "3M, 8 x 8, KL on"
    shape = vs_trl.cases()[name]
    clock = vs_trl.Clock(results, 5, 60)
    assert clock.step(name, shape, "TRL") == pytest.approx(sum(shape.flops(False).values()) / 1e11 / 0.28)
    assert clock.search(name, shape) == pytest.approx(8 * (12 + 2 * clock.step(name, shape, "TRL")))
    results.case(name, results.best(name), {})["pairs"] += [pair(1.0, 5.0), pair(2.0, 6.0)]
    assert clock.measure(name, shape, {}) == pytest.approx(2 * 12 + (3 + 1) * (1.5 + 5.5))  # three are missing
    results.case(name, results.best(name), {})["pairs"] += [pair(1.0, 5.0)] * 3
    assert clock.measure(name, shape, {}) == 0
    assert clock.measure(name, shape, {"epochs": 2}) == pytest.approx(2 * 12 + 6 * (1.0 + 5.0))  # other settings: anew
    results.data["tried"][name] = [{"settings": vs_trl.TRIED[0], "seconds": 1.0}] * 7
    assert clock.search(name, shape) == pytest.approx(12 + 2 * 5.0)


def test_cases_are_named_as_they_are_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vs_trl, "RESULTS", tmp_path)
    monkeypatch.setattr(vs_trl, "peak_rate", lambda: 1e11)
    monkeypatch.setattr("sys.argv", ["vs_trl", "--estimate", "--case", "30M, 4 x 16 long, KL off"])
    assert vs_trl.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("30M, 4 x 16 long, KL off: about ") and "all: about " in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["vs_trl", "--case", "70B"])
    with pytest.raises(SystemExit):
        vs_trl.main()


def test_the_profile_charges_every_millisecond_to_what_took_it():
    phases = step_profile.measure(SMALL, steps=1)
    for phase, counted in (("learn", 3), ("logprob", 1)):
        rows = {row["what"]: row for row in phases[phase]}
        again = 2 * SMALL.layers if phase == "learn" else 0  # norms that the backward pass makes once more
        norms = rows["rms_norm"]["calls"] / (2 * SMALL.layers + 1 + again)
        assert rows["linear"]["calls"] == 4 * SMALL.layers * norms
        products = sum(rows[name]["flops"] for name in rows if name.startswith("linear"))
        assert products == pytest.approx(counted * products_of(SMALL), rel=0.2)  # prompts are 3 to 6 long
        assert all(row["ms"] >= 0 for row in rows.values()) and "Python and autograd" in rows
    learn = {row["what"] for row in phases["learn"]}
    assert {"linear backward", "swiglu backward", "qkv_rope backward", "linear_grpo_loss"} <= learn
    case = {"peak_flops": 1e11, "copy_bytes": 1e10, "phases": phases}
    lines = step_profile.table({"machine": "m", "threads": 1, "torch": "t", "commit": "c", "cases": {"small": case}})
    assert "| linear, backward |" in lines and "small: a product of 2048 reaches 100 GFLOP/s" in lines
    for phase in step_profile.PHASES:
        assert f"| **{phase}** | | **{sum(row['ms'] for row in phases[phase]):,.0f}** |" in lines


def products_of(shape: Shape) -> float:
    """Operations of a forward pass's products, each prompt forwarded once a group."""
    head, rows = shape.vocabulary * shape.hidden, shape.prompts * (shape.mean_prompt + shape.group * shape.completion)
    return 2 * (shape.parameters - head) * rows + 2 * head * shape.prompts * shape.group * shape.completion
