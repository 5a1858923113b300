"""Keeps our source folder `kernels/` from shadowing the Hugging Face distribution of that name. Imports no torch.

Python started from the repository root puts the root first on `sys.path`, and transformers' `import kernels` would then
find our folder. Ours is imported as `r1fast_kernels`, so the root can stand last: everything installed comes before it.
"""

import sys
from pathlib import Path


def put_checkout_last() -> None:
    """Move the `sys.path` entries that are our repository root behind all others; outside a checkout, do nothing."""
    folder = Path(__file__).resolve().parent
    if folder.name != "kernels":
        return
    ours = [entry for entry in sys.path if Path(entry or ".").resolve() == folder.parent]
    sys.path[:] = [entry for entry in sys.path if entry not in ours] + ours
