"""Two machines, as far as the network can tell: namespaces with their own addresses, joined by torchrun's rendezvous.

A minute, so only where it is asked for: R1FAST_SLOW=1 pytest tests/test_hosts.py"""

import os
import subprocess
import sys
import time

import pytest
from test_parallel import one, same_results  # noqa: F401  (a fixture)

from r1fast.metrics import read_events

pytestmark = pytest.mark.skipif("R1FAST_SLOW" not in os.environ, reason="a minute; R1FAST_SLOW=1 runs it")

HOSTS = ("10.77.0.1", "10.77.0.2")
PORT = 29577


def root(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    """Names of two network namespaces with a cable between them; only root may make them."""
    names = [f"r1fast{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            root("ip", "netns", "add", name)
        root("ip", "link", "add", "r1va", "netns", names[0], "type", "veth", "peer", "name", "r1vb", "netns", names[1])
        for name, device, address in zip(names, ("r1va", "r1vb"), HOSTS, strict=True):
            root("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            root("ip", "-n", name, "link", "set", device, "up")
            root("ip", "-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"network namespaces cannot be made here ({error})")
    yield names
    for name in names:
        root("ip", "netns", "del", name)


def torchrun(host: str, device: str, out, recipe, *more: str, restarts: int = 0) -> subprocess.Popen:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS[0]}:{PORT}", "--rdzv-id=run"]
    # By itself torchrun asks the resolver for this host's names, and a namespace has none.
    command += [f"--rdzv-conf=is_host={str(device[-1] == 'a').lower()}"]
    command += [f"--max-restarts={restarts}", f"--local-addr={HOSTS['ab'.index(device[-1])]}"]
    command += ["-m", "r1fast.train", str(recipe), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def test_two_hosts_train_as_one(hosts, one, tmp_path):  # noqa: F811
    recipe, whole = one
    runs = [torchrun(host, f"r1v{c}", tmp_path / "run", recipe) for host, c in zip(hosts, "ab", strict=True)]
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    same_results(tmp_path / "run", whole)


def test_a_rank_killed_on_one_host_is_started_again_and_the_run_ends_the_same(hosts, one, tmp_path):  # noqa: F811
    """Elastic: torchrun starts both anew, and --resume goes on from the last snapshot."""
    recipe, whole = one
    out = tmp_path / "run"
    out.mkdir()
    runs = [
        torchrun(host, f"r1v{c}", out, recipe, "--resume", restarts=2) for host, c in zip(hosts, "ab", strict=True)
    ]
    log, waited = out / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and '"kind": "grpo", "step": 2,' in log.read_text()):
        assert all(run.poll() is None for run in runs) and time.monotonic() < waited
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(runs[1].pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(found[-1]), 9)
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert "resumed" in [e["status"] for e in read_events(out) if e["event"] == "stage" and e["stage"] == "grpo"]
    same_results(out, whole)
