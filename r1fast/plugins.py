"""A user's own rewards and tasks: Python files that a recipe names, run before anything asks for what they register.

    plugins: [my_reward.py]

The file says `from r1fast.rewards import Reward, register` and decorates its classes, exactly as the package's own
files do. The reward pool's worker processes run the same files, so such a reward may hang or crash like any other.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from r1fast.config import UserError

_loaded: dict[str, str] = {}  # absolute path -> module's name, in the order of loading


def load(paths: Sequence[str]) -> None:
    """Runs each file once in this process; one that is not there or fails is a `UserError`. Relative to the current
    directory, as all paths of a recipe are."""
    for given in paths:
        path = Path(given).resolve()
        if str(path) in _loaded:
            continue
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"plugins: {given} is no Python file; name a .py file, from the current directory")
        name = f"r1fast_plugin_{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{zlib.crc32(str(path).encode()):08x}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except UserError:
            del sys.modules[name]
            raise
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"plugins: {given} fails as it is loaded: {type(error).__name__}: {error}") from error
        _loaded[str(path)] = name


def loaded() -> list[str]:
    """The files that this process has run, in their order: what a worker process is told to run too."""
    return list(_loaded)
