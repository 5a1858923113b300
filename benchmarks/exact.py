"""`python -m benchmarks.exact`: what the sampler's `exact` mode costs.

Both kinds of sampler take turns in one process, over the same weights and prompts; a ratio is the median of the ratios
of the turns, with the lowest and highest. Counted beside it: draws in which the usual mode, computed in another shape,
took another token than the exact one, because the random number fell within rounding of the border between the two.
docs/sampling.md reads the file that this leaves (benchmarks/readme.py).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from statistics import median

import torch

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from benchmarks.sampling import SIZES, config
from r1fast.model.decoder import Decoder
from r1fast.rollout.sampler import Sampler, SamplingParams

MODELS = {name: config(name) for name in SIZES}
# prompts, tokens of each, samples, tokens to draw
CASES = ((1, 32, 1, 32), (1, 32, 8, 16), (8, 32, 8, 16), (8, 32, 32, 12), (4, 512, 1, 1), (4, 512, 16, 8))


def measure(name: str, turns: int) -> list[dict]:
    model, rng = Decoder(MODELS[name]).initialize(0), random.Random(0)
    samplers = [Sampler(model, exact=exact) for exact in (False, True)]
    found = []
    for prompts, length, samples, new in CASES:
        tokens = [[rng.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(prompts)]
        seconds, drawn = ([], []), []
        for turn in range(turns + 1):
            for sampler, times in zip(samplers, seconds, strict=True):
                model.bump_version()  # so that no prompt is found in the cache
                began = time.perf_counter()
                groups = sampler.sample(tokens, SamplingParams(n=samples, max_tokens=new, seed=turn))
                times.append(time.perf_counter() - began)
                drawn.append([[rollout.tokens for rollout in group.rollouts] for group in groups])
        other, draws = differing(drawn)
        ratios = [b / a for a, b in zip(*(times[1:] for times in seconds), strict=True)]
        case = {"model": name, "prompts": prompts, "prompt": length, "samples": samples, "new": new}
        usual = median(seconds[0][1:])
        case |= {"draws": draws, "other": other}
        found.append({**case, "seconds": usual, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)})
        print(found[-1], flush=True)
    return found


def differing(drawn: list[list[list[list[int]]]]) -> tuple[int, int]:
    """(draws that differ from those of the other sampler, draws compared): each sample up to its first difference."""
    other = draws = 0
    for turn in range(0, len(drawn), 2):
        for group, its_twin in zip(drawn[turn], drawn[turn + 1], strict=True):
            for tokens, twin in zip(group, its_twin, strict=True):
                same = next((i for i, (a, b) in enumerate(zip(tokens, twin, strict=True)) if a != b), None)
                other, draws = other + (same is not None), draws + (len(tokens) if same is None else same + 1)
    return other, draws


def table(result: dict) -> str:
    """Markdown: a line for each case."""
    lines = [
        "| model | prompts x tokens | samples x tokens | usual, s | exact costs | other tokens |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for one in result["cases"]:
        shape = f"{one['prompts']} x {one['prompt']} | {one['samples']} x {one['new']}"
        ratio = f"{one['ratio']:.2f} x ({one['low']:.2f}–{one['high']:.2f})"
        other = f"{one['other']} of {one['draws']:,}"
        lines.append(f"| {one['model']} | {shape} | {one['seconds']:.3f} | {ratio} | {other} |")
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    where = f"{result['machine']}, {threads}, torch {result['torch']}, float32"
    return "\n".join((*lines, "", f"Measured with `python -m benchmarks.exact` at {result['commit']}: {where}."))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact", description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="the others keep their lines")
    options = parser.parse_args()
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    about = {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    path = RESULTS / f"{slug(about['machine'])}-exact.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else []
    kept = [case for case in kept if case["model"] in MODELS.keys() - set(options.models)]
    cases = kept + [case for name in options.models for case in measure(name, options.turns)]
    path.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    print(table({**about, "cases": cases}))


if __name__ == "__main__":
    main()
