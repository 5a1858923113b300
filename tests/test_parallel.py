"""Many ranks do what one does: the same shares everywhere, the same losses and weights, errors that reach all."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from micro_run import run_micro_stages
from ranks import free_port, run_ranks
from test_resume import STAGES

from r1fast.config import UserError
from r1fast.metrics import read_events
from r1fast.parallel import World

# -- one rank's view --------------------------------------------------------------------------------------------------


def test_shares_hold_every_item_once_and_are_even():
    costs = [9, 1, 1, 1, 4, 4, 3, 1]
    shares = World(0, 3).share(costs)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) == 9 and min(loads) >= 7
    assert World(2, 3).share(costs) == shares


def test_one_rank_does_all_without_a_process_group():
    place = World()
    assert place.map([3, 1, 2], lambda own: [x * x for x in own], [1, 1, 1]) == [9, 1, 4]
    assert place.gather("x") == ["x"] and place.any(True, False) == (True, False)
    assert place.on_first(lambda: 5) == 5
    x = torch.ones(3)
    place.add([x])
    assert x.tolist() == [1, 1, 1]


# -- several ----------------------------------------------------------------------------------------------------------

COLLECTIVES = """
import torch
items = list(range(7))
squares = place.map(items, lambda own: [(x * x, place.rank) for x in own], [1.0] * 7)
tensors = [torch.full((3, 2), float(place.rank + 1)), torch.ones(4, dtype=torch.float64) * place.rank]
place.add(tensors)
def fail(own):
    if 2 in own:
        raise ValueError("of one rank")
    return own
try:
    place.map(items, fail, [1.0] * 7)
    told = None
except Exception as error:
    told = type(error).__name__, str(error)
flags = place.any(place.rank == 1, False)
result = squares, [t.tolist() for t in tensors], told, flags, place.on_first(lambda: place.rank)
"""


def test_collectives():
    found = run_ranks(2, COLLECTIVES)
    for squares, tensors, told, flags, first in found:
        assert [value for value, _ in squares] == [x * x for x in range(7)]
        assert {rank for _, rank in squares} == {0, 1}
        assert tensors == [[[3.0, 3.0]] * 3, [1.0] * 4]
        assert "of one rank" in told[1]
        assert (flags, first) == ((True, False), 0)
    assert {told[0] for _, _, told, _, _ in found} == {"ValueError", "RuntimeError"}


KL = {"kl_coef": 0.05, "aggregate": "token"}
TWO = """
import learning
from pathlib import Path
kl, saved, folder = arguments
learning.COUNTED.clear()
result = {"plain": learning.train(kl), "sharded": learning.train(kl, sharded=True, written=Path(folder))}
result["counted"] = list(learning.COUNTED)
result["its state"] = dict(learning.AFTER_ONE)
result["resumed"] = learning.train(kl, sharded=True, saved=saved)
"""
FOUR = """
import learning
from pathlib import Path
kl, folder = arguments
found = Path(folder) / "step-00000001"
result = {"plain": learning.train({"kl_coef": 0.0})}
learning.COUNTED.clear()
result["2 x 2"] = learning.train(kl, sharded=True, within=2, written=Path(folder) / "of 2 x 2")
result["counted"] = list(learning.COUNTED)
result["resumed"] = learning.train(kl, sharded=True, found=found)
result["resumed 2 x 2"] = learning.train(kl, sharded=True, within=2, found=found)
"""


def same(found, expected, skipped: int = 0) -> None:
    """In float64, where only the order of sums differs."""
    losses, weights, difference = expected
    theirs, ends, told = found
    assert theirs == pytest.approx(losses[skipped:], abs=1e-9)
    assert told == pytest.approx(difference, abs=1e-6)
    for one, other in zip(ends, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.long(30)
def test_ranks_give_the_losses_and_weights_of_one(tmp_path):
    """Two and four, with whole weights, with FSDP2 and with HSDP; what any number of them saved, any other goes on
    with: the shards of two on one and on four, what one saved on two, and those of two replicas of two on one."""
    import learning

    from benchmarks.scaling_model import Layout, Passes, gathered_bytes, reduce_bytes, shapes
    from r1fast import snapshot

    one = learning.train(KL)
    assert len({round(loss, 6) for loss in one[0]}) > 1
    weights = shapes(learning.CONFIG)
    for found in run_ranks(2, TWO, KL, dict(learning.AFTER_ONE), str(tmp_path)):
        plain, shared = found["counted"][:3], found["counted"][3:]
        assert [one["added"] for one in plain] == [2 * reduce_bytes(weights, Layout(2), 8)[1]] * 3
        for step in shared:
            passes = Passes(**step["passes"])
            assert passes.learned >= 4 and passes.scored > passes.scorings >= 2
            assert step["gathered"] == gathered_bytes(learning.CONFIG, Layout(1, 2), 8, passes)
            assert step["scattered"] == passes.learned * reduce_bytes(weights, Layout(1, 2), 8)[0]
        same(found["plain"], one)
        same(found["sharded"], one)
        same(found["resumed"], one, skipped=2)
        same(learning.train(KL, saved=found["its state"]), one, skipped=2)
    shards = snapshot.newest(tmp_path, lambda notes: True, pytest.fail)
    names = sorted(p.name for p in shards.path.iterdir())
    assert [name[:11] for name in names] == ["manifest.js", "shard-00001", "shard-00002", "state.pt"]
    sizes = [(shards.path / name).stat().st_size for name in names[1:]]
    assert sizes[2] < 20_000 < min(sizes[:2])  # no rank wrote the whole
    same(learning.train(KL, found=shards.path), one, skipped=2)
    no_kl = learning.train({"kl_coef": 0.0})
    within, between = reduce_bytes(weights, Layout(2, 2), 8)
    for found in run_ranks(4, FOUR, KL, str(tmp_path)):
        for step in found["counted"]:
            passes = Passes(**step["passes"])
            assert step["gathered"] == gathered_bytes(learning.CONFIG, Layout(2, 2), 8, passes)
            assert (step["scattered"], step["added"]) == (passes.learned * within, 2 * between)
        same(found["plain"], no_kl)
        same(found["2 x 2"], one)
        same(found["resumed"], one, skipped=2)
        same(found["resumed 2 x 2"], one, skipped=2)
    replicas = snapshot.newest(tmp_path / "of 2 x 2", lambda notes: True, pytest.fail)
    same(learning.train(KL, found=replicas.path), one, skipped=2)
    (shards.path / names[2]).unlink()
    with pytest.raises(UserError, match=r"the shards do not hold all of 'model\.weights"):
        learning.train(KL, found=shards.path)


# -- the command under torchrun ---------------------------------------------------------------------------------------

SETTINGS = {"checkpoint": {"steps": 1, "minutes": 0, "rollout_seconds": 0}}


@pytest.fixture(scope="module")
def one(micro, tmp_path_factory):
    """(recipe, directory of its run by one process)."""
    out = tmp_path_factory.mktemp("one") / "run"
    grpo = {**STAGES["grpo"], "mini_batches": 1, "evaluate": True}
    preference = {"kind": "reward_model", "task": "chat", "pairs": 24, "batch_pairs": 8, "micro_batch_tokens": 64}
    stages = {"sft": {**STAGES["sft"], "micro_batch_tokens": 64}, "preference": preference}
    stages |= {"grpo": grpo, "reject": STAGES["reject"]}
    stages["adapted"] = {**grpo, "steps": 2, "evaluate": False, "adapters": {"rank": 2}, "reference_refresh": None}
    run_micro_stages(out, micro, stages, SETTINGS)
    return out / "config.yaml", out


def torchrun(ranks: int, out, recipe, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "r1fast.train", str(recipe)]
    command += ["--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def same_results(out, whole) -> None:
    from safetensors.torch import load_file

    for stage in ("sft", "preference", "grpo", "adapted"):
        ours, theirs = (
            load_file(place / "stages" / stage / "checkpoint" / "model.safetensors") for place in (out, whole)
        )
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4)
    rewards = [[e["reward"] for e in read_events(place) if e.get("kind") == "grpo" and e["event"] == "step"]
               for place in (out, whole)]  # fmt: skip
    assert rewards[0][:2] == rewards[1][:2]  # later ones may differ by a token that rounding decides
    found = [json.loads((place / "summary.json").read_text())["stages"] for place in (out, whole)]
    assert [s["name"] for s in found[0]] == [s["name"] for s in found[1]]


@pytest.mark.long(20)
def test_the_command_under_torchrun(one, tmp_path):
    recipe, whole = one
    process = torchrun(2, tmp_path / "run", recipe)
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 0, told
    same_results(tmp_path / "run", whole)
    assert told.count("report:") == 1  # one rank speaks


@pytest.mark.long(30)
def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_another_number(one, tmp_path):
    """Its weights sharded before, whole after."""
    recipe, whole = one
    out = tmp_path / "run"
    process = torchrun(2, out, recipe, "parallel.shard=all", "checkpoint.background=always")
    log, waited = out / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and '"kind": "grpo", "step": 2,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < waited
        time.sleep(0.01)
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    told = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "Signal 9" in told
    steps = list((out / "stages" / "grpo" / "snapshots").iterdir())
    assert steps
    process = torchrun(1, out, recipe, "--resume")
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 0, told
    assert [e["status"] for e in read_events(out) if e["event"] == "stage" and e["stage"] == "grpo"][:2] == [
        "started",
        "resumed",
    ]
    same_results(out, whole)


def test_a_mistake_is_said_once(one, tmp_path):
    recipe, _ = one
    process = torchrun(2, tmp_path / "run", recipe, "stages.grpo.mix.0.task=nothing")
    told = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and told.count("error: ") == 1 and "'nothing'" in told, told
