"""The paper's benchmarks: one task kind over a table, in which a benchmark is a reader of its data set's own rows, a
prompt, a verifier and what is counted beside it (table.py). `python -m r1fast.evaluate MODEL_DIR --task NAME`."""

from r1fast.tasks.benchmarks.table import TABLE, Benchmark, recognise
from r1fast.tasks.benchmarks.task import BenchmarkTask

__all__ = ["TABLE", "Benchmark", "BenchmarkTask", "recognise"]
