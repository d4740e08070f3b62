"""Where hosts stand: site, rack, machine, from the widest to the narrowest.

Named by the user, or not at all: as ``envship.topology: site/rack`` in the configuration of the machine itself, or in
that of the client as a mapping from places to patterns, which host names, addresses, worker names and names of worker
resources are compared with. Containers of one machine are told by its boot id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import dask.config

from worker_bootstrap.errors import SettingInvalid

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Topology = Mapping[str, Sequence[str]]


def own_place() -> list[str]:
    """Where this machine says that it stands; without its own name, which `machine` tells.

    Raises
    ------
    SettingInvalid
        If ``envship.topology`` is neither a text nor a mapping.
    """
    value = dask.config.get("envship.topology", default=None)
    if isinstance(value, str):
        return [part for part in value.split("/") if part]
    if value is not None and not isinstance(value, Mapping):
        raise SettingInvalid("topology", value, "a place such as 'site/rack', a mapping of places to patterns, or null")
    return []


def machine(fallback: str) -> str:
    """What all containers of this machine agree upon, and no other machine; *fallback* where nothing tells."""
    try:
        return BOOT_ID.read_text().strip() or fallback
    except OSError:
        return fallback


def place_of(own: Sequence[str], machine: str, names: Iterable[str], topology: Topology) -> tuple[str, ...]:
    """The place of a host: what *topology* says of one of its *names*, else its *own* word, else only the machine.

    A machine in no named place is at the same unnamed site as all others like it.
    """
    known = list(names)
    for place, patterns in topology.items():
        if any(fnmatchcase(name, pattern) for name in known for pattern in patterns):
            own = [part for part in place.split("/") if part]
            break
    return (*(own or [""]), machine)
