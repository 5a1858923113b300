"""Root of the test run: the `--benchmark` flag, and the import path set as the programs set it.

`pytest` runs tests/ and no benchmark; `pytest --benchmark` runs benchmarks/ and no test. pytest-benchmark's own options
(`--benchmark-only benchmarks/`, `--benchmark-json=...`) are untouched: pytest matches option names exactly.
"""

from pathlib import Path

import pytest

from r1fast_kernels.paths import put_checkout_last

put_checkout_last()  # importing this file put the checkout first on sys.path

ROOT = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--benchmark", action="store_true", help="Run the kernel microbenchmarks of benchmarks/ and none of the tests."
    )


def pytest_configure(config: pytest.Config) -> None:
    named_by_user = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("--benchmark") and not named_by_user:
        config.args = [str(ROOT / "benchmarks")]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With the flag leave out tests/; without it leave out benchmarks/, unless they are named on the command line."""
    if config.getoption("--benchmark"):
        return True if ROOT / "tests" in (collection_path, *collection_path.parents) else None
    if collection_path == ROOT / "benchmarks":
        named = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
        return None if any(ROOT / "benchmarks" in (path, *path.parents) for path in named) else True
    return None
