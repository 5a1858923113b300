"""A model that several ranks hold together learns, samples and is saved as one that a single rank holds."""

import pytest
import tensor_learning
import torch
from ranks import run_ranks

from r1fast import snapshot
from r1fast.config import UserError, load_recipe
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.tensor_parallel import check_split, part_of
from r1fast.parallel import World, joined
from r1fast.plan import parameter_count, plan

ALL = """
import tensor_learning, torch
from pathlib import Path
from r1fast.model.weights import load, save, whole_views
cases, folder, of_one = arguments
folder = Path(folder)
model = tensor_learning.model_of("llama")
save(model, None, folder / "checkpoint")
place.barrier()
again, _ = load(folder / "checkpoint", dtype=torch.float64, tensor=model.tensor)
counted = []
def failure(place):
    try:
        place.of_peers(lambda: 1, failed=ValueError("of the other") if place.peers.rank else None)
    except Exception as error:
        return str(error)
result = {
    "learned": {case: tensor_learning.learn(case) for case in cases},
    "sampled": tensor_learning.sample(),
    "read": all(map(torch.equal, again.parameters(), model.parameters())),
    "of one": tensor_learning.go_on(Path(of_one), None),
    "saved": tensor_learning.go_on(None, folder / "snapshots"),
    "failed": failure(place),
    "asked": place.of_peers(lambda: counted.append(1) or place.everyone.rank),
    "bytes": [tensor_learning.counted(recompute) for recompute in (False, True)],
    "half": tensor_learning.go_on(None, folder / "half", torch.bfloat16, "bfloat16"),
}
result["counted"] = len(counted)
"""
FOUR = """
import tensor_learning
from pathlib import Path
from r1fast.parallel import grouped
cases, of_two = arguments
result = {
    "learned": {case: tensor_learning.learn(case) for case in cases},
    "of two": tensor_learning.go_on(Path(of_two), None),
    "share": (place.rank, place.size, place.peers.rank, place.first),
}
with grouped("cpu", 4):
    result["of four"] = tensor_learning.learn("qwen2")
"""


def same(found: dict, expected: dict) -> None:
    """In float64, where only the order of sums differs (told numbers are float32 on their way to the host)."""
    for ours, theirs in zip(found["numbers"], expected["numbers"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert found["exact"] == [pytest.approx(one, rel=0, abs=1e-9) for one in expected["exact"]]
    assert found["difference"] == pytest.approx(expected["difference"], abs=1e-6)
    same_weights(found["weights"], expected["weights"])


def same_weights(found: dict, expected: dict, atol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=lambda why, name=name: f"{name}: {why}")


def newest(folder) -> snapshot.Snapshot:
    return snapshot.newest(folder, lambda notes: True, pytest.fail)


@pytest.fixture(scope="module")
def one():
    """What one rank learns, by case."""
    return {case: tensor_learning.learn(case) for case in tensor_learning.CASES}


@pytest.mark.long(25)
def test_two_ranks_with_one_model(one, tmp_path):
    """Losses, gradient norms and weights of supervised and GRPO steps; samples; checkpoints; snapshots both ways."""
    alone = tensor_learning.go_on(None, tmp_path / "of one")
    assert len({round(one[case]["numbers"][0][0], 3) for case in one}) == len(one)  # the cases differ
    given = list(one), str(tmp_path), str(newest(tmp_path / "of one").path)
    first, other = run_ranks(2, ALL, *given, tensor=2, timeout=300)
    for case, expected in one.items():
        same(first["learned"][case], expected)
        assert first["learned"][case]["numbers"] == other["learned"][case]["numbers"]
        whole, own = first["learned"][case]["parameters"]
        assert whole == expected["parameters"][1] and own < 0.6 * whole
    tokens, logprobs, logits, heads = tensor_learning.sample()
    assert {len(t) for t in tokens} != {12} and heads == 4
    for found in (first, other):
        assert found["sampled"][0] == tokens and found["sampled"][3] == 2
        torch.testing.assert_close(found["sampled"][2], logits, rtol=0, atol=1e-5)  # float32
        assert [x for r in found["sampled"][1] for x in r] == pytest.approx([x for r in logprobs for x in r], abs=1e-5)
        assert "of the other" in found["failed"]
        assert found["read"] and found["asked"] == 0
        assert all(moved == told > 0 for moved, told in found["bytes"])
    assert (first["counted"], other["counted"]) == (1, 0)
    # resumed: one's on two, two's on one (and below on four)
    assert first["of one"][0] == pytest.approx(alone[0][1:], abs=1e-6)
    same_weights(first["of one"][1], alone[1])
    written = newest(tmp_path / "snapshots").path
    sizes = {p.name[:11]: p.stat().st_size for p in written.iterdir()}
    assert min(sizes["shard-00001"], sizes["shard-00002"]) > 20_000  # each wrote its part
    losses, weights = tensor_learning.go_on(written, None)
    assert losses == pytest.approx(alone[0][1:], abs=1e-6)
    same_weights(weights, alone[1])
    losses, weights = tensor_learning.go_on(newest(tmp_path / "half").path, None, torch.bfloat16, "bfloat16")
    assert losses == pytest.approx(first["half"][0][1:], abs=0.1)
    same_weights(weights, first["half"][1], atol=0.05)
    from r1fast.model.weights import load

    loaded, _ = load(tmp_path / "checkpoint", dtype=torch.float64)
    assert all(map(torch.equal, loaded.parameters(), tensor_learning.model_of("llama").parameters()))
    four = run_ranks(4, FOUR, ["qwen3"], str(written), tensor=2, timeout=300)
    same(four[0]["of four"], one["qwen2"])
    for found in four[:2]:
        assert found["of two"][0] == pytest.approx(alone[0][1:], abs=1e-6)
    same_weights(four[0]["of two"][1], alone[1])
    same(four[0]["learned"]["qwen3"], one["qwen3"])
    same(four[2]["learned"]["qwen3"], one["qwen3"])
    assert [f["share"] for f in four] == [(0, 2, 0, True), (0, 2, 1, False), (1, 2, 0, False), (1, 2, 1, False)]


# -- what cannot be split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (3, {}, r"parallel.tensor=3 must divide the 4 key-value heads of DIR: set it to 1 or 2 or 4$"),
        (8, {}, r"the 4 key-value heads"),
        (4, {"intermediate_size": 22}, r"the 22 inner units of its MLP of DIR: set it to 1 or 2$"),
        (4, {"vocab_size": 3}, r"without one of the 3 words"),
    ],
)
def test_heads_that_do_not_divide(size, changes, words):
    config = DecoderConfig(head_dim=4, **(tensor_learning.SIZES | changes))
    with pytest.raises(UserError, match=words):
        check_split(config, size, "DIR")


def test_processes_that_do_not_divide(monkeypatch):
    needs = r"parallel.tensor=2 needs .* and here is 1: .*torchrun --nproc-per-node 2"
    with pytest.raises(UserError, match=needs), joined("cpu", 2):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="torchrun started 3"), joined("cpu", 2):
        pass


def test_a_run_that_was_not_started_for_it(tmp_path):
    from r1fast.recipe import run

    with pytest.raises(UserError, match=r"parallel.tensor is 2, but these processes hold their models on 1"):
        run(load_recipe("tiny", ["parallel.tensor=2"]), tmp_path / "run", progress=None)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"cannot be had together"):
        load_recipe("tiny", ["parallel.tensor=2", "parallel.shard=all"])
    with pytest.raises(UserError, match=r"parallel.tensor=3 must divide the 2 key-value heads of stages.base.shape"):
        plan(load_recipe("tiny", ["parallel.tensor=3"]))


def test_the_command_refuses_before_any_work(tmp_path, capsys):
    from r1fast.train import main

    for setting, words in (("parallel.tensor=2", "and here is 1"), ("parallel.tensor=0", "parallel.tensor")):
        assert main(["tiny", setting, "--out", str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and words in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_plan_is_of_what_a_rank_holds():
    """The parameters of the largest part, counted by hand; and the plan's weights and cache."""
    config = DecoderConfig(head_dim=4, **tensor_learning.SIZES)
    rows = 2 * 5 * 16  # of embedding and head: a fourth of 19 words, rounded up
    layer = (2 + 2) * 4 * 16 + 16 * 2 * 4 + 3 * 6 * 16 + 2 * 16 + 2 * 4
    assert parameter_count(part_of(config, 4)) == rows + 2 * layer + 16
    plans = (plan(load_recipe("tiny", more)) for more in ([], ["parallel.tensor=2"]))
    whole, half = ({row.name: row.memory for row in stages} for stages in plans)
    assert half["zero"].cache == whole["zero"].cache / 2
    assert 0.5 < half["zero"].weights / whole["zero"].weights < 0.52
    assert half["zero"].training < 0.52 * whole["zero"].training


def test_one_process_is_its_own_peer():
    assert World().of_peers(lambda: 3) == 3 and World().speaks_for_peers and World().everyone == World()


# -- the command under torchrun ---------------------------------------------------------------------------------------

SHORT = {"max_tokens": 12}
STAGES = {
    "base": {"kind": "pretrain", "task": "totals", "steps": 60, "evaluate": False},
    "sft": {"kind": "sft", "from": "base", "data": [{"task": "totals", "limit": 16}], "epochs": 1, "batch_examples": 8,
            "evaluate": False},
    "preference": {"kind": "reward_model", "from": "base", "task": "chat", "pairs": 16, "batch_pairs": 8},
    "grpo": {
        "kind": "grpo",
        "from": "sft",
        "mix": [{"task": "totals", "rewards": {"accuracy": 1.0, "format": 1.0, "preference": 1.0}}],
        "reward_model": "preference",
        "steps": 3,
        "prompts_per_step": 4,
        "group_size": 4,
        "sampling": SHORT,
        "objective": {"kl_coef": 0.01},
        "reference_refresh": 2,
        "evaluate_every": 3,
        "optimizer": {"learning_rate": 1e-3},
    },
    "lora": {
        "kind": "sft",
        "from": "sft",
        "data": [{"task": "totals", "limit": 8}],
        "epochs": 1,
        "batch_examples": 8,
        "adapters": {"rank": 2},
        "evaluate": False,
    },
    "reject": {"kind": "reject", "from": "grpo", "task": "totals", "prompts": 8, "samples": 2, "sampling": SHORT,
               "at_least": 0},
}  # fmt: skip


@pytest.mark.long(25)
def test_the_command_over_two_ranks(tmp_path):
    """Every kind of stage that trains, samples or scores: weights, rewards and evaluations are those of one process."""
    from micro_run import MICRO, Silent
    from safetensors.torch import load_file
    from test_parallel import torchrun

    from r1fast.config import dump_recipe
    from r1fast.metrics import read_events
    from r1fast.recipe import run
    from r1fast.schema import RecipeConfig

    asked = {**load_recipe("tiny", MICRO).model_dump(by_alias=True), "stages": STAGES}
    asked["evaluation"] |= {"limit": 8, "samples": 2, "at_one": 0, "greedy": False, "sampling": SHORT}
    recipe = RecipeConfig.model_validate(asked)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    out, whole = tmp_path / "two", tmp_path / "one"
    process = torchrun(2, out, tmp_path / "recipe.yaml", "parallel.tensor=2")
    run(recipe, whole, progress=Silent())
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 0, told
    assert told.count("report:") == 1
    for file in sorted(whole.glob("stages/*/*/*.safetensors")):
        ours, theirs = load_file(out / file.relative_to(whole)), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-4, msg=lambda why, f=file: f"{f}: {why}")
    steps = [[e for e in read_events(place) if e["event"] == "step"] for place in (out, whole)]
    assert [(e["stage"], e["step"]) for e in steps[0]] == [(e["stage"], e["step"]) for e in steps[1]]
    drawn = [[(e["rewards"]["format"], e["response_length"]) for e in s if e["kind"] == "grpo"] for s in steps]
    assert drawn[0][:2] == drawn[1][:2]  # later ones may differ by a token that rounding decides
    assert (out / "stages/lora/adapter/adapter_model.safetensors").is_file()
    answers = sorted(p.name for p in out.glob("stages/*/answers*"))
    assert set(answers) == {"answers.jsonl"}  # one of the two has drawn, judged and kept them
