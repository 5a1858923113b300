"""`python -m benchmarks.sampling`: our sampler beside transformers' generate and its continuous batching.

Same weights, same prompts, every sequence its full length; contenders are processes that stay up and take turns, so
that a change of the machine's mood meets all of them. A ratio is the median of the ratios of the turns, with the lowest
and highest. Before anything is timed, all must draw the same greedy tokens.

The limit is the machine's own, measured first: a prefill at the rate of a large product; decode steps at that rate, or
at the rate at which memory as large as the weights is read, whichever is slower (weights once a step, every distinct
key and value once). A fraction of 0.5 is half as fast as that.

The whole matrix takes hours on two cores; `--models`, `--prompts`, `--groups`, `--batches` choose, and the default is
what the targets speak of. The file is written as it grows, and a call goes on where the last one of the same commit
stopped. `--curves` adds the rate of decoding against context and batch, which docs/sampling.md draws.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from benchmarks.sampling_contenders import NAMES, Case
from r1fast.model.decoder import Decoder
from r1fast.model.decoder_config import DecoderConfig
from r1fast.model.weights import save

SIZES = {
    "3M": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate_size": 640},
    "30M": {"hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64, "intermediate_size": 1536},
}
WORDS = {"3M": 512, "30M": 8192}
NEW = {"3M": 128, "30M": 64}  # tokens that each sequence draws
# (prompt, group, batch) of the targets: one sequence; 64 of short prompts; 16 samples of each long prompt
TARGETS = ((32, 1, 1), (32, 8, 64), (512, 16, 64))
CONTEXTS, BATCHES = (64, 256, 1024, 2048), (1, 8, 64, 256)
CURVE_STEPS, CURVE_TOKENS = 16, 1 << 17  # steps that a point of a curve times; prompt tokens it may prefill


def config(size: str) -> DecoderConfig:
    return DecoderConfig(vocab_size=WORDS[size], max_positions=4096, tie_embeddings=True, **SIZES[size])


def make_checkpoint(size: str, folder: Path) -> None:
    """Random weights whose logits have a standard deviation of about 1.5."""
    model = Decoder(config(size)).initialize(0)
    with torch.no_grad():
        model.embedding *= 1.5
    save(model, None, folder)


# -- the machine's limit -------------------------------------------------------------------------------------------


def best(run, times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def rates() -> dict[str, float]:
    """FLOP/s of a large product, and bytes/s at which a matrix of each size's weights is read."""
    square = torch.randn(2048, 2048)
    found = {"product": 2 * 2048**3 / best(lambda: square @ square, 5)}
    for size in SIZES:
        matrix, vector = torch.randn(weights(config(size)) // 1024, 1024), torch.randn(1024)
        found[size] = 4 * matrix.numel() / min(best(matrix.sum, 9), best(lambda m=matrix, v=vector: m @ v, 9))
    return found


def weights(c: DecoderConfig) -> int:
    """Numbers that one token's products read: layers and head."""
    layer = c.hidden_size * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.intermediate_size)
    return c.layers * layer + c.vocab_size * c.hidden_size


def limit(size: str, case: Case, rate: dict[str, float]) -> float:
    """Seconds that the machine needs at least, see the module."""
    c = config(size)
    body, head = weights(c) - c.vocab_size * c.hidden_size, c.vocab_size * c.hidden_size
    pair, token = 4 * c.layers * c.heads * c.head_dim, 8 * c.layers * c.kv_heads * c.head_dim  # FLOPs, bytes
    prefill = case.prompts * (2 * body * case.prompt + 2 * head + pair * case.prompt**2 / 2)
    steps, seen = case.new - 1, case.prompt + case.new / 2  # the prefill draws the first; mean context
    flops = steps * case.batch * (2 * (body + head) + pair * seen)
    read = steps * (4 * (body + head) + token * (case.prompts * case.prompt + case.batch * case.new / 2))
    return prefill / rate["product"] + max(flops / rate["product"], read / rate[size])


# -- contenders ------------------------------------------------------------------------------------------------------


class Contender:
    """A process of benchmarks.sampling_contenders."""

    def __init__(self, name: str, folder: Path, *place: str):
        """place: device and dtype, float32 on the CPU where none is given."""
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it lives as long as the process)
        command = [sys.executable, "-m", "benchmarks.sampling_contenders", name, str(folder), *place]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} ended: {self.errors.read()[-2000:]}")

    def sample(self, case: Case, **how: bool) -> dict:
        """Its answer for one case: seconds, MiB. RuntimeError where it did not draw what was asked."""
        self.process.stdin.write(json.dumps({**asdict(case), **how}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def agree(contenders: list[Contender]) -> None:
    """All draw the same greedy tokens. RuntimeError: whoever differs computes something else, and is not timed."""
    found = {who.name: who.sample(Case(24, 2, 4, 12), greedy=True, tokens=True)["tokens"] for who in contenders}
    for name, tokens in found.items():
        if tokens != found[contenders[0].name]:
            raise RuntimeError(f"{name} draws other greedy tokens than {contenders[0].name}")


def measure(contenders: list[Contender], size: str, case: Case, turns: int, patience: float, rate: dict) -> dict:
    """One row; a contender whose turn takes longer than `patience` seconds gets no second one."""
    seconds, memory = {who.name: [] for who in contenders}, {}
    for who in contenders:
        who.sample(Case(case.prompt, case.group, case.batch, 2), forget=True)  # threads, caches, lazy imports
    for turn in range(turns):
        for who in contenders:
            if turn and max(seconds[who.name]) > patience:
                continue
            answer = who.sample(case)
            seconds[who.name].append(answer["seconds"])
            memory[who.name] = answer.get("MiB")
    row = {"model": size, **asdict(case), "limit_s": round(limit(size, case, rate), 4), "by": {}}
    mine = seconds[contenders[0].name]
    for name, spent in seconds.items():
        ratios = [a / b for a, b in zip(spent, mine, strict=False)]
        row["by"][name] = {
            "tokens_per_s": round(case.batch * case.new / median(spent), 1),
            "times_ours": [round(f(ratios), 2) for f in (median, min, max)],
            "MiB": memory[name] and round(memory[name]),
            "turns": len(spent),
        }
    return row


def curve(who: Contender, size: str) -> list[dict]:
    """Tokens/s of decoding alone against context and batch, for one prompt shared by all and for one each."""
    points = []
    for shared, context, batch in product((True, False), CONTEXTS, BATCHES):
        if (shared and batch == 1) or (not shared and context * batch > CURVE_TOKENS):
            continue
        spent = {}
        for new in (1, 1 + CURVE_STEPS):
            case = Case(context, batch if shared else 1, batch, new)
            who.sample(case, forget=True)
            spent[new] = min(who.sample(case)["seconds"] for _ in range(3))
        step = (spent[1 + CURVE_STEPS] - spent[1]) / CURVE_STEPS
        points.append({"model": size, "shared": shared, "context": context, "batch": batch})
        points[-1]["tokens_per_s"] = round(batch / step, 1)
        print(points[-1], flush=True)
    return points


# -- the file, the table -----------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """One line a case: ours, then each peer's rate and how many times as long it took."""
    peers = [name for name in NAMES[1:] if any(name in row["by"] for row in results["rows"])]
    heads = ["model", "prompt", "samples of each", "sequences", "r1fast tokens/s", "of the limit", "MiB", *peers]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in results["rows"]:
        ours = row["by"]["r1fast"]
        seconds = row["batch"] * row["new"] / ours["tokens_per_s"]
        cells = [row["model"], row["prompt"], row["group"], row["batch"], f"{ours['tokens_per_s']:,.0f}"]
        cells += [f"{row['limit_s'] / seconds:.0%}", ours["MiB"]]
        for name in peers:
            cells.append(cell(row["by"].get(name)))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    where, rate = results["machine"], results["rates"]
    lengths = ", ".join(f"{size}: {tokens}" for size, tokens in results["new"].items())
    reads = ", ".join(f"{rate[size] / 1e9:.0f} GB/s over the weights of {size}" for size in SIZES)
    text = (
        f"float32; every sequence draws its full length ({lengths} tokens); {where['processor']}, {where['threads']} "
        f"threads, torch {where['torch']}, transformers {where['transformers']}, at {where['commit'][:10]}. In "
        "brackets: times as long as ours (lowest–highest), and peak MiB above the loaded model, as ours are. Limits: "
        f"{rate['product'] / 1e9:.0f} GFLOP/s of a large product; {reads}."
    )
    return "\n".join([*lines, "", text])


def cell(found: dict | None) -> str:
    if found is None:
        return "–"
    middle, low, high = found["times_ours"]
    spread = f" ({low:.2f}–{high:.2f})" if found["turns"] > 1 else ""
    return f"{found['tokens_per_s']:,.0f} [**{middle:.2f}x**{spread}, {found['MiB']} MiB]"


def picture(results: dict, path: Path) -> None:
    """Tokens/s of decoding against context, a line a batch; on the left one prompt for all, on the right one each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [size for size in SIZES if any(point["model"] == size for point in results["curves"])]
    figure, axes = plt.subplots(len(sizes), 2, figsize=(9, 3.2 * len(sizes)), sharex=True, sharey="row", squeeze=False)
    for (row, size), (column, shared) in product(enumerate(sizes), enumerate((True, False))):
        axis = axes[row][column]
        for color, batch in enumerate(BATCHES):  # the same on both sides, though the left has no line of one sequence
            points = [p for p in results["curves"] if (p["model"], p["shared"], p["batch"]) == (size, shared, batch)]
            if points:
                line = ([p["context"] for p in points], [p["tokens_per_s"] for p in points])
                axis.loglog(*line, marker="o", label=f"{batch} sequences", color=f"C{color}", base=2)
        axis.set_yscale("log", base=10)
        axis.set_title(f"{size}: {'one prompt for all' if shared else 'a prompt each'}")
        axis.set_xlabel("context, tokens")
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("tokens/s")
    axes[0][1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def results_file(again: bool) -> tuple[Path, dict]:
    """Where this commit's results on this machine go, and what is there already."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = RESULTS / f"{slug(machine['processor'])}-{commit[:10] or 'no-commit'}-sampling.json"
    if path.exists() and not again:
        return path, json.loads(path.read_text(encoding="utf-8"))
    machine |= {"transformers": version("transformers"), "commit": commit}
    return path, {"machine": machine, "new": NEW, "rates": rates(), "rows": [], "curves": []}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cases(options: argparse.Namespace, size: str) -> list[Case]:
    chosen = (options.prompts, options.groups, options.batches)
    if not any(chosen) and not options.full:
        shapes = TARGETS
    else:
        defaults = ((32, 512), (1, 8, 16), BATCHES)
        shapes = product(*(a or b for a, b in zip(chosen, defaults, strict=True)))
    return [Case(*shape, options.new or NEW[size]) for shape in shapes if shape[2] % shape[1] == 0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of a prompt")
    parser.add_argument("--groups", type=int, nargs="+", help="samples of each prompt")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences in all")
    parser.add_argument("--new", type=int, help=f"tokens that each sequence draws; default {NEW}")
    parser.add_argument("--by", nargs="+", choices=NAMES, default=list(NAMES), help="who takes part, beside r1fast")
    parser.add_argument("--full", action="store_true", help="the whole matrix: hours")
    parser.add_argument("--curves", action="store_true", help="also the rate of decoding by context and batch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds; a longer turn is the only one")
    parser.add_argument("--again", action="store_true", help="measure anew what this commit's file has")
    options = parser.parse_args()
    path, results = results_file(options.again)
    for size in options.models:
        held = {tuple(row[k] for k in ("model", "prompt", "group", "batch", "new")) for row in results["rows"]}
        todo = [case for case in cases(options, size) if (size, *asdict(case).values()) not in held]
        draw = options.curves and not any(point["model"] == size for point in results["curves"])
        if not todo and not draw:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(size, Path(folder) / size)
            names = [name for name in NAMES if name in ("r1fast", *options.by)] if todo else ["r1fast"]
            contenders = [Contender(name, Path(folder) / size) for name in names]
            agree(contenders)
            for case in todo:
                row = measure(contenders, size, case, options.turns, options.patience, results["rates"])
                results["rows"].append(row)
                write(path, results)
                print(json.dumps(row), flush=True)
            if draw:
                results["curves"] += curve(contenders[0], size)
                write(path, results)
            for who in contenders:
                who.close()
    print(f"{table(results)}\n\nwritten to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
