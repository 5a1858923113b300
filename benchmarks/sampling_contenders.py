"""One who samples, in a process of its own: `python -m benchmarks.sampling_contenders NAME FOLDER [DEVICE [DTYPE]]`.

Reads one JSON object a line, a case to sample, and answers each with one line; benchmarks/sampling.py asks. Processes
of their own, because peak memory is a process's, and because one library's threads and allocator settings must not be
another's.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

NAMES = ("r1fast", "generate", "generate, static cache", "continuous batching")
PAGE = 32  # tokens of a block of transformers' continuous batching; its default of 256 would waste most of one


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences of `new` tokens: `group` of each of batch / group prompts, all of `prompt` tokens."""

    prompt: int
    group: int
    batch: int
    new: int

    @property
    def prompts(self) -> int:
        return self.batch // self.group


def prompts_of(case: Case, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(case.prompt)
    return torch.randint(1, vocabulary, (case.prompts, case.prompt), generator=generator).tolist()


Draw = Callable[[list[list[int]], Case, bool], list[list[int]]]  # prompts, case, greedy -> tokens of each sequence


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender's model is."""

    device: str = "cpu"
    dtype: str = "float32"


ON_CPU = Place()


def ours(folder: Path, place: Place) -> Draw:
    import r1fast

    model, _ = r1fast.load(folder, place.device, place.dtype)
    kept = {}

    def draw(prompts: list[list[int]], case: Case, greedy: bool) -> list[list[int]]:
        if kept.get("case") != case:  # one sampler a case: its pool is part of the case's memory
            kept.clear()
            kept.update(case=case, sampler=r1fast.Sampler(model, max_seqs=case.batch))
        params = r1fast.SamplingParams(n=case.group, max_tokens=case.new, temperature=0.0 if greedy else 1.0)
        groups = kept["sampler"].sample(prompts, params)
        return [list(rollout.tokens) for group in groups for rollout in group.rollouts]

    draw.forget = kept.clear
    return draw


def transformers_model(folder: Path, place: Place):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, place.dtype)).to(place.device).eval()


def theirs(folder: Path, place: Place, static: bool) -> Draw:
    model = transformers_model(folder, place)
    cache = {"cache_implementation": "static"} if static else {}

    @torch.inference_mode()
    def draw(prompts: list[list[int]], case: Case, greedy: bool) -> list[list[int]]:
        ids = torch.tensor(prompts, device=place.device)
        how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if case.group > 1:
            how["num_return_sequences"] = case.group
            if greedy:  # it refuses several greedy ones
                ids = ids.repeat_interleave(case.group, 0)
                del how["num_return_sequences"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new, eos_token_id=None, pad_token_id=0,
            **how, **cache,
        )  # fmt: skip
        return out[:, case.prompt :].tolist()

    return draw


def batching(folder: Path, place: Place) -> Draw:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = transformers_model(folder, place)
    pages_are = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"

    @torch.no_grad()  # not inference_mode: transformers 5.17 writes, in a thread, to tensors that were made under it
    def draw(prompts: list[list[int]], case: Case, greedy: bool) -> list[list[int]]:
        how = GenerationConfig(
            max_new_tokens=case.new, eos_token_id=-1, pad_token_id=0, do_sample=not greedy, top_k=0, temperature=1.0
        )
        pages = -(-(case.prompt + case.new) // PAGE) + 1
        sizes = {pages_are: PAGE, "num_blocks": pages * case.batch, "max_batch_tokens": max(2048, case.batch)}
        config = ContinuousBatchingConfig(**(sizes if place.device == "cpu" else {}))  # it sizes a GPU's by itself
        repeated = [tokens for tokens in prompts for _ in range(case.group)]  # its blocks of equal prefixes are shared
        found = model.generate_batch(
            repeated, generation_config=how, continuous_batching_config=config, progress_bar=False
        )
        ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        return [list(one.generated_tokens) for one in ordered]

    return draw


def contender(name: str, folder: Path, place: Place = ON_CPU) -> Draw:
    if name == "r1fast":
        return ours(folder, place)
    if name == "continuous batching":
        return batching(folder, place)
    return theirs(folder, place, name.endswith("static cache"))


def status(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """The peak starts anew from what is resident; what was freed goes back first, or it would hide a new peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    name, folder, place = sys.argv[1], Path(sys.argv[2]), Place(*sys.argv[3:5])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print where they like
    draw, vocabulary = contender(name, folder, place), json.loads((folder / "config.json").read_text())["vocab_size"]
    on_gpu = place.device == "cuda"
    watched = not on_gpu and sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
    loaded = status("VmRSS") if watched else 0.0
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.pop("forget", False):
            getattr(draw, "forget", lambda: None)()
            if watched:
                forget_peak()
        greedy, want_tokens = asked.pop("greedy", False), asked.pop("tokens", False)
        case = Case(**asked)
        prompts = prompts_of(case, vocabulary)
        start = time.perf_counter()
        tokens = draw(prompts, case, greedy)
        answer = {"seconds": time.perf_counter() - start}
        wrong = [len(t) for t in tokens if len(t) != case.new]
        if len(tokens) != case.batch or wrong:
            answer["error"] = f"{len(tokens)} sequences of {case.batch}; lengths {wrong[:3]} instead of {case.new}"
        if watched:
            answer["MiB"] = max(0.0, status("VmHWM") - loaded)
        if on_gpu:
            answer["MiB"] = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps(answer | ({"tokens": tokens} if want_tokens else {})), file=answers, flush=True)
    os._exit(0)  # a library's threads need not agree


if __name__ == "__main__":
    main()
