"""Packing: from an environment on disk to chunks in a store and a manifest.

The way is source → plan → content → chunks → store → manifest; each step has a module. The manifest is written last, so
that a pack that is interrupted at any point leaves chunks that the next one finds, and no environment.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from envship import config
from envship.environment import Environment, StoreLike, store_of
from envship.options import NO_OPTIONS, PackOptions
from envship.packer import Packer, Report
from envship.packing_process import Job, pack_in_processes
from envship.scan_index import ScanIndex
from envship.sources.archive import is_archive
from envship.sources.locate import find_prefix
from envship.sources.tree import Trees
from worker_bootstrap import evict, process_limit
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing, EnvshipError, ManifestInvalid
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import Store

__all__ = ["Report", "pack"]

logger = logging.getLogger("envship.pack")


def pack(
    source: str | os.PathLike[str] | None = None,
    *,
    store: StoreLike = None,
    options: PackOptions = NO_OPTIONS,
    report: Report | None = None,
) -> Environment:
    """Pack an environment into the store of this machine.

    Parameters
    ----------
    source
        None for the environment that this process runs in; the name of a conda environment; the path of a conda
        environment, a venv, an interpreter's prefix, or an archive that conda-pack made.
    store
        Where the chunks go, or its folder; None for that of this machine (`worker_bootstrap.location.open_store`).
    options
        Which files stay away, and which faults to put up with.
    report
        Told about progress.

    Raises
    ------
    SourceNotFound
        If there is no such environment.
    NotAnEnvironment
        If there is no Python environment, or its interpreter does not run.
    SourceProblems
        If it cannot be packed as it is, or goes on changing while it is; lists everything that is wrong.
    ArchiveInvalid
        If it is an archive that is damaged, cut short, or a bomb.
    StoreFull
        If there is no room.
    ProcessLimitReached
        If no process can be started.

    Notes
    -----
    Idempotent: the same packages give the same environment, and what the store has is not written again. May be
    interrupted at any point. Several processes may pack at once. Where ``envship.store-limit`` is exceeded, others are
    evicted afterwards; if that fails, it is logged.
    """
    store = store_of(store)
    place = _place(source)
    limit_bytes = config.store_limit_bytes()
    with store.adding(), process_limit.named():
        environment, is_new = _packed(place, store, options, report)
    if is_new and limit_bytes is not None:
        _collect(store, limit_bytes, environment.id)
    return environment


def last_packed(source: str | os.PathLike[str] | None, store: StoreLike, options: PackOptions) -> EnvironmentId | None:
    """What `pack` returned last, and will again if nothing has changed; None if that is not known for certain.

    Raises
    ------
    SourceNotFound
        If there is no such environment.
    """
    return ScanIndex.load(store_of(store), str(_place(source)), options).environment_id


def _packed(place: Path, store: Store, options: PackOptions, report: Report | None) -> tuple[Environment, bool]:
    """The environment at *place*, and whether it had to be read."""
    trees = Trees()
    index = ScanIndex.load(store, str(place), options)
    known = index.unchanged(trees)
    if known is not None:
        manifest = _held(store, known)
        if manifest is not None:
            store.touch(manifest.id)
            return Environment(manifest, store), False
    if sys.executable and not index.known.packages:
        read_only = [layout.root for layout in store.layouts[:-1]]
        environment_id = pack_in_processes(Job(place, store.layout.root, read_only, options), report)
    else:
        environment_id = Packer(store, options, report).pack(place, Trees(trees), index)
    return Environment(store.read_manifest(environment_id), store), True


def _collect(store: Store, limit_bytes: int, packed: EnvironmentId) -> None:
    """Make room again. What was packed is whole whether that can be done or not."""
    try:
        evict.collect(store, limit_bytes, keep=[packed])
    except (EnvshipError, OSError) as error:
        logger.warning("the store %s stays over its limit, for eviction failed: %s", store.layout.root, error)


def _place(source: str | os.PathLike[str] | None) -> Path:
    """Where the environment lies: a prefix, or an archive."""
    if source is not None:
        path = Path(os.path.expanduser(source)).absolute()
        if (os.sep in os.fspath(source) or path.suffix) and is_archive(path):
            return path
    return find_prefix(source)


def _held(store: Store, environment_id: EnvironmentId) -> Manifest | None:
    """The manifest, if the store has it and every chunk that it names, whatever a power cut took since."""
    try:
        manifest = store.read_manifest(environment_id)
    except (EnvironmentMissing, ManifestInvalid):
        return None
    return None if store.lost(manifest.chunks) else manifest
