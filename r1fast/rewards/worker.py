"""The other side of the reward pool: a process that judges one completion at a time and may be killed at any moment.

One JSON object a line, in on standard input, out on what was standard output:
    <- {"settings": ..., "plugins": [...]}  first, once
    <- {"module": ..., "reward": ..., "completion": ..., "reference": ..., "seconds": ...}
    -> {"prepared": reward}                 only before the first verdict of each reward
    -> {"value": ..., "error": ...}
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

from r1fast import plugins
from r1fast.rewards.base import Reward, Score, configure, get
from r1fast.schema import RewardsConfig

MEMORY = 2 << 30  # bytes of address space; sympy needs a tenth of it, 9^9^9^9 would take all there is
GRACE = 5.0  # seconds after the deadline at which a worker whose parent is gone ends itself


def limit_memory() -> None:
    """Makes a computation that grows without bound fail by itself; where there are no limits (Windows), nothing."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))


def _set_alarm(seconds: float) -> None:
    # The default action of the signal ends the process from the kernel: it works inside C code too.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _find(module: str, name: str) -> Reward:
    importlib.import_module(module)  # registers it
    reward = get(name)
    reward.prepare()
    return reward


def main() -> None:
    """Serves until standard input ends."""
    # What libraries print must not be taken for a verdict: the real output is kept aside, and 1 goes where 2 goes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    limit_memory()
    known: dict[str, Reward] = {}
    given = json.loads(sys.stdin.readline())
    configure(RewardsConfig(**given["settings"]))
    plugins.load(given["plugins"])
    for line in sys.stdin:
        job = json.loads(line)
        name = job["reward"]
        try:
            if name not in known:
                known[name] = _find(job["module"], name)
                print(json.dumps({"prepared": name}), file=replies)
            _set_alarm(job["seconds"] + GRACE)
            score = known[name].attempt(job["completion"], job["reference"])
        except Exception as error:  # a reward that cannot even be loaded
            score = Score(0.0, f"{type(error).__name__}: {error}"[:300])
        finally:
            _set_alarm(0)
        print(json.dumps({"value": score.value, "error": score.error}), file=replies)


if __name__ == "__main__":
    main()
