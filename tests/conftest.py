"""What every test starts from: seeded random numbers, no backend asked for, no cached choice of one."""

import os
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
    """The directory of a finished run of the small recipe (micro_run.py): half a minute, made once."""
    from micro_run import run_micro

    out = tmp_path_factory.mktemp("micro") / "tiny"
    run_micro(out)
    return out
