"""Shares of half weights, of their optimizer's states and of adapters: two ranks end where one does, hold half of it
each, and never more of a model than they are working on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from r1fast import snapshot

CODE = """
import sharded_ranks
from pathlib import Path
result = sharded_ranks.all_of(place, Path(arguments[0]), arguments[1])
"""
CASES = ("masters", "half states", "adapters", "half adapters")
# By how much two ranks may differ from one. In float64 only the order of sums differs. Half weights: gradients are
# summed in float32, so that a master of size 1 may be off by its last bits; the weights are then the same in all but
# those that lie in the middle of two half numbers, and a moment in bfloat16 is rounded as its last bits say.
MASTER, HALF = 2.5e-7, 2**-8


def run_all(folder: Path) -> tuple[dict, list[dict]]:
    """(what one process found, what each of two ranks found)."""
    import learning
    import sharded_ranks

    one, saved = {}, {}
    for case in sharded_ranks.CASES:
        one[case] = sharded_ranks.ended(case)
        saved[case] = copy.deepcopy(learning.AFTER_ONE)
        if case == "adapters":
            one["kept"] = sharded_ranks.kept(learning.LAST["models"][0], folder / "one")
    one["scorer"] = sharded_ranks.scorer(folder / "scorer of one")
    found = run_ranks(2, CODE, str(folder), saved)
    for case in sharded_ranks.CASES:
        step = snapshot.newest(folder / case, lambda notes: True, pytest.fail)
        one[case]["resumed"] = sharded_ranks.ended(case, found=step.path)
    return one, found


def near(found: dict, expected: dict, case: str) -> None:
    exact = case == "adapters"
    bounds = {"moved": MASTER, "weights": HALF, "moments": HALF}
    steps = len(found["losses"])
    assert found["losses"] == pytest.approx(expected["losses"][-steps:], abs=1e-9 if exact else 1e-6)
    for name, bound in bounds.items():
        bound = 1e-9 if exact else bound
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one.double(), other.double(), rtol=bound, atol=bound * (name != "moments"))


def bits(found: dict) -> list[torch.Tensor]:
    return [*found["moved"], *found["weights"], *found["moments"]]


def ends_where_one_does(one: dict, found: list[dict], case: str) -> None:
    """From the start, from what two ranks saved and from what one did; and one goes on with what two saved."""
    moments = torch.cat([m.abs().flatten() for m in one[case]["moments"]])
    assert (moments > 0).float().mean() > 0.5
    assert len({round(loss, 6) for loss in one[case]["losses"]}) > 1
    for rank in found:
        for ours in (rank[case], rank[case]["resumed"], rank[case].get("from one")):
            if ours is not None:
                near(ours, one[case], case)
        assert all(map(torch.equal, bits(rank[case]), bits(rank[case]["resumed"])))  # exact resume: the same bits
        assert all(map(torch.equal, bits(rank[case]), bits(found[0][case])))
    near(one[case]["resumed"], one[case], case)


def holds_a_share(one: dict, found: list[dict], case: str) -> None:
    """Of weights, masters and states."""
    import learning

    from benchmarks.scaling_model import padded, shapes

    weights, half = shapes(learning.CONFIG), case != "adapters"
    for rank in found:
        assert rank[case]["states held"] <= 0.51 * one[case]["states held"]
        assert rank[case]["held"] <= 0.51 * one[case]["held"]
    if "adapters" not in case:  # shares of float32 masters and of a half reference, to the byte; no other weights
        assert found[0][case]["held"] == padded(weights, 2) // 2 * (4 + 2)
        assert found[0][case]["states held"] == padded(weights, 2) // 2 * 2 * (2 if case == "half states" else 4)
    assert half == (one[case]["weights"][0].dtype == torch.bfloat16)


def gathers_a_layer_and_the_rest_at_most(found: list[dict], case: str) -> None:
    """Of policy and reference together, forward and backward, with and without recomputed activations."""
    from math import prod

    import learning
    import sharded_ranks

    from benchmarks.scaling_model import layer_shapes, shapes
    from r1fast.model.lora import adapter_parameters

    every, layer = (sum(map(prod, of(learning.CONFIG))) for of in (shapes, layer_shapes))
    most = every - (learning.CONFIG.layers - 1) * layer
    if "adapters" in case:
        most += adapter_parameters(learning.CONFIG, sharded_ranks.LORA) // learning.CONFIG.layers
    for rank in found:
        assert rank[case]["gathered at once"] == {"forward": most, "backward": most}


def refreshes_the_reference(found: list[dict]) -> None:
    for ours, theirs in zip(found[0]["refreshed"], found[0]["half states"]["from one"]["moved"], strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())


def merges_folds_and_saves_adapters(one: dict, found: list[dict], folder: Path) -> None:
    written = load_file(folder / "kept" / "checkpoint" / "model.safetensors")
    for rank in found:
        assert rank["kept"]["same"]  # leaving the merged weights is exact
        for name, weight in rank["kept"]["sampled"].items():
            assert torch.equal(written[name], weight)
            torch.testing.assert_close(weight, one["kept"]["sampled"][name], rtol=0, atol=1e-7)  # rounded to float32
    files = [load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder / "kept", folder / "one")]
    assert len(files[0]) == 2 * 3 * 2 and files[0].keys() == files[1].keys()
    for name, weight in files[0].items():
        torch.testing.assert_close(weight, files[1][name], rtol=0, atol=1e-9)
    assert json.loads((folder / "kept" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def refuses_shares_in_the_native_step(found: list[dict]) -> None:
    """And takes what is gathered."""
    for rank in found:
        told = rank["native"]
        assert told["refusal"] == told["after"] == "embedding is spread over several processes"
        assert "needs whole weights" in told["error"]
        assert told["gathered"] is told["still"] is None and told["same"] and told["packed"]


def trains_a_reward_model(one: dict, found: list[dict], folder: Path) -> None:
    assert one["scorer"]["batches"] % 2  # one of the ranks goes along without counting
    stats = torch.tensor(one["scorer"]["stats"])
    assert len(stats[:, 0].unique()) == 3 and 0 < stats[:, 2].max() <= 1
    for rank in found:
        torch.testing.assert_close(torch.tensor(rank["scorer"]["stats"]), stats, rtol=1e-9, atol=1e-9)
        assert rank["scorer"]["scores"] == pytest.approx(one["scorer"]["scores"], abs=1e-6)  # float32
        assert rank["scorer"]["held"] <= 0.51 * one["scorer"]["held"]
    files = [load_file(folder / name / "model.safetensors") for name in ("scorer", "scorer of one")]
    assert files[0].keys() == files[1].keys() and "score.weight" in files[0]
    for name, weight in files[0].items():
        torch.testing.assert_close(weight, files[1][name], rtol=0, atol=1e-9)


@pytest.mark.long(45)
def test_two_ranks_with_shares_do_what_one_does(tmp_path):
    one, found = run_all(tmp_path)
    for case in CASES:
        ends_where_one_does(one, found, case)
        holds_a_share(one, found, case)
        gathers_a_layer_and_the_rest_at_most(found, case)
    refreshes_the_reference(found)
    merges_folds_and_saves_adapters(one, found, tmp_path)
    refuses_shares_in_the_native_step(found)
    trains_a_reward_model(one, found, tmp_path)
