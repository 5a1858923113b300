"""`python -m benchmarks.kernels_vs_peers`: the GRPO loss behind the head and the draw of a token beside what others do.

Contenders take turns, so that a change of the machine's mood meets all of them; a ratio is the median of the ratios of
the turns, with the lowest and highest. Memory is the highest resident size above what was there, each contender in a
process of its own with one call behind it (the peak of a kernel that is called again and again). Peers that are not
installed are named with the command that would install them. The last line of the loss is no contender: the three
matrix products that every loss needs, by torch.mm; what a peer takes over that is the most that can be saved of it
with products of that rate.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks import draws

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROWS, WIDTH, LOW, HIGH, KL = 4096, 512, 0.2, 0.2, 0.04
PRODUCTS = "three products alone"
NAMES = ("r1fast", "plain torch", "torch.compile", "TRL", "Liger", PRODUCTS)
PACKAGES = {"TRL": "trl", "Liger": "liger-kernel"}


def inputs(vocabulary: int) -> tuple:
    """(hidden, weight, targets, old_logp, ref_logp, advantages, weights): logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(vocabulary, WIDTH, generator=generator)
    targets = torch.randint(0, vocabulary, (ROWS,), generator=generator)
    weight *= 2 / WIDTH**0.5
    with torch.no_grad():
        logp = torch.cat([plain_logp(h, weight, t) for h, t in zip(hidden.split(256), targets.split(256), strict=True)])
    old, ref, advantages = torch.randn(3, ROWS, generator=generator)
    streams = (targets, logp + 0.1 * old, logp + 0.1 * ref, advantages, torch.full((ROWS,), 1 / ROWS))
    return hidden.requires_grad_(), weight.requires_grad_(), *streams


def plain_logp(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])[:, 0]


def policy(logp, old, ref, advantages, weights):
    ratio = torch.exp(logp - old)
    clipped = ratio.clamp(1 - LOW, 1 + HIGH)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    return (weights * (-torch.minimum(ratio * advantages, clipped * advantages) + KL * kl)).sum()


def plain(hidden, weight, targets, *streams):
    return policy(plain_logp(hidden, weight, targets), *streams)


class ThreeProducts(torch.autograd.Function):
    """What no loss behind a head can do without, by torch.mm: the logits, and the products for both gradients. Not a
    loss: in place of the slope stand the logits themselves."""

    @staticmethod
    def forward(ctx, hidden, weight):
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0]

    @staticmethod
    def backward(ctx, _):
        hidden, weight, slope = ctx.saved_tensors
        return slope @ weight, slope.T @ hidden


def ours(*arguments):
    from r1fast_kernels import linear_grpo_loss

    return linear_grpo_loss(*arguments, clip_low=LOW, clip_high=HIGH, kl_coef=KL)[0]


def contender(name: str):
    """The loss as `name` computes it. ImportError or RuntimeError where it cannot."""
    if name == "r1fast":
        return ours
    if name == "plain torch":
        return plain
    if name == "torch.compile":
        return torch.compile(plain, dynamic=False)
    if name == PRODUCTS:
        return lambda hidden, weight, *_: ThreeProducts.apply(hidden, weight)
    if name == "TRL":  # what GRPOTrainer's model calls: trl.trainer.utils.add_fused_lm_head, with entropy
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size
        from trl.trainer.utils import _ChunkedLogProbFunction as function

        def trl(hidden, weight, targets, *streams):
            outputs = ("log_probs", "entropy")
            return policy(function.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, outputs)[0], *streams)

        return trl
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # 16 sequences of 256; chunks of 2 are its best here. Uncompiled: what it does where Triton has no device.
    head = LigerFusedLinearGRPOLoss(KL, False, True, 2, LOW, HIGH, "bnpo")

    def liger(hidden, weight, targets, old, ref, advantages, weights):
        shape = (16, ROWS // 16)
        hidden, targets, old, ref = hidden.view(*shape, WIDTH), *(x.view(shape) for x in (targets, old, ref))
        per_sequence = advantages.view(shape)[:, 0].contiguous()  # it has one advantage a sequence
        mask = torch.ones(shape)
        return head(hidden, weight, targets, mask, per_sequence, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return liger


def step(run, arguments) -> float:
    """Seconds of a loss and its two gradients."""
    start = time.perf_counter()
    torch.autograd.grad(run(*arguments), arguments[:2])
    return time.perf_counter() - start


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(name: str, vocabulary: int) -> float:
    """MiB above what is resident before a call, looked at every millisecond, gradients included."""
    arguments, run = inputs(vocabulary), contender(name)
    if name == "torch.compile":
        step(run, arguments)  # what the compiler itself takes is not the loss's
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the inputs' making left would be used again, unseen
    before, found, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            found[0] = max(found[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(run, arguments)
    done.set()
    watcher.join()
    return (max(found[0], before) - before) / 2**20


def peak_elsewhere(name: str, vocabulary: int) -> int | None:
    """MiB, or None where the process does not survive: torch.compile's sometimes aborts, which costs a number only."""
    command = [sys.executable, "-m", "benchmarks.kernels_vs_peers", "--peak", name, str(vocabulary)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return round(float(child.stdout.split()[-1])) if child.returncode == 0 else None


def measure(vocabulary: int, turns: int, runs: dict) -> list[dict]:
    """One row a contender, ours first; the losses are compared on the way (Liger's has other advantages)."""
    arguments = inputs(vocabulary)
    losses = {name: run(*arguments).item() for name, run in runs.items()}
    for name, loss in losses.items():
        same = abs(loss - losses["r1fast"]) < 1e-5
        assert same or name in ("Liger", PRODUCTS), f"{name}: {loss}, not {losses['r1fast']}"
    seconds = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            spent = step(run, arguments)
            if turn:
                seconds[name].append(spent)
    rows = []
    for name, spent in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(spent, seconds["r1fast"], strict=True)]
        rows.append({"vocabulary": vocabulary, "name": name, "seconds": round(median(spent), 4)})
        rows[-1] |= {"ratio": [round(f(ratios), 2) for f in (median, min, max)]}
        rows[-1]["MiB"] = peak_elsewhere(name, vocabulary)
    return rows


def processor() -> str:
    try:
        found = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        return f"{found['model name']} family {found['cpu family']}"
    except (OSError, KeyError):
        return platform.machine()


def slug(name: str) -> str:
    """A processor's or a card's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(results: dict) -> str:
    lines = ["| words | loss and gradients by | s | times r1fast (lowest–highest) | extra peak MiB |"]
    lines.append("|---|---|---:|---:|---:|")
    for row in results["rows"]:
        middle, low, high = row["ratio"]
        memory = "–" if row["MiB"] is None else row["MiB"]
        ratio = "1" if row["name"] == "r1fast" else f"{middle:.2f} ({low:.2f}–{high:.2f})"
        lines.append(f"| {row['vocabulary']} | {row['name']} | {row['seconds']:.2f} | {ratio} | {memory} |")
    where = results["machine"]
    peers = ", ".join(f"{name} {number}" for name, number in where["peers"].items())
    text = f"{results['rows_of_each']} rows x {results['width']}, float32, KL on; {where['processor']}, "
    text += f"{where['threads']} threads, torch {where['torch']}{', ' * bool(peers)}{peers}; {results['turns']} turns."
    parts = ["\n".join(lines), text]
    if results.get("draws"):
        parts.append(f"A token of every row and its log-probability, same machine, {where['threads']} threads:")
        parts.append(draws.table(results["draws"]))
    return "\n\n".join(parts)


def available() -> tuple[dict, dict]:
    """(contenders, versions of the peers); says what is missing, and how to have it."""
    runs, versions = {}, {}
    for name in NAMES:
        try:
            run = contender(name)
            step(run, tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs(64)))
            runs[name] = run
            if name in PACKAGES:
                versions[name] = version(PACKAGES[name])
        except (ImportError, PackageNotFoundError):
            print(f"{name} is not installed; pip install 'r1fast[peers]' adds it to the table")
        except Exception as error:  # a compiler that is not there is torch's to name
            print(f"{name} cannot run here: {str(error).splitlines()[0]}")
    return runs, versions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_vs_peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak[0], int(options.peak[1])), flush=True)
        os._exit(0)  # torch's compile workers may abort a process that ends otherwise
    runs, versions = available()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = RESULTS / f"{slug(machine['processor'])}-{commit[:10] or 'no-commit'}-kernels_vs_peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": {**machine, "commit": commit, "peers": versions}, "rows_of_each": ROWS, "width": WIDTH}
    results |= {"turns": options.turns, "rows": []}
    for words in options.vocabulary:  # written as it grows: the large ones take minutes
        results["rows"] += measure(words, options.turns, runs)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results["draws"] = draws.measure(options.turns)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{table(results)}\n\nwritten to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
