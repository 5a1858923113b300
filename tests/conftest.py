"""What every test starts from: seeded random numbers, no backend asked for, no cached choice of one."""

import os
import shutil
import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_state():
    """Seed torch, and forget the backend choices of the test before; costs nothing where torch is not imported."""
    torch, op = sys.modules.get("torch"), sys.modules.get("r1fast_kernels.op")
    if torch is not None:
        torch.manual_seed(0)
    if op is not None:
        op.reset_choices()
    yield
    op = sys.modules.get("r1fast_kernels.op")
    if op is not None:
        op.reset_choices()


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """The environment for a child process, without the variables that choose backends or say which worker this is."""
    ours = ("R1FAST_", "TRITON_INTERPRET", "PYTEST_XDIST")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """The directory of a finished run of the small recipe (micro_run.py), to be read: half a minute, made once for all
    workers."""
    from filelock import FileLock  # torch brings it
    from micro_run import run_micro

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "micro"  # a worker's parent is this run's
    out, done = shared / "tiny", shared / "done"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "lock"):
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)  # of a worker that failed
            run_micro(out)
            done.touch()
    return out
