"""Making a built environment whole again, in place: what is missing or was altered is written anew from its chunks.

Each file appears by a rename, so processes that run from the environment go on: they keep the file that they have
open. Does not fetch: what needs a chunk that is not here stays, and the repair can be called again when it is.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from worker_bootstrap import ready_mark, relocated_code, soundness
from worker_bootstrap.blueprint import Blueprint, Run
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.donor import seal
from worker_bootstrap.durable import full_error
from worker_bootstrap.errors import ChunkMissing, ManifestInvalid, MaterialiseError
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.manifest import File
from worker_bootstrap.relocate import relocate
from worker_bootstrap.store import Store
from worker_bootstrap.verify import ADDED, Damage, altered_byte_code, blueprint_of, compare

logger = logging.getLogger("envship.repair")

ROUNDS = 2
"""What lay behind a link in the place of a folder looks whole until the folder is back."""


class Outcome(NamedTuple):
    """What was wrong and is not any more, what still is, and the first chunk without which nothing can be done there.

    What a file that names its prefix should hold cannot be told without its chunk either: so nothing may be *left*
    where one is *missing*.
    """

    mended: list[Damage]
    left: list[Damage]
    missing: ChunkMissing | None

    @property
    def is_whole(self) -> bool:
        return not self.left and self.missing is None


def repair(store: Store, environment_id: EnvironmentId, *, may_run: bool = True) -> list[Damage]:
    """As `mend`, but what cannot be mended is an error; return what was wrong.

    Raises
    ------
    ChunkMissing
        If a chunk that is needed to mend it is not in the store. Everything else has been mended.
    MaterialiseError
        If something cannot be mended.
    EnvironmentMissing, ManifestInvalid, StoreFull
        As `mend`.
    """
    outcome = mend(store, environment_id, may_run=may_run)
    if outcome.missing is not None:
        raise outcome.missing
    if outcome.left:
        raise MaterialiseError(environment_id, outcome.left[0].path, outcome.left[0].problem)
    return outcome.mended


def mend(store: Store, environment_id: EnvironmentId, *, remove_added: bool = False, may_run: bool = True) -> Outcome:
    """Compare a prefix in the writable store with its manifest, file by file, and mend what can be mended.

    Parameters
    ----------
    remove_added
        Remove files that the environment does not have, as well. Without it they stay, and are not returned.
    may_run
        Whether the environment's interpreter may be started, to compile modules that name the prefix.

    Raises
    ------
    EnvironmentMissing, ChunkMissing
        If the manifest, or a listing, is not in the store.
    ManifestInvalid
        If the environment breaks the format.
    StoreFull
        If there is no room.
    MaterialiseError
        If the file system refuses something else.

    Notes
    -----
    The caller holds the environment's lock. Idempotent. Whoever is killed in the middle leaves some files mended.
    """
    layout = store.layout
    prefix = layout.prefix(environment_id)
    blueprint = blueprint_of(store, environment_id, prefix)
    made = soundness.made_there(layout, environment_id)
    stale = list(altered_byte_code(prefix, made or {}))
    found, missing = _compared(store, blueprint, prefix, remove_added)
    left = found
    try:
        for _ in range(ROUNDS):
            if not left:
                break
            lost = _Mender(store, blueprint, prefix).mend(left)
            left, missing = _compared(store, blueprint, prefix, remove_added)
            missing = missing or lost
        still = {each.path for each in left}
        mended = [each for each in found if each.path not in still]
        if not left and missing is None:
            mended += stale
            # The byte code that was made for another place is whole, and names that one.
            if stale or not made or not ready_mark.is_of(layout.ready(environment_id), prefix):
                files = (file for run in blueprint.runs for file in run.files)
                python = store.read_manifest(environment_id).python
                made = relocated_code.compile_again(prefix, files, python, may_run=may_run)
            _restore_times(blueprint, prefix)
            soundness.seal(layout, environment_id, blueprint, made, str(prefix))
        else:
            left = [*left, *stale]
        if mended:
            first = mended[0]
            logger.warning("environment %s: %d files were mended, such as %s", environment_id[:16], len(mended), first)
    except OSError as error:
        full = full_error(error, layout.root)
        if full is not None:
            raise full from error
        raise MaterialiseError(environment_id, str(error.filename or ""), str(error.strerror)) from error
    return Outcome(mended, left, missing)


def _compared(
    store: Store, blueprint: Blueprint, prefix: Path, remove_added: bool
) -> tuple[list[Damage], ChunkMissing | None]:
    """What is damaged, and the first chunk without which more cannot be told."""
    found: list[Damage] = []
    try:
        for each in compare(store, blueprint, prefix):
            if remove_added or each.problem != ADDED:
                found.append(each)
    except ChunkMissing as error:
        return found, error
    return found, None


class _Mender:
    """Writes what is damaged in *prefix* anew; links are never followed."""

    def __init__(self, store: Store, blueprint: Blueprint, prefix: Path) -> None:
        self._store = store
        self._blueprint = blueprint
        self._prefix = prefix

    def mend(self, damage: Iterable[Damage]) -> ChunkMissing | None:
        """Mend these, in the order in which they were built: what lies below a folder after the folder.

        Files whose chunks are not here stay as they are; returns the first chunk that is not.
        """
        missing: ChunkMissing | None = None
        waiting: set[str] = set()
        paths = {each.path for each in damage if each.problem != ADDED}
        for each in damage:
            if each.problem == ADDED:
                self._clear(each.path)
        for path in self._blueprint.directories:
            if path in paths:
                self._clear(path)
                os.mkdir(self._prefix / path)
                os.chmod(self._prefix / path, 0o755)
        for run in self._blueprint.runs:
            wanted = [file for file in run.files if file.path in paths]
            if wanted:
                try:
                    for file, content in self._contents(run, wanted):
                        self._write(file, content)
                except ChunkMissing as error:
                    missing = missing or error
                    waiting.update(file.path for file in wanted)
        for hard_link in self._blueprint.hard_links:
            # A file that was written anew is another one than its other names still are.
            if (hard_link.path in paths or hard_link.target in paths) and hard_link.target not in waiting:
                self._clear(hard_link.path)
                os.link(self._prefix / hard_link.target, self._prefix / hard_link.path, follow_symlinks=False)
        for link in self._blueprint.links:
            if link.path in paths:
                self._clear(link.path)
                os.symlink(link.target, self._prefix / link.path)
        return missing

    def _contents(self, run: Run, wanted: list[File]) -> Iterator[tuple[File, bytes]]:
        content = b"".join(self._store.read_chunk(chunk.digest) for chunk in run.chunks)
        position = 0
        for file in run.files:
            if file in wanted:
                yield file, content[position : position + file.size_bytes]
            position += file.size_bytes
        if position != len(content):
            raise ManifestInvalid(f"chunks hold {len(content)} bytes for files of {position}", str(self._prefix))

    def _write(self, file: File, content: bytes) -> None:
        if file.relocation is not None:
            content = relocate(content, file.relocation, str(self._prefix))
        handle, name = tempfile.mkstemp(dir=self._store.layout.tmp)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
                out.flush()
                seal(out.fileno(), file)
                os.fsync(out.fileno())  # the mark may be durable: it says that all is on disk
            if os.path.isdir(self._prefix / file.path):
                self._clear(file.path)
            os.replace(name, self._prefix / file.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _clear(self, path: str) -> None:
        target = self._prefix / path
        if target.is_symlink() or not target.is_dir():
            target.unlink(missing_ok=True)
        else:
            shutil.rmtree(target)


def _restore_times(blueprint: Blueprint, prefix: Path) -> None:
    """Give files that somebody touched without changing them their time back."""
    for run in blueprint.runs:
        for file in run.files:
            path = prefix / file.path
            found = os.lstat(path)
            if found.st_mtime_ns != WRITTEN_AT_NS and stat.S_ISREG(found.st_mode):
                os.utime(path, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS), follow_symlinks=False)
