"""Making room in a store: least recently used environments go first, then chunks that no manifest names.

What a process runs from, builds, or has just used is never taken: leases and locks are the kernel's. Whoever reads or
serves a chunk that goes at that moment finds it missing, as if it had never been there, and fetches it again. `plan`
decides and touches nothing; `carry_out` looks again before each step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from worker_bootstrap import ready_mark, scratch
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.durable import full_error, unusable_error
from worker_bootstrap.errors import StoreBusy
from worker_bootstrap.layout import Layout
from worker_bootstrap.lock import Lease, Lock, holders
from worker_bootstrap.stock import (
    Holding,
    Holdings,
    chunk_files,
    last_used,
    leftovers,
    needed_chunks,
    needed_elsewhere,
    settle_times,
    survey,
)
from worker_bootstrap.store import Store

logger = logging.getLogger("envship.evict")

GRACE_S = 900.0
"""What was used, or written, so recently belongs to a swap that may be under way (`timeouts.prepare` is 600 s)."""
ROUNDS = 2
"""What there was no room to lock may be locked once something else has gone."""


class Kept(NamedTuple):
    """An environment that stays although it would have been the next to go, and why."""

    environment_id: EnvironmentId
    reason: str


class Plan(NamedTuple):
    """What is to go.

    *evicted* in the order in which they go; *kept* are those that had to be passed over. *freed_bytes* counts prefixes
    and chunks, *size_bytes* is the size of the store before. *chunks* are those that no manifest names afterwards, but
    for *new_chunks*: so many were written so recently that their manifest may be still to come. What has been used
    since *made_at* (seconds since the epoch) is not to go after all.
    """

    evicted: tuple[EnvironmentId, ...]
    kept: tuple[Kept, ...]
    chunks: frozenset[Digest]
    freed_bytes: int
    size_bytes: int
    made_at: float
    new_chunks: int = 0


class Freed(NamedTuple):
    """What has gone, and what could not."""

    evicted: tuple[EnvironmentId, ...]
    kept: tuple[Kept, ...]
    chunks: int


def plan(
    holdings: Holdings,
    limit_bytes: int | None,
    *,
    now: float,
    needed_elsewhere: Collection[Digest] = (),
    keep: Collection[EnvironmentId] = (),
    grace_s: float = GRACE_S,
    unused_s: float | None = None,
) -> Plan:
    """Decide what goes. Pure.

    Parameters
    ----------
    holdings
        The store as it is.
    limit_bytes
        The size that it may have; None for any.
    now
        Seconds since the epoch.
    needed_elsewhere
        Chunks that stay although no manifest of this store names them.
    keep
        Environments that stay whatever happens.
    grace_s
        Environments used, and chunks written, in the last so many seconds stay as well.
    unused_s
        Environments that nobody used for so many seconds go in any case.
    """
    new = {digest for digest, written_at in holdings.written_at.items() if now - written_at < grace_s}
    account = _Account(holdings, needed_elsewhere, new)
    evicted: list[EnvironmentId] = []
    kept: list[Kept] = []
    for holding in sorted(holdings.environments, key=lambda holding: holding.used_at):
        is_old = unused_s is not None and now - holding.used_at > unused_s
        if not is_old and (limit_bytes is None or account.size_bytes <= limit_bytes):
            continue
        reason = _reason_to_keep(holding, now, keep, grace_s)
        if reason:
            kept.append(Kept(holding.environment_id, reason))
            continue
        evicted.append(holding.environment_id)
        account.remove(holding)
    before = holdings.size_bytes
    freed_bytes = before - account.size_bytes
    return Plan(tuple(evicted), tuple(kept), account.unneeded, freed_bytes, before, now, account.new_chunks)


def collect(
    store: Store,
    limit_bytes: int | None,
    *,
    keep: Collection[EnvironmentId] = (),
    grace_s: float = GRACE_S,
    unused_s: float | None = None,
) -> Freed:
    """Look, decide, and remove. Parameters as for `plan`; safe while anybody uses the store, and in many processes."""
    now = time.time()
    found = plan(
        survey(store, now),
        limit_bytes,
        now=now,
        needed_elsewhere=needed_elsewhere(store),
        keep=keep,
        grace_s=grace_s,
        unused_s=unused_s,
    )
    return carry_out(store, found, grace_s=grace_s)


def carry_out(store: Store, planned: Plan, *, grace_s: float = GRACE_S) -> Freed:
    """Remove what was planned, as far as nobody has come to need it meanwhile.

    Raises
    ------
    StoreFull
        If nothing can be freed, for there is no inode left for a lock's file.
    StoreError
        If the store cannot be written to.

    Notes
    -----
    An environment goes by losing its ready mark, then its prefix (renamed first), then its manifest: whoever is killed
    in the middle leaves one that is built, or one that is not. Its chunks go last.
    """
    settle_times(store, planned.made_at)
    gone = _Gone([], list(planned.kept))
    waiting: Sequence[EnvironmentId] = planned.evicted
    chunks = 0
    try:
        for _ in range(ROUNDS):
            full, waiting = _evict_each(store, waiting, planned.made_at, gone)
            _sweep_leftovers(store)
            chunks += _remove_unneeded_chunks(store, grace_s)
            if full is None:
                break
            if not gone.evicted and not chunks:
                raise full
    except OSError as error:
        raise unusable_error(error, store.layout.root) from error
    kept = [*gone.kept, *(Kept(environment_id, "there is no room for its lock") for environment_id in waiting)]
    if gone.evicted or chunks:
        logger.info("%s: evicted %d environments and %d chunks", store.layout.root, len(gone.evicted), chunks)
    return Freed(tuple(gone.evicted), tuple(kept), chunks)


class _Account:
    """The size of a store while environments go: what is shared goes with the last one that has it."""

    def __init__(self, holdings: Holdings, needed_elsewhere: Collection[Digest], new: Collection[Digest]) -> None:
        self._chunks = holdings.chunks
        self._new = new
        self._inodes = Counter(inode for holding in holdings.environments for inode in holding.shared)
        self._needs = Counter(digest for holding in holdings.environments for digest in holding.chunks)
        self._needs.update(needed_elsewhere)
        unneeded = [digest for digest in holdings.chunks if not self._needs[digest]]
        self.new_chunks = sum(digest in new for digest in unneeded)
        self.unneeded = frozenset(digest for digest in unneeded if digest not in new)
        gone_bytes = sum(holdings.chunks[digest] for digest in self.unneeded)
        self.size_bytes = holdings.size_bytes - gone_bytes - holdings.leftovers_bytes

    def remove(self, holding: Holding) -> None:
        self.size_bytes -= holding.own_bytes
        for inode, size in holding.shared.items():
            self._inodes[inode] -= 1
            if not self._inodes[inode]:
                self.size_bytes -= size
        gone = []
        for digest in holding.chunks:
            self._needs[digest] -= 1
            if not self._needs[digest] and digest in self._chunks:
                self.new_chunks += digest in self._new
                gone += [] if digest in self._new else [digest]
        self.size_bytes -= sum(self._chunks[digest] for digest in gone)
        self.unneeded = self.unneeded.union(gone)


def _reason_to_keep(holding: Holding, now: float, keep: Collection[EnvironmentId], grace_s: float) -> str:
    if holding.in_use:
        return "a process runs from it"
    if holding.builders:
        return f"it is being built (process {', '.join(map(str, holding.builders))})"
    if holding.environment_id in keep:
        return "it has just been packed or built"
    if now - holding.used_at < grace_s:
        return f"it was used in the last {grace_s / 60:.0f} minutes"
    return ""


class _Gone(NamedTuple):
    """What has been evicted so far, and what could not be."""

    evicted: list[EnvironmentId]
    kept: list[Kept]


def _evict_each(
    store: Store, environments: Sequence[EnvironmentId], planned_at: float, gone: _Gone
) -> tuple[OSError | None, list[EnvironmentId]]:
    """Evict what can be; what there was no room for, and what the file system said to that."""
    full: OSError | None = None
    waiting: list[EnvironmentId] = []
    for environment_id in environments:
        try:
            reason = _evict(store, environment_id, planned_at)
        except OSError as error:
            if full_error(error, store.layout.root) is None:
                # Of this one: what lies there is immutable, or the disk is going bad. The others can go all the same.
                reason = f"it cannot be removed ({error.filename or 'a file'}: {error.strerror or error})"
                logger.warning("%s: environment %s stays: %s", store.layout.root, environment_id[:16], reason)
            else:
                full = error
                waiting.append(environment_id)
                continue
        if reason:
            gone.kept.append(Kept(environment_id, reason))
        else:
            gone.evicted.append(environment_id)
    return full, waiting


def _evict(store: Store, environment_id: EnvironmentId, planned_at: float) -> str:
    """Remove an environment; returns why it could not be."""
    layout = store.layout
    lease = Lease(layout.lease(environment_id))
    try:
        with Lock(layout.lock(environment_id), timeout_s=0):
            # Before the lease is claimed, which makes its file.
            if last_used(layout, environment_id) > planned_at:
                return "somebody has just used it"
            gone = _take(store, environment_id, lease)
    except _InUse:
        processes = ", ".join(map(str, holders(lease.path))) or "of another machine"
        return f"a process runs from it ({processes})"
    except StoreBusy as error:
        return f"it is being built ({error.holder})"
    if gone is not None:
        shutil.rmtree(gone, ignore_errors=True)
    return ""


class _InUse(Exception):
    """Somebody holds the lease."""


def _take(store: Store, environment_id: EnvironmentId, lease: Lease) -> Path | None:
    """Take an environment out of the store, for as long as nobody can begin to run from it; where its prefix went."""
    layout = store.layout
    _make_lease_file(layout, environment_id)
    with lease.claimed() as free:
        if not free:
            raise _InUse
        ready_mark.remove(layout.ready(environment_id))
        layout.inventory(environment_id).unlink(missing_ok=True)
        gone = _set_aside(store, layout.prefix(environment_id))
        layout.manifest(environment_id).unlink(missing_ok=True)
        return gone


def _make_lease_file(layout: Layout, environment_id: EnvironmentId) -> None:
    """Make what a lease is held on, if nobody has, also where no inode is left: the inventory's is the next to go.

    Should the environment stay after all, every file is compared before its next use, as without any inventory.
    """
    lease = layout.lease(environment_id)
    try:
        lease.touch(0o644, exist_ok=False)
    except FileExistsError:
        return
    except OSError as error:
        if full_error(error, layout.root) is None:
            raise
        layout.inventory(environment_id).unlink(missing_ok=True)


def _set_aside(store: Store, prefix: Path) -> Path | None:
    """Move a prefix to where nobody looks for it; None if there is none.

    From then on any other eviction may remove it, so nothing is made there beforehand.
    """
    aside = store.layout.tmp / f"{scratch.EVICTED}{uuid.uuid4().hex}"
    try:
        scratch.set_aside(prefix, aside)
    except FileNotFoundError:
        if os.path.lexists(prefix):
            raise  # it is tmp that is missing
        return None
    return aside


def _sweep_leftovers(store: Store) -> None:
    """Remove prefixes without a ready mark, unless somebody is building there, and what nobody makes any more."""
    for path in leftovers(store.layout):
        with contextlib.suppress(StoreBusy, OSError), Lock(store.layout.locks / f"{path.name}.lock", timeout_s=0):
            leases = [Lease(lease) for lease in store.layout.leases.glob(f"{path.name}*")]
            # Built and marked since it was listed: the lock says that nobody is about to.
            if path in leftovers(store.layout) and all(lease.is_free() for lease in leases):
                gone = _set_aside(store, path)
                if gone is not None:
                    shutil.rmtree(gone, ignore_errors=True)
    scratch.sweep(store.layout, scratch.EVICTED)


def _remove_unneeded_chunks(store: Store, grace_s: float) -> int:
    """Remove chunks that no manifest names; returns how many."""
    try:
        lock = Lock(store.layout.collect_lock, timeout_s=0)
        with lock:
            needed = needed_chunks(store)
            before = time.time() - grace_s
            count = 0
            for digest, entry in chunk_files(store.layout):
                with contextlib.suppress(OSError):
                    # One that is new may have come ahead of its manifest.
                    if digest not in needed and entry.stat().st_mtime <= before:
                        os.unlink(entry.path)
                        count += 1
            return count
    except StoreBusy:
        logger.info("%s: somebody adds chunks, so none were removed", store.layout.root)
        return 0
