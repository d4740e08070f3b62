"""A store that one user (root) writes and everybody runs from.

Nothing in a store is secret to those who may use it, and what is written is readable for all whatever the umask is;
only the folder of a store is its owner's alone, until it is opened here.
"""

from __future__ import annotations

import contextlib
import os
import stat

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.durable import sync_file_system
from worker_bootstrap.lock import Lease
from worker_bootstrap.store import Store

FOLDER_MODE = 0o755
FILE_MODE = 0o644


def open_to_everybody(store: Store, environment_id: EnvironmentId) -> None:
    """Let every user of the machine read *store* and run that environment from it. Idempotent.

    What had to be changed for that is on disk when this returns.
    Makes the environment's lease file: others cannot, and by locking it they keep ``envship gc`` from taking what they
    run from.
    """
    layout = store.layout
    lease = layout.lease(environment_id)
    with Lease(lease).claimed():
        changed = stat.S_IMODE(os.lstat(lease).st_mode) != FILE_MODE
        os.chmod(lease, FILE_MODE)
    shared = (layout.version, layout.host_id, *layout.manifests.iterdir(), *layout.ready_marks.iterdir())
    for path in (*shared, *layout.inventories.iterdir()):
        changed |= _add_mode(str(path), FILE_MODE)
    for folder in (*layout.chunks.iterdir(), *layout.folders):
        changed |= _add_mode(str(folder), FOLDER_MODE)
    changed |= _add_mode(str(layout.root), FOLDER_MODE)  # last: before, nobody could look in
    if changed:
        sync_file_system(layout.root)


def _add_mode(path: str, mode: int) -> bool:
    """Whether anything had to be added."""
    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
        found = stat.S_IMODE(os.lstat(path).st_mode)
        if found & mode != mode:
            os.chmod(path, found | mode)
            return True
    return False
