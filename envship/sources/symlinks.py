"""Where a symbolic link leads, seen from inside of an environment. Looks at the file system, reads no content."""

from __future__ import annotations

import os
from collections.abc import Sequence

from envship.canonical import SYSTEM_PREFIXES
from envship.sources.tree import portable
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.paths import check_link


def target_inside(path: str, origin: str, prefixes: Sequence[str]) -> str | None:
    """The relative target of the link *origin*, which stands at *path* in the environment; None if it leads outside.

    Parameters
    ----------
    path
        Of the link, in the environment.
    origin
        Of the link, on this machine.
    prefixes
        Absolute paths under which the environment may be named.

    Notes
    -----
    Whether there is anything at the target plays no part: what dangles on this machine will dangle on others. A target
    that climbs (``..``) after having entered a folder is resolved, since the folder may be a link itself.
    """
    target = os.readlink(origin)
    if target.startswith("/"):
        inside = _from_absolute(path, target, prefixes)
    elif _climbs_late(target):
        inside = _from_absolute(path, os.path.join(os.path.dirname(origin), target), prefixes, resolved=True)
    else:
        inside = target
        try:
            return check_link(path, portable(inside))
        except ManifestInvalid:
            # Out and in again, by the name of the prefix.
            climbed = os.path.normpath(os.path.join(os.path.dirname(origin), target))
            inside = _from_absolute(path, climbed, prefixes)
    return None if inside is None else portable(inside)


def leads_back(real: str, chain: Sequence[str]) -> bool:
    """Whether the folder *real* holds one of *chain*, the folders through which it was reached."""
    return any(folder == real or folder.startswith(real + "/") for folder in chain)


def _from_absolute(path: str, target: str, prefixes: Sequence[str], *, resolved: bool = False) -> str | None:
    own = [prefix for prefix in prefixes if prefix not in SYSTEM_PREFIXES]
    # The last part is not followed: the environment has that link as well.
    plain = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    forms = [plain] if resolved else [os.path.normpath(target), plain]
    for form in forms:
        for prefix in own:
            if (form + "/").startswith(prefix + "/"):
                return os.path.relpath(form, os.path.join(prefix, os.path.dirname(path)))
    return None


def _climbs_late(target: str) -> bool:
    parts = [part for part in target.split("/") if part not in ("", ".")]
    entered = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    return ".." in parts[entered:]
