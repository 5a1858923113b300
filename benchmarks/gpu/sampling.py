"""Sampling 512 sequences, 16 of each prompt, around contexts of 1k and 2k tokens: tokens/s beside the roofline and
transformers' continuous batching.

The rate of decoding is that of the tokens by which a longer call exceeds a shorter one, so neither the prompts nor what
a call costs at its beginning are in it. Its roofline (benchmarks/gpu/roofline.py) reads a group's prompt once, or, in
`fraction unshared`, once for every sequence.
"""

from __future__ import annotations

import sys
import time
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

    def rate(self, who: Contender, context: int) -> dict:
        """Tokens/s of decoding with contexts that average `context`, and of the longer call as a whole."""
        prompt = context - (SHORT + LONG) // 2
        spent, peak = [], None
        for new in (SHORT, LONG):
            answer = who.sample(Case(prompt, GROUP, SEQUENCES, new), forget=True)
            spent.append(answer["seconds"])
            peak = answer.get("MiB", peak)
        if spent[1] <= spent[0]:
            raise RuntimeError(f"{LONG} tokens took {spent[1]:.3f} s, {SHORT} took {spent[0]:.3f}: too noisy to tell")
        decoding = SEQUENCES * (LONG - SHORT) / (spent[1] - spent[0])
        whole = SEQUENCES * LONG / spent[1]
        return {"prompt": prompt, "tokens/s": round(decoding), "whole call": round(whole), "MiB": peak}

    def ours(self, name: str, config: DecoderConfig) -> None:
        who = self.contender("r1fast", name)
        try:
            warm = CONTEXTS[0] - (SHORT + LONG) // 2
            who.sample(Case(warm, GROUP, SEQUENCES, SHORT))  # compiles and captures
            for context in CONTEXTS:
                found = self.rate(who, context)
                own = (SHORT + LONG) / 2
                item = 4 if SMALL else 2
                floor = {
                    "shared": roofline.decode_step(
                        config, self.card, SEQUENCES, own, found["prompt"], GROUP, itemsize=item
                    ),
                    "unshared": roofline.decode_step(config, self.card, SEQUENCES, context, itemsize=item),
                }
                limit = {how: SEQUENCES / seconds for how, seconds in floor.items()}
                fraction = {how: round(found["tokens/s"] / rate, 4) for how, rate in limit.items()}
                self.report.add(
                    what=f"{name}, context {context}", by="r1fast", **found,
                    **{"roofline": round(limit["shared"]), "fraction": fraction["shared"],
                       "fraction unshared": fraction["unshared"], "target": targets.SAMPLING_FRACTION},
                )  # fmt: skip
        finally:
            who.close()

    def theirs(self, name: str) -> None:
        who = self.contender("continuous batching", name)
        try:
            for context in THEIR_CONTEXTS:
                self.report.add(what=f"{name}, context {context}", by="continuous batching", **self.rate(who, context))
        finally:
            who.close()

    def run(self) -> None:
        for name, config in MODELS.items():
            self.attempt(f"{name} by r1fast", lambda name=name, config=config: self.ours(name, config))
        for name in MODELS:
            self.attempt(f"{name} by continuous batching", lambda name=name: self.theirs(name))

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
