"""Each op beside its floor, its target and its peers: time, fraction of the floor, memory.

The floor is the larger of bytes over the copy bandwidth and FLOPs over the product rate that this card reached in the
part `ceilings`. `automatic` marks the backend that the op chooses by itself.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import targets
from benchmarks.gpu.measure import DEVICE, NO_TIME, Report, arguments, ceilings, in_short, peak_mib, seconds
from benchmarks.gpu.runs import run_of, usable, with_leaves
from benchmarks.gpu.shapes import MODELS, SIZES, random_model
from benchmarks.gpu.works import Work, Works
from r1fast.learn.masters import Masters
from r1fast.learn.optimizer import build_optimizer
from r1fast.schema import OptimizerConfig
from r1fast_kernels import load_ops


class Measuring:
    """One work after another into the report."""

    def __init__(self, report: Report, folder: Path) -> None:
        self.report, self.rates = report, ceilings(folder)

    def floor(self, moved: float, flops: float) -> tuple[float, str]:
        """(seconds, what bounds it)."""
        return max((moved / self.rates["copy"], "bytes"), (flops / self.rates["product"], "FLOPs"))

    def row(self, what: str, by: str, run, floor: tuple[float, str], **more) -> dict:
        spent = seconds(run)
        least, bound = floor
        return {
            "what": what, "by": by, "microseconds": round(spent * 1e6, 2), "floor": round(least * 1e6, 2),
            "bound": bound, "fraction": round(least / spent, 4), "MiB": peak_mib(run), **more,
        }  # fmt: skip

    def judge(self, rows: list[dict], theirs: dict[str, float]) -> None:
        for row in rows:
            said = [(str(target), target.met(row, theirs)) for target in targets.of(row["what"])]
            verdicts = [{"target": text, "met": met} for text, met in said if met is not None]
            self.report.add(**row, targets=verdicts)

    def measure(self, work: Work) -> None:
        op, args = load_ops()[work.op], work.args()
        floor, theirs, rows = self.floor(work.moved, work.flops), {}, []
        if work.backward:
            args, _ = with_leaves(op, args)
        for name, peer in work.peers.items():
            try:
                row = self.row(work.what, name, peer(args), floor, peer=True)
            except Exception as error:  # whatever is wrong with a peer, ours are still measured
                self.report.skip(f"{work.what} by {name}", in_short(error))
                continue
            theirs[name] = row["microseconds"]
            self.report.add(**row)
        for position, name in enumerate(usable(op, args, bool(work.backward))):
            try:
                with torch.set_grad_enabled(bool(work.backward)):
                    run = run_of(op, args, name, work.backward)
                    rows.append(self.row(work.what, name, run, floor, automatic=not position))
            except Exception as error:
                self.report.skip(f"{work.what} by {name}", in_short(error))
        self.judge(rows, theirs)

    def optimizer(self) -> None:
        """AdamW over float32 masters of half weights, the weights written; 28 bytes a parameter."""
        name = list(MODELS)[-1]
        model = random_model(SIZES.config).requires_grad_(True)
        masters, count = Masters(list(model.parameters())), sum(p.numel() for p in model.parameters())
        for p in masters.parameters:
            p.grad = torch.randn_like(p)
        rows, theirs = [], {}
        for implementation in ("torch", "apex"):
            config = OptimizerConfig(implementation=implementation)
            what = f"AdamW {name}"
            try:
                optimizer = build_optimizer(masters.parameters, config)
            except Exception as error:
                self.report.skip(f"{what} by {implementation}", in_short(error))
                continue

            def run(optimizer=optimizer):
                optimizer.step()
                masters.publish()

            automatic = implementation == "torch"
            rows.append(self.row(what, implementation, run, self.floor(28 * count, 0), automatic=automatic))
        self.judge(rows, theirs)


def main() -> int:
    parser = arguments("ops", __doc__)
    parser.add_argument("--only", nargs="+", default=[], help="works whose name begins so")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    measuring = Measuring(Report("ops", options.folder), options.folder)
    for work in Works():
        if options.only and not work.what.startswith(tuple(options.only)):
            continue
        if time.monotonic() > deadline:
            measuring.report.skip(work.what, NO_TIME)
            continue
        measuring.measure(work)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    if not options.only or any("AdamW".startswith(only) for only in options.only):
        measuring.optimizer()
    return 0


if __name__ == "__main__":
    sys.exit(main())
