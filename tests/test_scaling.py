"""The examples that start a cluster are whole, and the cost model says what arithmetic by hand says."""

import argparse
import re
import subprocess
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def torchruns_parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def check_command(words: list[str]) -> list[str]:
    """torchrun's own parser takes them; returns what r1fast.train is given."""
    given = torchruns_parser().parse_args(words)
    assert given.rdzv_backend == "c10d" and given.rdzv_endpoint.endswith(":29500") and int(given.max_restarts) > 0
    assert given.module and given.training_script == "r1fast.train" and "--resume" in given.training_script_args
    return given.training_script_args


def test_the_slurm_example():
    script = EXAMPLES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= asked.keys() and asked["ntasks-per-node"] == "1"
    words = text.replace("\\\n", " ").split("torchrun \n")[-1].split("torchrun ")[-1].split()
    words = [word.strip('"').replace('"', "") for word in words]
    known = {"$SLURM_JOB_NUM_NODES": asked["nodes"], "$SLURM_JOB_ID": "7", "$head": "first"}
    for name, value in known.items():
        words = [word.replace(name, value) for word in words]
    assert check_command(words)[0] == "$@"
    assert f"--nproc-per-node={asked['gpus-per-node']}" in words


def test_the_kubernetes_example():
    from r1fast.config import load_recipe

    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"], service["spec"]["clusterIP"]) == ("Service", "Job", "None")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = check_command(container["args"])
    assert f"--nnodes={spec['completions']}" in container["args"] and spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"  # which gives the first pod the name that all look for
    first = f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert first in container["args"] and pod["subdomain"] == service["metadata"]["name"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["args"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert load_recipe(given[0], [word for word in given[1:] if not word.startswith("--")]).data in given[2]


def test_bytes_by_hand():
    from benchmarks.scaling_model import Layout, Passes, gather_bytes, gathered_bytes, padded, reduce_bytes
    from r1fast.model.decoder import DecoderConfig

    weights = [(10, 3), (4,)]
    assert padded(weights, 1) == 34 and padded(weights, 4) == 12 * 3 + 4
    assert gather_bytes(weights, Layout(1, 4), 4) == 40 * 4 * 3 / 4
    assert reduce_bytes(weights, Layout(1, 4), 4) == (10 * 4 * 3, 0)
    assert reduce_bytes(weights, Layout(2, 1), 4) == (0, 34 * 4)  # 2 (2 - 1) / 2 of all of it
    assert reduce_bytes(weights, Layout(2, 2), 4) == (17 * 4, 17 * 4)
    config = DecoderConfig(5, 4, 6, layers=3, heads=2, kv_heads=1, head_dim=2)
    layer = 2 * 4 + 2 * 2 + 8 * 4 + 4 * 4 + 12 * 4 + 4 * 6  # norms, also of q and k; qkv, o, gate with up, down
    rest = 2 * 6 * 4 + 4  # embedding and head with 5 rows filled up to 6, the norm
    half = 2 / 2  # in two bytes, of which half come from the other rank
    assert gathered_bytes(config, Layout(1, 2), 2, Passes(sampled=1)) == half * (3 * layer + rest)
    assert gathered_bytes(config, Layout(1, 2), 2, Passes(learned=4)) == half * 4 * (2 * 3 * layer + rest)
    assert gathered_bytes(config, Layout(1, 2), 2, Passes(scored=4, scorings=1)) == half * (4 * 3 * layer + rest)


def test_sizes_are_those_of_the_models():
    from math import prod

    from benchmarks.scaling import MODELS
    from benchmarks.scaling_model import shapes

    counts = {name: sum(map(prod, shapes(config))) / 1e9 for name, config in MODELS.items()}
    assert counts == pytest.approx({"1.5B": 1.54, "7B": 7.62, "70B": 70.55}, abs=0.01)
