"""A store that one user (root) writes and everybody runs from.

Nothing in a store is secret to those who may use it, and what is written is readable for all whatever the umask is;
only the folder of a store is its owner's alone, until it is opened here.
"""

from __future__ import annotations

import contextlib
import os
import stat

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.lock import Lease
from worker_bootstrap.store import Store

FOLDER_MODE = 0o755
FILE_MODE = 0o644


def open_to_everybody(store: Store, environment_id: EnvironmentId) -> None:
    """Let every user of the machine read *store* and run that environment from it. Idempotent.

    Makes the environment's lease file: others cannot, and by locking it they keep ``envship gc`` from taking what they
    run from.
    """
    layout = store.layout
    lease = layout.lease(environment_id)
    with Lease(lease).claimed():
        os.chmod(lease, FILE_MODE)
    shared = (layout.version, layout.host_id, *layout.manifests.iterdir(), *layout.ready_marks.iterdir())
    for path in (*shared, *layout.inventories.iterdir()):
        _add_mode(str(path), FILE_MODE)
    for folder in (*layout.chunks.iterdir(), *layout.folders):
        _add_mode(str(folder), FOLDER_MODE)
    _add_mode(str(layout.root), FOLDER_MODE)  # last: before, nobody could look in


def _add_mode(path: str, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
        found = stat.S_IMODE(os.lstat(path).st_mode)
        if found & mode != mode:
            os.chmod(path, found | mode)
