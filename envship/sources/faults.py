"""What is wrong with installed packages, one line for each: files that are missing or overwritten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SHOWN = 3
"""Paths that a message names for each kind of fault of a package."""


class Owner(NamedTuple):
    """A package that recorded files: *kind* is ``conda`` or ``pip``."""

    name: str
    version: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.kind})"


class Fault(NamedTuple):
    """A file of *owner* that is missing, or that was overwritten *by* another package."""

    owner: Owner
    path: str
    by: Owner | None = None


def report(faults: Iterable[Fault], shown: int | None = None) -> list[str]:
    """One line for each package, with the remedy; names all files, or as many as are to be *shown* of each kind."""
    grouped: dict[Owner, list[Fault]] = {}
    for fault in faults:
        grouped.setdefault(fault.owner, []).append(fault)
    return [f"{owner}: {_what(found, shown)}. {_remedy(owner, found)}" for owner, found in sorted(grouped.items())]


def _what(faults: list[Fault], shown: int | None) -> str:
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(f"overwritten by {fault.by}" if fault.by else "missing", []).append(fault.path)
    return "; ".join(f"{kind}: {_paths(sorted(paths), shown)}" for kind, paths in kinds.items())


def _paths(paths: list[str], shown: int | None) -> str:
    more = f" and {len(paths) - shown} more" if shown is not None and len(paths) > shown else ""
    return ", ".join(paths[:shown]) + more


def _remedy(owner: Owner, faults: list[Fault]) -> str:
    if owner.kind != "conda":
        return f"Mend it: pip install --force-reinstall --no-deps {owner.name}=={owner.version}"
    others = sorted({fault.by.name for fault in faults if fault.by})
    first = f"pip uninstall {' '.join(others)}; " if others else ""
    return f"Mend it: {first}conda install --force-reinstall {owner.name}={owner.version}"
