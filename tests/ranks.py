"""Several ranks on this machine, for tests: each a process of its own, as torchrun would start them, over gloo."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(size: int, code: str, *arguments: object, timeout: float = 180, tensor: int = 1) -> list:
    """What `code` leaves in its variable `result`, of each rank; `arguments` are its variable of that name.

    The ranks have joined when it begins: `place` is a World.
    tensor: so many hold each model together. AssertionError with their words where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "arguments"
        given.write_bytes(pickle.dumps(arguments))
        script = (
            "import os, pickle, sys\nfrom pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
            "from r1fast.parallel import joined\n"
            f"arguments = pickle.loads(Path({str(given)!r}).read_bytes())\n"
            f"with joined('cpu', {tensor}) as place:\n"
            + "".join(f"    {line}\n" for line in code.splitlines())
            + f"    Path({folder!r}, f'rank{{place.everyone.rank}}').write_bytes(pickle.dumps(result))\n"
        )
        shared = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            told = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{told[rank]}"
        return [pickle.loads((Path(folder) / f"rank{rank}").read_bytes()) for rank in range(size)]
