"""Reads a recipe: YAML and `key.path=value` overrides into the typed objects of schema.py, and back.

Whatever is wrong with what the user wrote is raised here as one sentence (UserError) naming the place, before any
work starts. The object returned is the one the run uses and the one written to RUN_DIR/config.yaml.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one clear sentence (what, where, what to do). The command line prints it and exits with code 2."""
