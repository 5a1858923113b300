"""Tasks: generators and dataset adapters. `build` makes one from a recipe's block; each kind registers itself."""

from r1fast.tasks import benchmarks, code, general, gsm8k, jsonl, math, totals
from r1fast.tasks.base import SPLITS, Split, Task, build, kinds, register

__all__ = ["SPLITS", "Split", "Task", "benchmarks", "build", "code", "general", "gsm8k", "jsonl", "kinds", "math"]
__all__ += ["register", "totals"]
