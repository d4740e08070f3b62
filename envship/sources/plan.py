"""The plan of a prefix, whatever kind it is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from envship.options import PackOptions
from envship.sources.conda import plan_conda
from envship.sources.draft import Plan
from envship.sources.exported import plan_exported
from envship.sources.locate import checked, is_conda, is_exported
from envship.sources.tree import Trees
from envship.sources.venv import plan_venv


def plan(prefix: Path, trees: Trees, options: PackOptions, is_archive: bool = False) -> Plan:
    """What a pack of the environment at *prefix* will do; *trees* keeps what was seen of it.

    What comes out of an archive says nothing true of this machine: nothing outside of *prefix* is looked at then,
    whatever project, interpreter or package its files name.

    Raises
    ------
    NotAnEnvironment
        If there is no Python environment, or its interpreter does not run.
    SourceProblems
        If files are missing or were overwritten (unless *options* ignore that), or cannot be packed.
    """
    checked(prefix)
    of_kind = plan_conda if is_conda(prefix) else plan_exported if is_exported(prefix) else plan_venv
    made = of_kind(prefix, trees, options, is_archive)
    return replace(made, drafts=options.chosen(made.drafts))
