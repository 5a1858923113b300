"""How far the sampler's log-probabilities are from the trainer's, and what it costs to bring them together.

The same weights sample and score: what differs is the order in which products and attention sum. Three ways: as it
comes; with cuBLAS's workspaces off, so that it cannot split K (benchmarks/first_device_test.py says for which products
that is enough); and the sampler's `exact` mode (r1fast/rollout/exact.py). Each in a process of its own, for cuBLAS
reads its environment once.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.first_device_test import WORKSPACES_OFF
from benchmarks.gpu.measure import SMALL, Report, arguments, ask, in_short, settle
from benchmarks.gpu.shapes import MODELS, random_model
from r1fast.learn.losses import log_probs
from r1fast.learn.packing import pack, rows_from_groups
from r1fast.model.decoder import Decoder
from r1fast.rollout.sampler import Sampler, SamplingParams

MODULE = "benchmarks.gpu.exactness"
PROMPTS, GROUP, PROMPT, NEW = (4, 2, 24, 12) if SMALL else (16, 16, 512, 64)
WAYS = {"as it comes": ({}, False), "cuBLAS workspaces off": (WORKSPACES_OFF, False), "exact sampler": ({}, True)}


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (PROMPTS, PROMPT), generator=generator).tolist()


@torch.no_grad()
def difference(model: Decoder, groups: list) -> dict[str, float]:
    """|trainer - sampler|, nats, over the drawn tokens: mean, largest, and the share that is exactly zero."""
    rows = rows_from_groups(groups, torch.zeros(PROMPTS * GROUP))
    batches = pack(rows, None, 16_384, model.device)
    trainer = torch.cat(log_probs(model, batches)).double()
    sampler = torch.cat([batch.old_logprob for batch in batches]).double()
    away = (trainer - sampler).abs()
    return {"mean": away.mean().item(), "max": away.max().item(), "zero": (away == 0).double().mean().item()}


def compared(name: str, exact: bool) -> dict:
    model = random_model(MODELS[name])
    sampler = Sampler(model, max_seqs=PROMPTS * GROUP, exact=exact)
    asked, spent = prompts(MODELS[name].vocab_size), []
    for _ in range(2):  # the first one compiles and captures
        model.bump_version()  # no prompt is found in the cache
        settle()
        start = time.perf_counter()
        groups = sampler.sample(asked, SamplingParams(n=GROUP, max_tokens=NEW, temperature=1.0))
        settle()
        spent.append(time.perf_counter() - start)
    tokens = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    return {**difference(model, groups), "tokens": tokens, "sampling seconds": round(spent[-1], 4)}


def main() -> int:
    if "--ask" in sys.argv:
        name, exact = sys.argv[-2:]
        print(json.dumps(compared(name, exact == "True")))
        return 0
    options = arguments("exactness", __doc__).parse_args()
    deadline = time.monotonic() + options.seconds
    report = Report("exactness", options.folder)
    for name in reversed(MODELS):  # the larger one first, for what the time holds
        usual = None
        for way, (environment, exact) in WAYS.items():
            left = deadline - time.monotonic()
            try:
                found = ask(MODULE, name, str(exact), environment=environment, seconds=left)
            except RuntimeError as error:
                report.skip(f"{name}, {way}", in_short(error))
                continue
            usual = usual or found["sampling seconds"]
            report.add(what=f"{name}, {way}", **found, cost=round(found["sampling seconds"] / usual, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
