"""Building the prefix of an environment from the chunks of a store.

Everything is checked before anything is written (`worker_bootstrap.blueprint`), and each file's content while it is
(`worker_bootstrap.writer`). The prefix is built aside, renamed into place and marked ready, under the environment's
lock: whoever dies in the middle leaves nothing that counts. What a crash of the machine left is checked file by file
before it counts again. Does not fetch; a chunk that is not here is `ChunkMissing`.

`main` is the same in a process of its own, so that no event loop waits for it: see `worker_bootstrap.build`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from worker_bootstrap import crew, donor, errors, evict, process_limit, ready_mark, relocated_code, soundness
from worker_bootstrap.arrivals import Arrivals
from worker_bootstrap.blueprint import Blueprint, draw, read_listings
from worker_bootstrap.digest import EnvironmentId, is_digest
from worker_bootstrap.donor import LINK_MODES, Donors
from worker_bootstrap.durable import full_error
from worker_bootstrap.errors import ChunkMissing, EnvshipError, MaterialiseError, StoreFull
from worker_bootstrap.layout import SHORT_ID_LENGTH, Layout
from worker_bootstrap.lock import Lease, Lock
from worker_bootstrap.repair import repair
from worker_bootstrap.scratch import set_aside, sweep
from worker_bootstrap.store import Store
from worker_bootstrap.writer import Report, Work, Writer

logger = logging.getLogger("envship.materialise")

MARGIN_BYTES = 16 << 20
"""Room left for the file system's own needs when it is checked whether an environment fits."""
REPORT_INTERVAL_S = 0.1


def materialise(
    store: Store,
    environment_id: EnvironmentId,
    *,
    link_mode: str = "auto",
    report: Report | None = None,
    durable: bool = False,
    arrivals: Arrivals | None = None,
    processes: int | None = None,
    may_run: bool = True,
) -> Path:
    """Build an environment, or find it built; return its prefix.

    Parameters
    ----------
    store
        Holds the manifest and all chunks. The prefix is built in its writable part; one that is ready in a read-only
        part is returned as it is.
    environment_id
        The environment.
    link_mode
        How files of environments already built here are reused: ``auto``, ``reflink``, ``hardlink``, ``copy``.
    report
        Told about the progress.
    durable
        Wait until all is on disk, so that it counts after a crash of the machine, and on other machines that see the
        store. Without it, it is checked before it is used again.
    arrivals
        Tells which chunks have come, where some are still being fetched; without it, all of them are there.
    processes
        How many write; None: as many as there are processors, up to 4, if this process may be forked (it runs no
        threads), else this one alone.
    may_run
        Whether the environment's own interpreter may be started, to compile modules that name the prefix. Who builds
        for others, with rights that these do not have, better starts nothing that comes with it.

    Raises
    ------
    EnvironmentMissing, ChunkMissing
        If the manifest or a chunk is not in the store (any more).
    TransferError
        If chunks were still to come, and will not.
    ManifestInvalid
        If the environment breaks the format or would write outside of its prefix. Nothing was written.
    PrefixTooLong
        If the store's path is too long for it. Nothing was written.
    StoreFull
        If there is not enough room, found out before or while writing.
    MaterialiseError
        If a file cannot be written.
    SettingInvalid
        If there is no such link mode.

    Notes
    -----
    Idempotent; safe in any number of processes and threads at once: one builds, the others wait. A failed or killed
    build leaves nothing that counts as built; its remains are removed by the next one. One that is built, and turns out
    to be damaged at a quick look (`worker_bootstrap.soundness`), is mended in place.
    """
    if processes is None:
        processes = crew.PROCESSES if crew.may_fork() else 1
    work = Work(report or _silent, arrivals or Arrivals.none(), processes, may_run)
    try:
        prefix = soundness.sound_prefix(store, environment_id)
        if prefix is None:
            with Lock(store.layout.lock(environment_id)):
                prefix = soundness.sound_prefix(store, environment_id) or _restored(store, environment_id, work)
                if prefix is None:
                    prefix = _build(store, environment_id, link_mode, work)
        mark = store.layout.ready(environment_id)
        is_ours = prefix == store.layout.prefix(environment_id) and mark.exists()
        if durable and is_ours and not ready_mark.is_valid(mark, prefix, durable=True):
            ready_mark.write(mark, prefix, store.layout.tmp, durable=True)
    except OSError as error:
        raise _explained(error, store.layout, environment_id) from error
    return prefix


def _restored(store: Store, environment_id: EnvironmentId, work: Work) -> Path | None:
    """The prefix that somebody damaged, or that was built before the machine started: compared, mended, marked again.

    Mended rather than built again, because processes may run from it. None if it cannot be mended and none does.
    """
    layout = store.layout
    mark, prefix = layout.ready(environment_id), store.standing(environment_id)
    if prefix is None:
        return None
    try:
        repair(store, environment_id, may_run=work.may_run)
    except (ChunkMissing, StoreFull):
        raise
    except EnvshipError as error:
        if not Lease(layout.lease(environment_id)).is_free():
            raise
        logger.warning("environment %s cannot be mended: %s", environment_id[:16], error)
        return None
    if not ready_mark.is_valid(mark, prefix):
        ready_mark.write(mark, prefix, layout.tmp, durable=False)
    return prefix


def _build(store: Store, environment_id: EnvironmentId, link_mode: str, work: Work) -> Path:
    layout = store.layout
    prefix = layout.prefix(environment_id)
    manifest = store.read_manifest(environment_id)
    work.arrivals.until([package.listing.digest for package in manifest.packages], store.has_chunk)
    built = donor.built(store, manifest)
    listings = read_listings(manifest, store.read_chunk, donor.listings_of(built))
    blueprint = draw(manifest, listings, str(prefix))
    donors = Donors(donor.find(store, manifest, listings, built), link_mode)
    ready_mark.remove(layout.ready(environment_id))
    _sweep(layout, environment_id)
    _check_room(layout, blueprint, donors)
    if os.statvfs(layout.envs).f_flag & os.ST_NOEXEC:
        reason = (
            "its file system is mounted noexec, so nothing runs from there; put the store elsewhere (ENVSHIP_STORE)"
        )
        raise MaterialiseError(environment_id, str(layout.envs), reason)
    entries = (entry for listing in listings for entry in listing.entries)
    modules = relocated_code.modules_without_code(entries, manifest.python)
    scratch = tempfile.mkdtemp(prefix=_scratch_name(environment_id), dir=layout.tmp)

    def meanwhile() -> None:
        compiler = relocated_code.compiler_of(scratch, manifest.python, may_run=work.may_run)
        made = relocated_code.compile_modules(scratch, str(prefix), modules, compiler)
        soundness.keep_inventory(layout, environment_id, blueprint, made)

    try:
        Writer(store, blueprint, donors, scratch, str(prefix), work).write(meanwhile)
        soundness.set_times(scratch, relocated_code.folders_of(scratch, modules))
        os.chmod(scratch, 0o755)
        soundness.set_times(scratch, [""])
        os.rename(scratch, prefix)
        ready_mark.write(layout.ready(environment_id), prefix, layout.tmp, durable=False)
    except BaseException as error:
        # Before the remains are gone: afterwards there is room again.
        explained = _explained(error, layout, environment_id) if isinstance(error, OSError) else None
        shutil.rmtree(scratch, ignore_errors=True)
        if explained is not None:
            raise explained from error
        raise
    return prefix


def _explained(error: OSError, layout: Layout, environment_id: EnvironmentId) -> EnvshipError:
    full = full_error(error, layout.root)
    return full or MaterialiseError(environment_id, str(error.filename or ""), error.strerror or str(error))


def _scratch_name(environment_id: EnvironmentId) -> str:
    return f"build-{environment_id[:SHORT_ID_LENGTH]}-"


def _sweep(layout: Layout, environment_id: EnvironmentId) -> None:
    """Remove what killed builds of this environment left (its lock is held), and whatever is stale."""
    prefix = layout.prefix(environment_id)
    for mark in layout.ready_marks.glob(environment_id[:SHORT_ID_LENGTH] + "*"):
        if is_digest(mark.name) and mark.name != environment_id:
            raise MaterialiseError(environment_id, str(prefix), f"{mark.name} has the same first digits and lies there")
    if os.path.lexists(prefix):
        set_aside(prefix, layout.tmp / f"{_scratch_name(environment_id)}old-{os.getpid()}")
    sweep(layout, _scratch_name(environment_id))


def _check_room(layout: Layout, blueprint: Blueprint, donors: Donors) -> None:
    room = os.statvfs(layout.tmp)
    free_bytes = room.f_bavail * room.f_frsize
    needed_bytes = blueprint.needed_bytes(donors.has) + MARGIN_BYTES
    if needed_bytes > free_bytes:
        raise StoreFull(str(layout.root), needed_bytes, free_bytes)
    if room.f_files and room.f_favail < blueprint.needed_inodes:  # btrfs counts no inodes and says 0
        raise StoreFull(str(layout.root), needed_bytes, None)


def _silent(done_bytes: int, total_bytes: int) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Build as a process of its own: JSON lines on standard output, exit code 0 or 1.

    ``{"done_bytes": …, "total_bytes": …}`` at most ten times a second, then ``{"prefix": …}`` or
    ``{"error": {"type": …, "values": […]}}`` (see `read_error`). Ends when standard input is a pipe whose other end
    has closed: the parent is gone then. With ``--arriving``, chunks still come, and standard input tells of them
    (`worker_bootstrap.arrivals`).
    """
    parser = argparse.ArgumentParser(prog="worker_bootstrap.materialise")
    parser.add_argument("store", type=Path)
    parser.add_argument("environment_id", type=EnvironmentId)
    parser.add_argument("--read-only", type=Path, action="append", default=[])
    parser.add_argument("--link-mode", choices=LINK_MODES, default="auto")
    parser.add_argument("--arriving", action="store_true")
    parser.add_argument("--store-limit", type=int, help="evict what is over so many bytes, after a build")
    options = parser.parse_args(arguments)
    arrivals = Arrivals() if options.arriving else Arrivals.none()
    gc.disable()  # hundreds of thousands of objects that live to the end, and no cycles worth collecting
    try:
        with process_limit.named():
            _end_with_parent(arrivals)
        store = Store(options.store, options.read_only)
        was_built = store.built(options.environment_id) is not None
        prefix = materialise(
            store,
            options.environment_id,
            link_mode=options.link_mode,
            report=_Lines(),
            arrivals=arrivals,
            # The one thread beside this one listens to the parent, and holds no lock that a copy would need.
            processes=crew.PROCESSES,
        )
        if options.store_limit is not None and not was_built:
            _make_room(store, options.store_limit, options.environment_id)
    except Exception as error:
        if not isinstance(error, EnvshipError):
            error = MaterialiseError(options.environment_id, "", f"{type(error).__name__}: {error}")
        _tell({"error": {"type": type(error).__name__, "values": list(error.values)}})
        sys.exit(1)
    _tell({"prefix": str(prefix)})
    sys.exit(0)


def _make_room(store: Store, limit_bytes: int, environment_id: EnvironmentId) -> None:
    """Evict what is over the limit. What has been built counts, even if this fails."""
    try:
        evict.collect(store, limit_bytes, keep=[environment_id])
    except (EnvshipError, OSError) as error:
        logger.warning("the store %s was not brought below its limit: %s", store.layout.root, error)


def read_error(raw: Any) -> EnvshipError:
    """The error that `main` wrote as ``{"type": …, "values": […]}``; an `EnvshipError` of what it says otherwise."""
    try:
        kind = getattr(errors, raw["type"])
        if issubclass(kind, EnvshipError):
            found: EnvshipError = kind(*raw["values"])
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    return EnvshipError(f"the build failed: {raw!r}")


class _Lines:
    """Progress as lines of JSON, at most one every `REPORT_INTERVAL_S`."""

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + REPORT_INTERVAL_S
            _tell({"done_bytes": done_bytes, "total_bytes": total_bytes})


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the protocol with the parent


def _end_with_parent(arrivals: Arrivals) -> None:
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_wait_for_end, args=[arrivals], name="envship-parent", daemon=True).start()


def _wait_for_end(arrivals: Arrivals) -> None:
    try:
        arrivals.listen(0)
    finally:
        os._exit(1)
