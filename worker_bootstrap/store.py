"""A directory holding chunks, manifests and built environments.

One store is writable; any number of read-only ones are looked in first and used in place. Chunks are immutable and
verified on every read, so a crash while one is written leaves a chunk that reads as missing, and nothing else: only
manifests and ready marks are synced. Building is `worker_bootstrap.materialise`, collecting `worker_bootstrap.evict`.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from worker_bootstrap import codec
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of, is_digest
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, EnvironmentMissing, StoreFull
from worker_bootstrap.layout import STORE_VERSION, Layout
from worker_bootstrap.manifest import CHUNK_LIMIT_BYTES, Manifest


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
    Safe to use from any number of threads and processes at once. Holds no open files.
    """

    def __init__(self, root: Path, read_only: Sequence[Path] = ()) -> None:
        self.layout = Layout(Path(root))
        self.layouts = (*(Layout(Path(path)) for path in read_only), self.layout)
        self.host_id = _prepare(self.layout)

    def has_chunk(self, digest: Digest) -> bool:
        """Whether some store holds a chunk of that name (unread, so perhaps damaged)."""
        return self._find(digest) is not None

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those of *digests* that no store holds, in the order given, each once."""
        return [digest for digest in dict.fromkeys(digests) if not self.has_chunk(digest)]

    def read_chunk(self, digest: Digest) -> bytes:
        """The verified, uncompressed bytes of a chunk.

        Raises
        ------
        ChunkMissing
            If no store holds it intact. A damaged copy in the writable store is dropped, so that it is fetched again.
        """
        for path, codec_name in self._candidates(digest):
            try:
                data = codec.decode(path.read_bytes(), codec_name, CHUNK_LIMIT_BYTES)
            except FileNotFoundError:
                continue
            except codec.CodecError:
                data = None
            if data is not None and digest_of(data) == digest:
                return data
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
                try:
                    return codec_name, path.read_bytes()
                except FileNotFoundError:
                    continue
        data = self.read_chunk(digest)
        chosen = codec.choose(accept)
        return chosen, codec.encode(data, chosen)

    def write_chunk(self, data: bytes | memoryview, codec_name: str | None = None) -> Digest:
        """Compress and keep *data*; return its digest. Does nothing if it is there already."""
        digest = digest_of(data)
        if not self.has_chunk(digest):
            chosen = codec_name or codec.available()[0]
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
        if not self.has_chunk(digest):
            self._publish(self.layout.chunk(digest, codec.SUFFIXES[codec_name]), payload, sync=False)

    def write_manifest(self, manifest: Manifest) -> EnvironmentId:
        """Keep *manifest*, synced to disk; return its environment id."""
        if not self.layout.manifest(manifest.id).exists():
            self._publish(self.layout.manifest(manifest.id), manifest.to_bytes(), sync=True)
        return manifest.id

    def read_manifest(self, environment_id: EnvironmentId) -> Manifest:
        """The verified manifest with that id.

        Raises
        ------
        EnvironmentMissing
            If no store holds it.
        ManifestInvalid
            If the file does not have that id.
        """
        for layout in self.layouts:
            try:
                data = layout.manifest(environment_id).read_bytes()
            except FileNotFoundError:
                continue
            return Manifest.from_bytes(data, environment_id)
        raise EnvironmentMissing(environment_id, str(self.layout.root))

    def environments(self) -> list[EnvironmentId]:
        """Ids of all manifests held, sorted."""
        names = {path.stem for layout in self.layouts for path in layout.manifests.glob("*.json")}
        return sorted(EnvironmentId(name) for name in names if is_digest(name))

    def built(self, environment_id: EnvironmentId) -> Path | None:
        """The prefix of an environment that is built and marked ready here, or None."""
        for layout in self.layouts:
            if layout.ready(environment_id).exists():
                return layout.prefix(environment_id)
        return None

    def _candidates(self, digest: Digest) -> Iterator[tuple[Path, str]]:
        known = codec.available()
        for layout in self.layouts:
            for name in known:
                path = layout.chunk(digest, codec.SUFFIXES[name])
                if path.exists():
                    yield path, name

    def _find(self, digest: Digest) -> Path | None:
        return next((path for path, _ in self._candidates(digest)), None)

    def _drop(self, path: Path) -> None:
        if self.layout.root in path.parents:
            path.unlink(missing_ok=True)

    def _publish(self, path: Path, data: bytes | memoryview, *, sync: bool) -> None:
        try:
            publish(path, data, self.layout.tmp, sync=sync)
        except OSError as error:
            raise full_or(error, self.layout.root) from error


def publish(path: Path, data: bytes | memoryview, tmp: Path, *, sync: bool) -> None:
    """Write *data* to *path* so that readers see all of it or nothing; *tmp* is on the same file system.

    With *sync*, the file and its directory are on disk when this returns.
    """
    handle, name = tempfile.mkstemp(dir=tmp)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in the folder *path* survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full_or(error: OSError, path: Path) -> Exception:
    """`StoreFull` if *error* says that there is no room (blocks, inodes or quota), else *error* itself."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = os.statvfs(path)
        return StoreFull(str(path), 0, room.f_bavail * room.f_frsize)
    return error


def _prepare(layout: Layout) -> str:
    for folder in layout.folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if folder is layout.root else 0o755)
    if not layout.host_id.exists():
        publish(layout.host_id, uuid.uuid4().hex.encode(), layout.tmp, sync=True)
    if not layout.version.exists():
        publish(layout.version, STORE_VERSION.encode(), layout.tmp, sync=True)
    return layout.host_id.read_text().strip()
