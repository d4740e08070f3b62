"""A directory holding chunks, manifests and built environments.

One store is writable; any number of read-only ones are looked in first and used in place. Chunks are immutable and
verified on every read, so a power cut leaves some that read as missing, and are written anew by whoever brings them
again: only manifests and ready marks are synced. Building is `worker_bootstrap.materialise`, collecting
`worker_bootstrap.evict`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from worker_bootstrap import codec, founding, ready_mark
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of, is_digest
from worker_bootstrap.durable import content_of, full_error, publish, sync_folder, unusable_error
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, EnvironmentMissing
from worker_bootstrap.layout import Layout
from worker_bootstrap.lock import Lock
from worker_bootstrap.manifest import CHUNK_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, Manifest

logger = logging.getLogger("envship.store")

__all__ = ["PAYLOAD_LIMIT_BYTES", "Store", "full_error", "publish", "sync_folder"]

EMPTY = digest_of(b"")
PAYLOAD_LIMIT_BYTES = CHUNK_LIMIT_BYTES + (1 << 20)
"""No codec makes a chunk larger than this; a longer file is damaged, and is not read into memory."""


class Store:
    """The writable store of this host, with read-only ones in front of it.

    Parameters
    ----------
    root
        The writable store; made if it is not there.
    read_only
        Other stores, searched first, in this order. Never written to.

    Notes
    -----
    Safe to use from any number of threads and processes at once. Holds no open files. Whether the stores can be
    trusted is `worker_bootstrap.location`'s question. A read-only store that vanishes, or a file in it that cannot be
    read, is as one that does not hold what is looked for.

    Raises
    ------
    StoreError
        If the writable store was made by a version of envship that keeps things elsewhere, or cannot be written to.
    StoreFull
        If there is no room to make it.
    """

    def __init__(self, root: Path, read_only: Sequence[Path] = ()) -> None:
        self.layout = Layout(Path(root))
        self.layouts = (
            *(other for other in map(Layout, map(Path, read_only)) if founding.is_readable(other)),
            self.layout,
        )
        self.host_id = ""
        self.restore()

    def restore(self) -> None:
        """Make what is not there: at first everything, later what somebody removed, as those do who need room.

        The id of the host stays. Raises as the constructor.
        """
        if self.host_id and all(map(os.path.exists, (*self.layout.folders, self.layout.host_id))):
            return
        try:
            self.host_id = founding.prepare(self.layout, self.host_id)
        except OSError as error:
            raise unusable_error(error, self.layout.root) from error

    def has_chunk(self, digest: Digest) -> bool:
        """Whether some store holds a chunk of that name (unread, so perhaps damaged)."""
        return self._find(digest) is not None

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those of *digests* that no store holds, in the order given, each once."""
        return [digest for digest in dict.fromkeys(digests) if not self.has_chunk(digest)]

    def lost(self, digests: Iterable[Digest]) -> list[Digest]:
        """As `missing`, but each chunk from before the machine started is read, once: a power cut may have left less.

        Copies of which it has are dropped.
        """
        return [digest for digest in dict.fromkeys(digests) if not self._is_kept(digest)]

    def read_chunk(self, digest: Digest) -> bytes:
        """The verified, uncompressed bytes of a chunk.

        Raises
        ------
        ChunkMissing
            If no store holds it intact. A damaged copy in the writable store is dropped, so that it is fetched again.
        """
        for path, codec_name in self._candidates(digest):
            payload = self._read(path)
            if payload is None:
                continue
            try:
                data = codec.decode(payload, codec_name, CHUNK_LIMIT_BYTES)
                if digest_of(data) == digest:
                    return data
            except codec.CodecError:
                pass
            self._drop(path)
        raise ChunkMissing(digest, str(self.layout.root))

    def read_unverified(self, digest: Digest) -> bytes:
        """The uncompressed bytes of a chunk, for a reader that compares every one of them with something else.

        Raises
        ------
        ChunkMissing
            If no store holds it, or none that can be decoded.
        """
        for path, codec_name in self._candidates(digest):
            payload = self._read(path)
            if payload is not None:
                try:
                    return codec.decode(payload, codec_name, CHUNK_LIMIT_BYTES)
                except codec.CodecError:
                    self._drop(path)
        raise ChunkMissing(digest, str(self.layout.root))

    def read_encoded(self, digest: Digest, accept: Collection[str]) -> tuple[str, bytes]:
        """A chunk as (codec name, payload) for a peer that decodes the codecs *accept*.

        Sent as it lies on disk where the peer can read that, transcoded otherwise. Not verified here: the peer does.

        Raises
        ------
        ChunkMissing
            If no store holds it (intact, where it must be transcoded).
        """
        for path, codec_name in self._candidates(digest):
            if codec_name in accept or codec_name == "raw":
                payload = self._read(path)
                if payload is not None:
                    return codec_name, payload
        data = self.read_chunk(digest)
        chosen = codec.choose(accept)
        return chosen, codec.encode(data, chosen)

    def write_chunk(
        self, data: bytes | memoryview, codec_name: str | None = None, *, digest: Digest | None = None
    ) -> Digest:
        """Compress and keep *data*; return its digest. Does nothing if it is there already, and whole.

        *digest* spares the caller who has just computed it a second time.
        """
        digest = digest or digest_of(data)
        if not self._is_kept(digest):
            chosen = codec_name or codec.accepted()[0]
            self._publish(self.layout.chunk(digest, codec.SUFFIXES[chosen]), codec.encode(data, chosen), sync=False)
        return digest

    def write_encoded(self, digest: Digest, codec_name: str, payload: bytes | memoryview, where: str) -> None:
        """Verify a chunk that came from the peer *where*, then keep it as it came.

        Raises
        ------
        ChunkInvalid
            If the payload does not decode to content with that digest. Nothing is written.
        StoreFull
            If there is no room.
        """
        try:
            actual = digest_of(codec.decode(payload, codec_name, CHUNK_LIMIT_BYTES))
        except codec.CodecError as error:
            raise ChunkInvalid(digest, str(error), where) from error
        if actual != digest:
            raise ChunkInvalid(digest, f"its digest is {actual}", where)
        if not self._is_kept(digest):
            self._publish(self.layout.chunk(digest, codec.SUFFIXES[codec_name]), payload, sync=False)

    def write_manifest(self, manifest: Manifest) -> EnvironmentId:
        """Keep *manifest*, synced to disk; return its environment id. A damaged copy is replaced."""
        path, data = self.layout.manifest(manifest.id), manifest.to_bytes()
        if content_of(path, len(data)) != data:
            self._publish(path, data, sync=True)
        else:
            self.touch(manifest.id)
        return manifest.id

    def read_manifest(self, environment_id: EnvironmentId) -> Manifest:
        """The verified manifest with that id.

        Raises
        ------
        EnvironmentMissing
            If no store holds it intact. A damaged copy in the writable store is dropped, so that it is sent again.
        ManifestInvalid
            If it has that id, but breaks the format.
        """
        for layout in self.layouts:
            path = layout.manifest(environment_id)
            data = content_of(path, MANIFEST_LIMIT_BYTES, self._drop)
            if data is None:
                continue
            if str(digest_of(data)) == environment_id:
                return Manifest.from_bytes(data, environment_id)
            self._drop(path)
        raise EnvironmentMissing(environment_id, str(self.layout.root))

    def touch(self, environment_id: EnvironmentId) -> None:
        """Note that an environment is used now: what nobody used for the longest time is evicted first."""
        with contextlib.suppress(OSError):  # in a read-only store, or evicted just now
            os.utime(self.layout.manifest(environment_id))

    def adding(self) -> Lock:
        """A context in which chunks may be added, or found to be there already, before the manifest that names them."""
        return Lock(self.layout.collect_lock, shared=True)

    def environments(self) -> list[EnvironmentId]:
        """Ids of all manifests held, sorted."""
        return sorted({environment_id for layout in self.layouts for environment_id in self.environments_in(layout)})

    def environments_in(self, layout: Layout) -> list[EnvironmentId]:
        """Ids of all manifests in one of the stores."""
        try:
            names = [path.stem for path in layout.manifests.glob("*.json")]
        except OSError as error:  # a file server is away
            if layout is self.layout:
                raise
            logger.warning("the store %s is left alone: %s", layout.root, error)
            return []
        return [EnvironmentId(name) for name in names if is_digest(name)]

    def used_last(self, environments: Iterable[EnvironmentId]) -> list[EnvironmentId]:
        """Those of *environments* whose manifest is in the writable store, the one that was used last first."""
        times = {}
        for environment_id in environments:
            with contextlib.suppress(OSError):
                times[environment_id] = os.stat(self.layout.manifest(environment_id)).st_mtime_ns
        return sorted(times, key=lambda environment_id: -times[environment_id])

    def built(self, environment_id: EnvironmentId) -> Path | None:
        """The prefix of an environment that is built and marked ready here, or None.

        One that was built before the machine was last started may be missing here though it is there:
        `worker_bootstrap.materialise` looks at its files and marks it again.
        """
        layout = self.built_in(environment_id)
        return None if layout is None else layout.prefix(environment_id)

    def standing(self, environment_id: EnvironmentId) -> Path | None:
        """The prefix of an environment in the writable store that was marked ready once, in whatever boot, or None."""
        layout = self.layout
        prefix = layout.prefix(environment_id)
        return prefix if layout.ready(environment_id).exists() and prefix.is_dir() else None

    def lease(self, environment_id: EnvironmentId) -> Path:
        """The file that whoever runs from that environment holds a lease on: it lies in the store that it runs from."""
        lease = (self.built_in(environment_id) or self.layout).lease(environment_id)
        # Who may not write to a store cannot make the file; `staging` makes it.
        return lease if os.path.exists(lease) else self.layout.lease(environment_id)

    def built_in(self, environment_id: EnvironmentId) -> Layout | None:
        """The store in which an environment is built and marked ready.

        Our own comes first here: if it was built there as well, one of the others was missing or damaged then. One that
        is mounted noexec is left out, for it can be built in our own.
        """
        for layout in (self.layout, *self.layouts[:-1]):
            prefix = layout.prefix(environment_id)
            is_built = ready_mark.is_valid(layout.ready(environment_id), prefix) and os.path.isdir(prefix)
            if is_built and (layout is self.layout or _can_run(layout)):
                return layout
        return None

    def free_bytes(self) -> int:
        """Room for us on the file system of the writable store."""
        room = os.statvfs(self.layout.root)
        return room.f_bavail * room.f_frsize

    def _candidates(self, digest: Digest) -> Iterator[tuple[Path, str]]:
        files = self._files(digest)
        return ((layout.chunk(digest, codec.SUFFIXES[name]), name) for layout, name, _ in files)

    def _files(self, digest: Digest) -> Iterator[tuple[Layout, str, os.stat_result]]:
        """Every copy of a chunk that this process can decode: which store has it, its codec, its status."""
        known = codec.available()
        for layout in self.layouts:
            for name in known:
                path = layout.chunk_name(digest, codec.SUFFIXES[name])
                found = _status(path)
                if found is None:
                    continue
                if found.st_size == 0 and digest != EMPTY and stat.S_ISREG(found.st_mode):
                    self._drop(Path(path))  # as a crash of the machine leaves files whose bytes it lost
                else:
                    yield layout, name, found

    def _find(self, digest: Digest) -> tuple[Layout, str, os.stat_result] | None:
        return next(self._files(digest), None)

    def _is_kept(self, digest: Digest) -> bool:
        """Whether a chunk is there and whole. Of one from before the machine started, a power cut may have left less.

        Such a one is read, once per boot: then its time is that of the reading.
        """
        file = self._find(digest)
        if file is None:
            return False
        layout, name, found = file
        if found.st_ctime > ready_mark.booted_at() or layout is not self.layout:
            return True
        try:
            self.read_chunk(digest)
        except ChunkMissing:
            return False
        with contextlib.suppress(OSError):  # dropped for another copy, or evicted just now
            os.utime(layout.chunk(digest, codec.SUFFIXES[name]))
        return True

    def _read(self, path: Path) -> bytes | None:
        """The file's bytes; None if it is gone, cannot be read, or is damaged by its size alone.

        What is damaged, or lies where the disk has gone bad, is dropped.
        """
        data = content_of(path, PAYLOAD_LIMIT_BYTES, self._drop)
        if data is not None and len(data) > PAYLOAD_LIMIT_BYTES:
            self._drop(path)
            return None
        return data

    def _drop(self, path: Path) -> None:
        dropped = ""
        if self.layout.root in path.parents:
            try:
                path.unlink(missing_ok=True)
                dropped = ": dropped"
            except OSError as error:  # whoever may write to the store will drop it
                dropped = f", and cannot be dropped: {error.strerror}"
        logger.warning("%s is damaged%s", path, dropped)

    def _publish(self, path: Path, data: bytes | memoryview, *, sync: bool) -> None:
        try:
            try:
                publish(path, data, self.layout.tmp, sync=sync)
            except FileNotFoundError:
                self.restore()
                publish(path, data, self.layout.tmp, sync=sync)
        except OSError as error:
            raise unusable_error(error, self.layout.root) from error


def _status(path: str) -> os.stat_result | None:
    """None if there is no such file, or an ailing network mount answers whatever else."""
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _can_run(layout: Layout) -> bool:
    """Whether programs can be executed from where the environments of a store lie."""
    with contextlib.suppress(OSError):
        if os.statvfs(layout.envs).f_flag & os.ST_NOEXEC:
            logger.info("nothing runs from the store %s: its file system is mounted noexec", layout.root)
            return False
    return True
