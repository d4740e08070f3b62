"""The plan of a prefix, whatever kind it is of."""

from __future__ import annotations

from pathlib import Path

from envship.sources.conda import plan_conda
from envship.sources.draft import Plan
from envship.sources.locate import checked, is_conda
from envship.sources.tree import Trees
from envship.sources.venv import plan_venv


def plan(prefix: Path, trees: Trees, *, ignore_missing: bool) -> Plan:
    """What a pack of the environment at *prefix* will do; *trees* keeps what was seen of it.

    Raises
    ------
    NotAnEnvironment
        If there is no Python environment, or its interpreter does not run.
    SourceProblems
        If files are missing or were overwritten (unless *ignore_missing*), or cannot be packed.
    """
    if is_conda(checked(prefix)):
        return plan_conda(prefix, trees, ignore_missing=ignore_missing)
    return plan_venv(prefix, trees, ignore_missing=ignore_missing)
