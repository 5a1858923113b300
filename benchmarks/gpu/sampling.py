"""Sampling 512 sequences, 16 of each prompt, around contexts of 1k and 2k tokens: tokens/s beside the roofline and
transformers' continuous batching.

The rate of decoding is that of the tokens by which a longer call exceeds a shorter one, so neither the prompts nor what
a call costs at its beginning are in it. Its roofline (benchmarks/gpu/roofline.py) reads a group's prompt once, or, in
`fraction unshared`, once for every sequence.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu import roofline, targets
from benchmarks.gpu.checkpoints import wait_for
from benchmarks.gpu.measure import DEVICE, NO_TIME, SMALL, Report, arguments, ceilings, in_short
from benchmarks.gpu.shapes import MODELS
from benchmarks.sampling import Contender
from benchmarks.sampling_contenders import Case
from r1fast.model.decoder import DecoderConfig

SEQUENCES, GROUP = (8, 4) if SMALL else (512, 16)
CONTEXTS = (48, 96) if SMALL else (1024, 2048)
SHORT, LONG = (2, 10) if SMALL else (32, 160)  # tokens drawn by the two calls
# Its prompts are not shared when they come together, and half a million of their tokens take many seconds.
THEIR_CONTEXTS = CONTEXTS[:1]


class Sampling:
    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.deadline = folder, time.monotonic() + seconds
        self.report = Report("sampling", folder)
        self.card = roofline.Card(**ceilings(folder))

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def contender(self, name: str, model: str) -> Contender:
        checkpoint = wait_for(self.folder, model, min(60, max(1, self.left)))
        return Contender(name, checkpoint, DEVICE, "float32" if SMALL else "bfloat16")

    def rate(self, who: Contender, context: int, warm: bool) -> dict:
        """Tokens/s of decoding with contexts that average `context`. warm: each call is made before it is timed, with
        the same sampler, so that what is captured once in a run is not in it."""
        prompt = context - (SHORT + LONG) // 2
        spent, peak = [], None
        for new in (SHORT, LONG):
            case = Case(prompt, GROUP, SEQUENCES, new)
            if warm:
                who.sample(case)
            answer = who.sample(case)
            spent.append(answer["seconds"])
            peak = answer.get("MiB", peak)
        if spent[1] <= spent[0]:
            raise RuntimeError(f"{LONG} tokens took {spent[1]:.3f} s, {SHORT} took {spent[0]:.3f}: too noisy to tell")
        decoding = SEQUENCES * (LONG - SHORT) / (spent[1] - spent[0])
        return {"prompt": prompt, "tokens/s": round(decoding), "MiB": peak}

    def ours(self, name: str, config: DecoderConfig) -> None:
        who = self.contender("r1fast", name)
        try:
            for context in CONTEXTS:
                what = f"{name}, context {context}"
                self.attempt(f"{what} by r1fast", partial(self.our_context, who, what, config, context))
        finally:
            who.close()

    def our_context(self, who: Contender, what: str, config: DecoderConfig, context: int) -> None:
        found = self.rate(who, context, warm=True)
        own, item = (SHORT + LONG) / 2, 4 if SMALL else 2
        shared = roofline.decode_step(config, self.card, SEQUENCES, own, found["prompt"], GROUP, itemsize=item)
        unshared = roofline.decode_step(config, self.card, SEQUENCES, context, itemsize=item)
        limit, fractions = SEQUENCES / shared, [found["tokens/s"] * x / SEQUENCES for x in (shared, unshared)]
        more = {"fraction": round(fractions[0], 4), "fraction unshared": round(fractions[1], 4)}
        more["target"] = targets.SAMPLING_FRACTION
        self.report.add(what=what, by="r1fast", **found, roofline=round(limit), **more)

    def theirs(self, name: str) -> None:
        who = self.contender("continuous batching", name)
        try:
            for context in THEIR_CONTEXTS:
                found = self.rate(who, context, warm=False)
                self.report.add(what=f"{name}, context {context}", by="continuous batching", **found)
        finally:
            who.close()

    def run(self) -> None:
        for name, config in MODELS.items():
            self.attempt(f"{name} by r1fast", partial(self.ours, name, config))
        for name in MODELS:
            self.attempt(f"{name} by continuous batching", partial(self.theirs, name))

    def attempt(self, what: str, measure) -> None:
        if self.left < 1:
            self.report.skip(what, NO_TIME)
            return
        try:
            measure()
        except Exception as error:  # one contender's failure is a row, and the next one is measured
            self.report.skip(what, in_short(error))


def main() -> int:
    options = arguments("sampling", __doc__).parse_args()
    Sampling(options.folder, options.seconds).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
