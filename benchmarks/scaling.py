"""Weak scaling of a GRPO step: measured here over gloo with one process a rank, and predicted for GPUs.

    python -m benchmarks.scaling                  # the prediction (docs/scaling.md); nothing is run
    python -m benchmarks.scaling --ranks 1 2 4    # measures, checks counted bytes, writes benchmarks/results/

Each rank samples and learns the same amount, so seconds would stay as they are if ranks cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from benchmarks.scaling_model import (
    Counted,
    Layout,
    Machine,
    Passes,
    Work,
    gathered_bytes,
    predict,
    reduce_bytes,
    shapes,
)
from r1fast.learn.learner import Learner
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.sharding import gathered, shard
from r1fast.parallel import joined, world
from r1fast.rollout.sampler import Sampler, SamplingParams
from r1fast.schema import ObjectiveConfig, OptimizerConfig
from r1fast.types import Prompt, Rollout, RolloutGroup

SMALL = DecoderConfig(2048, 256, 640, layers=4, heads=4, kv_heads=2, head_dim=64, max_positions=512)
PROMPTS, GROUP, PROMPT, COMPLETION, STEPS = 4, 8, 24, 64, 4  # of each rank
MICRO_BATCH = 1024  # tokens
MODELS = {  # of Qwen2.5's shapes (1.5B, 7B) and Llama 3's (70B)
    "1.5B": DecoderConfig(151936, 1536, 8960, 28, 12, 2, 128, "qwen2", tie_embeddings=True),
    "7B": DecoderConfig(152064, 3584, 18944, 28, 28, 4, 128, "qwen2"),
    "70B": DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128, "llama"),
}
GPUS, CARDS = (8, 64, 1024), (80, 141)  # GB


# -- measured -----------------------------------------------------------------------------------------------------


def rank(out: Path, kind: str) -> None:
    """One rank's part; the first writes what was measured."""
    torch.set_num_threads(1)
    with joined("cpu") as place:
        model = Decoder(SMALL).initialize(0)
        if kind != "whole":
            shard(model, 2 if kind == "2 a node" else None)
        sampler, learner = Sampler(model, eos_token_id=0), Learner(model, OptimizerConfig(), STEPS)
        draw, seconds, counts = Random(0), [], []
        prompts = [
            Prompt(str(i), tuple(draw.randrange(1, SMALL.vocab_size) for _ in range(PROMPT)), "", None, "t")
            for i in range(PROMPTS * place.size)
        ]
        for step in range(STEPS):
            place.barrier()
            began = time.perf_counter()
            with Counted() as counted:
                one_step(model, sampler, learner, prompts, step)
            seconds.append(time.perf_counter() - began)
            counts.append(dict(counted.bytes))
        if place.first:
            out.write_text(json.dumps({"ranks": place.size, "kind": kind, "seconds": median(seconds[1:]),
                                       "bytes": counts[-1]}))  # fmt: skip


def one_step(model: Decoder, sampler: Sampler, learner: Learner, prompts: list[Prompt], step: int) -> None:
    params = SamplingParams(n=GROUP, max_tokens=COMPLETION, min_tokens=COMPLETION, seed=step)

    def sample(own: list[Prompt]) -> list[RolloutGroup]:
        return [scored(group) for group in sampler.sample(own, params)]

    with gathered(model):
        groups = world().map(prompts, sample, [1.0] * len(prompts))
    objective = ObjectiveConfig(kl_coef=0.0)
    learner.train_policy(groups, objective, random=Random(step), micro_batch_tokens=MICRO_BATCH, logprob_bound=1.0)


def scored(group: RolloutGroup) -> RolloutGroup:
    """Rewarded by something that differs within a group."""
    rollouts = [Rollout(r.tokens, r.logprobs, r.finish, reward=r.tokens[0] % 7.0, logprobs_full=r.logprobs_full)
                for r in group.rollouts]  # fmt: skip
    return RolloutGroup(group.prompt, rollouts, group.weights_version)


def measure(ranks: int, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, out = free.getsockname()[1], Path(folder) / "told"
        free.close()
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "benchmarks.scaling"]
        command += ["--kind", kind, "--out", str(out)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, cwd=ROOT)
        return {**json.loads(out.read_text()), "model": modelled(ranks, kind)}


def modelled(ranks: int, kind: str) -> dict[str, float]:
    """The bytes that the cost model gives for a step of `one_step`: one update, no reference."""
    # a rank's micro-batches: as many whole groups, prompts laid down once, as MICRO_BATCH has room for
    learned = -(-PROMPTS // (MICRO_BATCH // (PROMPT + GROUP * COMPLETION)))
    layout = {"whole": Layout(ranks), "sharded": Layout(1, ranks), "2 a node": Layout(ranks // 2, 2)}[kind]
    weights = shapes(SMALL)
    near, far = reduce_bytes(weights, layout, 4)
    return {
        "gathered": gathered_bytes(SMALL, layout, 4, Passes(sampled=1, learned=learned)),
        "scattered": near * learned,
        "added": far,
    }


# -- told ---------------------------------------------------------------------------------------------------------


def measured_table(results: dict[str, Any]) -> str:
    rows = ["| ranks | weights | s a step | of one rank's | gathered (MB) | scattered (MB) | added up (MB) | "
            "objects (KB) |\n" + "| ---: | --- |" + " ---: |" * 6]  # fmt: skip
    one = next(case["seconds"] for case in results["cases"] if case["ranks"] == 1)
    for case in results["cases"]:
        found, model = case["bytes"], case["model"]
        pairs = [f"{found.get(k, 0) / 1e6:.2f} / {model[k] / 1e6:.2f}" for k in ("gathered", "scattered", "added")]
        rows.append(f"| {case['ranks']} | {case['kind']} | {case['seconds']:.2f} | {case['seconds'] / one:.2f}x | "
                    f"{' | '.join(pairs)} | {found.get('objects', 0) / 1e3:.0f} |")  # fmt: skip
    about = f"{results['machine']}, {results['cores']} cores, one thread a rank, torch {results['torch']}"
    return "\n".join(rows) + (
        f"\n\nBytes of a rank and step, counted / by the model. Measured with `python -m benchmarks.scaling --ranks "
        f"{' '.join(str(r) for r in dict.fromkeys(c['ranks'] for c in results['cases']))}` at {results['commit']}: "
        f"{about}."
    )


def predicted_table() -> str:
    rows = ["| model | GPUs | weights | held by each (GB) | "
            + " | ".join(f"fits {card} GB" for card in CARDS)
            + " | sample (s) | learn (s) | gather (s) | add up (s) | tell (s) | step (s) | efficiency |\n"
            + "| --- | ---: | --- |" + " ---: |" * 10]  # fmt: skip
    for name, config in MODELS.items():
        for split in ("none", "node", "all"):
            for ranks in GPUS:
                if split == "all" and ranks <= Machine().node:  # the same as node
                    continue
                p = predict(config, ranks, split, Work(), Machine())
                how = f"{p.layout.replicas} x {p.layout.shards}" if split != "none" else "whole"
                fits = ("yes" if p.fits(card * 1e9) else "no" for card in CARDS)
                times = (p.sample, p.learn, p.gather, p.add, p.told, p.seconds)
                rows.append(f"| {name} | {ranks:,} | {how} | {p.held / 1e9:.0f} | {' | '.join(fits)} | "
                            f"{' | '.join(f'{t:.1f}' for t in times)} | {p.efficiency:.0%} |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="measure with so many processes on this machine")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:  # started by torchrun, from `measure`
        rank(options.out, options.kind)
        return
    if options.ranks is None:
        print(predicted_table())
        return
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    about = {"machine": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit}
    kinds = {1: ("whole",), 2: ("whole", "sharded")}
    cases = [measure(n, kind) for n in options.ranks for kind in kinds.get(n, ("whole", "sharded", "2 a node"))]
    path = RESULTS / f"{slug(about['machine'])}-scaling.json"
    path.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    print(measured_table({**about, "cases": cases}))


if __name__ == "__main__":
    main()
