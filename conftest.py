"""Root of the test run: the `--benchmark` flag, which tests begin first, and the import path as the programs set it.

`pytest` runs tests/ and no benchmark; `pytest --benchmark` runs benchmarks/ and no test. pytest-benchmark's own options
(`--benchmark-only benchmarks/`, `--benchmark-json=...`) are untouched: pytest matches option names exactly.
"""

import os
from itertools import islice
from pathlib import Path

import pytest

from r1fast_kernels.paths import put_checkout_last

put_checkout_last()  # importing this file put the checkout first on sys.path

ROOT = Path(__file__).parent

# Each of several workers, and what it starts, has its share of the cores: threads that wait for a core on which another
# worker computes spin, and the whole suite took 36 minutes of CPU time where it had taken 27. Before torch is loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
if WORKERS:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--benchmark", action="store_true", help="Run the kernel microbenchmarks of benchmarks/ and none of the tests."
    )


def pytest_configure(config: pytest.Config) -> None:
    named_by_user = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("--benchmark") and not named_by_user:
        config.args = [str(ROOT / "benchmarks")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`pytest -n auto`: a worker without tests takes half of what another has left, so that files stay together."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def first_for_each(long: list, others: list, workers: int) -> list:
    """All tests in an order of which each worker's even part begins with its share of the long ones."""
    total, parts = len(long) + len(others), []
    others = iter(others)
    for worker in range(workers):
        own = long[worker::workers]
        size = total * (worker + 1) // workers - total * worker // workers
        parts += own + list(islice(others, max(0, size - len(own))))
    return parts + list(others)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers the tests marked `long(seconds)` begin first, the longest before all: one that began last
    would leave the other cores with nothing to do."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        marked = [(item.get_closest_marker("long"), item) for item in items]
        long = sorted((-mark.args[0], i) for i, (mark, _) in enumerate(marked) if mark)
        others = [item for mark, item in marked if not mark]
        items[:] = first_for_each([items[i] for _, i in long], others, workers)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With the flag leave out tests/; without it leave out benchmarks/, unless they are named on the command line."""
    if config.getoption("--benchmark"):
        return True if ROOT / "tests" in (collection_path, *collection_path.parents) else None
    if collection_path == ROOT / "benchmarks":
        named = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
        return None if any(ROOT / "benchmarks" in (path, *path.parents) for path in named) else True
    return None
