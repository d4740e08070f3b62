"""Making the folders of a store, naming the host that it belongs to, and telling whether it is of our version."""

from __future__ import annotations

import contextlib
import logging
import re
import uuid

from worker_bootstrap.durable import content_of, make_folder, publish, sync_folder
from worker_bootstrap.errors import StoreError
from worker_bootstrap.layout import STORE_VERSION, Layout
from worker_bootstrap.lock import Lock, check_locks

logger = logging.getLogger("envship.store")


def prepare(layout: Layout, known_id: str) -> str:
    """Make what is not there; return the host's id, which is *known_id*, or a new one, where there is none yet."""
    make_folder(layout.root, 0o700)
    for folder in layout.folders:
        make_folder(folder)
    host_id = _host_id(layout)
    if host_id is None:
        # Two processes that come first at once must not each believe in an id of their own.
        with Lock(layout.locks / "host-id.lock"):
            if (host_id := _host_id(layout)) is None:
                host_id = known_id or uuid.uuid4().hex
                publish(layout.version, STORE_VERSION.encode(), layout.tmp, sync=True)
                publish(layout.host_id, host_id.encode(), layout.tmp, sync=True)
                with contextlib.suppress(PermissionError):  # a folder that we may not read, only pass through
                    sync_folder(layout.root.parent)
    version = (content_of(layout.version, 64) or b"").decode("ascii", "replace").strip()
    if version != STORE_VERSION:
        raise StoreError(
            f"the store {layout.root} has version {version!r}; this envship needs {STORE_VERSION!r}. Name another "
            "folder (ENVSHIP_STORE), or remove that one."
        )
    check_locks(layout.locks)
    return host_id


def is_readable(layout: Layout) -> bool:
    """Whether a read-only store keeps things where we look for them; one that is not there yet may come."""
    version = content_of(layout.version, 64)
    if version is None or version.decode("ascii", "replace").strip() == STORE_VERSION:
        return True
    logger.warning("the store %s is left alone: it is of another version", layout.root)
    return False


def _host_id(layout: Layout) -> str | None:
    found = (content_of(layout.host_id, 64) or b"").decode("ascii", "replace").strip()
    return found if re.fullmatch("[0-9a-f]{32}", found) else None
