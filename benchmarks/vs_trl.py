"""`python -m benchmarks.vs_trl`: a whole GRPO step beside TRL's on this machine, by phase.

Both sides are processes that stay up and take a step in turns, so that a change of the machine's mood meets both; a
ratio is the median of the ratios of the pairs, with the lowest and highest. Pairs during which other processes took
more than a tenth of a core are measured again: two threads that wait for each other slow down tenfold then. TRL runs
with the settings that were the fastest here: `--search` tries its micro-batches, with the C library's malloc as it is
and told to keep its memory, and the file remembers what was tried.

It says first how long it will take. The file is written after every pair and setting, beside what it holds of other
cases, and measuring goes on where it stops: a call that is cut short loses one pair. `--case` asks for some cases by
name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.kernels_vs_peers import RESULTS, ROOT, processor, slug
from benchmarks.whole_step import CONTENDERS, Shape, ask, make_checkpoint

SIZES = {
    "3M": Shape(),
    "30M": Shape(hidden=512, layers=8, heads=8, kv_heads=4, inner=1536, vocabulary=8192),
}
WORKS = {"8 x 8": {}, "4 x 16 long": {"prompts": 4, "group": 16, "prompt": (512, 512)}}
OTHERS = 0.1  # cores busy with something else during a step, above which its pair is measured again
PHASES = ("sample", "score", "logprob", "learn", "other")
KEEP = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}
TRIED = [{"micro_batch": size, "malloc": malloc} for malloc in ("keep", "default") for size in (8, 16, 32, 64)]


STARTS = 12.0  # seconds until a contender has imported, loaded and is ready
# Of the machine's rate, on the operations that each side computes (TRL forwards a prompt for every sample); what is
# told beforehand of a case that was never measured, and nothing else, hangs on them. TRL's are its steps at 3M.
EXPECTED = {"r1fast": 0.5, "TRL": 0.28}


def cases() -> dict[str, Shape]:
    """All that can be measured, by name."""
    return {
        f"{size}, {work}, KL {'on' if kl else 'off'}": replace(shape, **more, kl=kl)
        for size, shape in SIZES.items()
        for work, more in WORKS.items()
        for kl in (True, False)
    }


class Contender:
    """A process of benchmarks.whole_step that steps when told to."""

    def __init__(self, who: str, shape: Shape, checkpoint: Path, settings: dict, malloc: str = "default") -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **(KEEP if malloc == "keep" else {})}
        self.who, self.errors = who, tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.whole_step"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self._send(ask(who, shape, checkpoint, settings))
        self._read()

    def _send(self, line: str) -> None:
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode()[-2000:]
            raise RuntimeError(f"{self.who} ended with exit code {code} before it was done:\n{said}")
        return json.loads(line)

    def step(self) -> dict:
        """What the process told of its step, and `others`: cores that were busy with something else meanwhile."""
        before, start = self._ticks(), time.perf_counter()
        self._send("step\n")
        found = self._read()
        busy, own = (after - earlier for after, earlier in zip(self._ticks(), before, strict=True))
        ticks = os.sysconf("SC_CLK_TCK") * (time.perf_counter() - start)
        return found | {"others": round(max(0.0, busy - own) / ticks, 3)}

    def _ticks(self) -> tuple[int, int]:
        """CPU time so far, of the machine (the hypervisor's share with it) and of this process; zeros elsewhere."""
        if sys.platform != "linux":
            return 0, 0
        user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        mine = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return user + nice + system + irq + soft + steal, int(mine[11]) + int(mine[12])

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


def peak_rate(size: int = 2048) -> float:
    """FLOP/s of torch's float32 product, the best of several."""
    a, b = torch.randn(2, size, size)
    out, best = torch.empty(size, size), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed (the tables are made without peers, too)."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Results:
    """The machine's file, written after every step that was measured."""

    def __init__(self) -> None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.commit = commit.stdout.strip() or "no commit"
        self.path = RESULTS / f"{slug(processor())}-vs_trl.json"
        self.data = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        self.data["machine"] = machine | {name: installed(name) for name in ("trl", "transformers")}
        self.data.setdefault("tried", {})
        self.data.setdefault("cases", {})

    def best(self, case: str) -> dict:
        tried = self.data["tried"].get(case)
        return min(tried, key=lambda row: row["seconds"])["settings"] if tried else TRIED[0]

    def case(self, name: str, trl: dict, ours: dict) -> dict:
        """The case's entry; a new one where it was measured at another commit or with other settings."""
        entry, told = self.data["cases"].get(name), self._told(trl, ours)
        if entry is None or any(entry[key] != value for key, value in told.items()):
            entry = self.data["cases"][name] = {**told, "peak_flops": peak_rate(), "pairs": []}
        return entry

    def _told(self, trl: dict, ours: dict) -> dict:
        return {"commit": self.commit, "trl": trl, "ours": ours}

    def there(self, name: str, ours: dict) -> list[dict]:
        """The pairs that are there already, of this commit and these settings."""
        entry, told = self.data["cases"].get(name), self._told(self.best(name), ours)
        return entry["pairs"] if entry and all(entry[key] == value for key, value in told.items()) else []

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def start(who: str, shape: Shape, checkpoint: Path, settings: dict) -> Contender:
    settings = dict(settings)
    malloc = settings.pop("malloc", "default")
    return Contender(who, shape, checkpoint, settings, malloc)


class Clock:
    """How long all that was asked for will take, and how far it is."""

    def __init__(self, results: Results, pairs: int, minutes: float) -> None:
        self.results, self.pairs = results, pairs
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.expected = 0.0
        self._rate: float | None = None

    def step(self, name: str, shape: Shape, who: str) -> float:
        """Seconds that a step is expected to take: as measured, at whatever commit, or from its operations."""
        entry = self.results.data["cases"].get(name)
        if entry and entry["pairs"]:
            return median(pair[who]["seconds"] for pair in entry["pairs"])
        if self._rate is None:  # the best of earlier: the machine may be busy now
            told = [entry["peak_flops"] for entry in self.results.data["cases"].values()]
            self._rate = max(told, default=0.0) or peak_rate()
        return sum(shape.flops(who == "r1fast").values()) / self._rate / EXPECTED[who]

    def search(self, name: str, shape: Shape) -> float:
        """Seconds that `search` will take."""
        tried = len(self.results.data["tried"].get(name, []))
        return (len(TRIED) - tried) * (STARTS + 2 * self.step(name, shape, "TRL"))

    def measure(self, name: str, shape: Shape, ours: dict) -> float:
        """Seconds that `measure` will take."""
        left = self.pairs - len(self.results.there(name, ours))
        each = sum(self.step(name, shape, who) for who in CONTENDERS)
        return 2 * STARTS + (left + 1) * each if left > 0 else 0.0

    def over(self, next_step: float = 0.0) -> bool:
        return time.monotonic() + next_step > self.deadline

    def say(self, text: str) -> None:
        passed = (time.monotonic() - self.began) / 60
        print(f"[{passed:.1f} of about {self.expected / 60:.1f} min] {text}", flush=True)


def search(results: Results, name: str, shape: Shape, checkpoint: Path, clock: Clock) -> None:
    """TRL's seconds with each of its settings, of the first undisturbed step after one to warm up."""
    tried = results.data["tried"].setdefault(name, [])
    for settings in TRIED:
        if any(row["settings"] == settings for row in tried) or clock.over():
            continue
        with start("TRL", shape, checkpoint, settings) as trl:
            trl.step()
            for _ in range(3):
                step = trl.step()
                if step["others"] <= OTHERS:
                    break
        if step["others"] <= OTHERS:
            tried.append({"settings": settings, "seconds": round(step["seconds"], 3)})
            results.write()
        clock.say(f"{name}: TRL {settings}: {step['seconds']:.2f} s, others {step['others']:.2f}")


def measure(results: Results, name: str, shape: Shape, checkpoint: Path, ours: dict, clock: Clock) -> None:
    """Pairs of steps, ours and TRL's in turns, until there are enough."""
    entry = results.case(name, results.best(name), ours)
    entry["flops"] = {"shared": shape.flops(True), "unshared": shape.flops(False)}
    if len(entry["pairs"]) >= clock.pairs:
        return
    with start("r1fast", shape, checkpoint, ours) as mine, start("TRL", shape, checkpoint, entry["trl"]) as trl:
        both = {"r1fast": mine, "TRL": trl}
        for contender in both.values():
            contender.step()
        while len(entry["pairs"]) < clock.pairs:
            took = time.monotonic()
            pair = {who: contender.step() for who, contender in both.items()}
            disturbed = max(step["others"] for step in pair.values())
            line = "  ".join(f"{who} {step['seconds']:.2f} s" for who, step in pair.items())
            if disturbed > OTHERS:
                clock.say(f"{name}: {line}  not counted: others took {disturbed:.0%} of a core")
            else:
                entry["pairs"].append(pair)
                results.write()
                clock.say(f"{name}, {len(entry['pairs'])} of {clock.pairs}: {line}")
            if clock.over(time.monotonic() - took):
                return


def summary(entry: dict) -> dict:
    """Of a case: medians by contender and phase, the ratio with its spread, memory, share of the machine."""
    found = {}
    for who in CONTENDERS:
        steps = [pair[who] for pair in entry["pairs"]]
        found[who] = {p: median(s["phases"].get(p, 0.0) for s in steps) for p in PHASES}
        found[who] |= {"seconds": median(s["seconds"] for s in steps), "peak": max(s["peak"] for s in steps)}
        found[who]["above"] = max(s["peak"] - s.get("imports", math.nan) for s in steps)  # not told by old files
        found[who]["tokens"] = median(s["tokens"] / s["seconds"] for s in steps)
    ratios = [pair["TRL"]["seconds"] / pair["r1fast"]["seconds"] for pair in entry["pairs"]]
    found["ratio"] = (median(ratios), min(ratios), max(ratios))
    found["memory"] = tuple(found["r1fast"][what] / found["TRL"][what] for what in ("peak", "above"))
    found["useful"] = sum(entry["flops"]["shared"].values()) / found["r1fast"]["seconds"] / entry["peak_flops"]
    return found


def _told(number: float, form: str) -> str:
    return "not told" if math.isnan(number) else format(number, form)


def table(data: dict) -> str:
    """What is in a file: a line for each side of each case, and what it was measured on."""
    head = [
        "model, prompts x samples, KL",
        "by",
        "step, s",
        *PHASES,
        "tokens/s",
        "times r1fast",
        "peak MB",
        "of it steps",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    notes = []
    for name, entry in data["cases"].items():
        if not entry["pairs"]:
            continue
        found = summary(entry)
        for who in CONTENDERS:
            row = found[who]
            ratio = "1" if who == "r1fast" else "{:.2f} ({:.2f}–{:.2f})".format(*found["ratio"])
            cells = [name if who == "r1fast" else "", who, f"{row['seconds']:.2f}"]
            cells += [f"{row[phase]:.2f}" for phase in PHASES]
            cells += [f"{row['tokens']:,.0f}", ratio, f"{row['peak'] / 1e6:,.0f}", _told(row["above"] / 1e6, ",.0f")]
            lines.append("| " + " | ".join(cells) + " |")
        rate, whole, above = entry["peak_flops"] / 1e9, *found["memory"]
        note = f"- {name}, at {entry['commit']}, {len(entry['pairs'])} pairs: "
        note += f"{found['useful']:.0%} of {rate:.0f} GFLOP/s; "
        note += f"peak memory {whole:.2f} of TRL's, without the imports {_told(above, '.2f')}; "
        notes.append(
            note + f"TRL with {json.dumps(entry['trl'])}" + (f", ours {entry['ours']}" if entry["ours"] else "")
        )
    where = data["machine"]
    text = f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, TRL {where['trl']}, "
    text += f"transformers {where['transformers']}. Medians; `peak` is the whole process's, `of it steps` what came on "
    text += (
        "top of its imports (models, optimizer, cache, activations). Useful work (each prompt forwarded once a group) "
    )
    text += "a second, as a share of what torch's float32 product of 2048 reaches, memory, and settings:"
    return "\n".join([*lines, "", text, "", *notes])


def main() -> int:
    known = cases()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_trl", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--case", nargs="+", default=list(known), choices=list(known), metavar="CASE", help=", ".join(known)
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop at the next step after so many")
    parser.add_argument("--search", action="store_true", help="find TRL's best settings instead")
    parser.add_argument("--ours", type=json.loads, default={}, help="of our stage's block of the recipe, as JSON")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and nothing else")
    options = parser.parse_args()
    results = Results()
    clock = Clock(results, options.pairs, options.minutes)
    for name in options.case:
        takes = clock.search(name, known[name]) if options.search else clock.measure(name, known[name], options.ours)
        print(f"{name}: about {takes / 60:.1f} min", flush=True)
        clock.expected += takes
    print(f"all: about {clock.expected / 60:.0f} min where nothing else runs", flush=True)
    for name in [] if options.estimate else options.case:
        if clock.over():
            break
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            make_checkpoint(known[name], checkpoint)
            if options.search:
                search(results, name, known[name], checkpoint, clock)
            else:
                measure(results, name, known[name], checkpoint, options.ours, clock)
    if not options.estimate:
        results.write()
        print(f"{table(results.data)}\n\nwritten to {results.path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
