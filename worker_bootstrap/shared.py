"""Chunks that a host reads itself, from a bundle or a store that its machine sees: then nobody has to upload them.

The client names the place: a path on a shared file system, or a URL that ``fsspec`` opens with what is installed on the
machine. A host says whether it sees the same there, reads what it is told to, and checks every chunk against its name
before it keeps it; whoever lies about the place only wastes time. Who reads what is decided in
`worker_bootstrap.pulling`; the format of bundles is in ``docs/format.md``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from worker_bootstrap import codec
from worker_bootstrap.bundle_index import CODECS, Extent, opened, read_manifest, survey
from worker_bootstrap.digest import Digest, is_digest
from worker_bootstrap.durable import content_of
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, ContentError
from worker_bootstrap.layout import Layout
from worker_bootstrap.store import PAYLOAD_LIMIT_BYTES, Store

if TYPE_CHECKING:
    from worker_bootstrap.courtesy import Pace  # needs Dask, which reading a bundle does not

logger = logging.getLogger("envship.shared")


class Place(NamedTuple):
    """Where chunks lie that a host may read itself.

    Parameters
    ----------
    kind
        ``bundle`` or ``store``.
    where
        Path or URL.
    mark
        What tells that a host sees the same: the environment id of a bundle, the host id of a store.
    """

    kind: str
    where: str
    mark: str


NOWHERE = Extent(0, 0, 0)
PULL_WAIT_LIMIT_S = 60.0
"""The limit of what is received delays an answer so long at most: the coordinator would give up waiting for it."""

"""Of a chunk in a store, where its name says where it lies."""


class SharedReader:
    """The agent's end, for its *store*; see the module.

    Parameters
    ----------
    store
        The writable store of this host.
    on_received
        Called on the event loop with the chunks that were read.
    pace
        What is read is counted there: the next answer waits as long as this one was too fast.
    """

    def __init__(
        self, store: Store, on_received: Callable[[Sequence[Digest]], object], pace: Pace | None = None
    ) -> None:
        self._store = store
        self._pace = pace
        self._on_received = on_received

    async def sees(self, place: Sequence[str]) -> bool:
        """Whether this machine sees what the client does at that place."""
        try:
            return await asyncio.to_thread(_is_marked, Place(*place))
        except (OSError, ContentError) as error:
            logger.info("%s cannot be read here: %s", place[1], error)
            return False

    async def survey(self, where: str) -> dict[str, Any]:
        """Manifest and extents of the bundle that this machine sees at *where*, for a client that does not."""
        manifest, extents = await asyncio.to_thread(survey, where)
        return {"manifest": manifest.to_bytes(), "extents": {digest: list(row) for digest, row in extents.items()}}

    async def pull(self, place: Sequence[str], chunks: Mapping[Digest, Sequence[int]]) -> dict[str, Any]:
        """Read *chunks* (digest to extent) there and keep them; answers those kept, the bytes read, and what failed."""
        if not all(is_digest(digest) for digest in chunks):
            raise ValueError("chunks are named by their SHA-256 in lower-case hexadecimal, nothing else")
        extents = {digest: Extent(*extent) for digest, extent in chunks.items()}
        kept, size_bytes, reason = await asyncio.to_thread(read_into, self._store, Place(*place), extents)
        self._on_received(kept)
        if self._pace is not None:
            await self._pace.spend(size_bytes, PULL_WAIT_LIMIT_S)
        return {"received": kept, "size_bytes": size_bytes, "reason": reason}


def read_into(store: Store, place: Place, chunks: Mapping[Digest, Extent]) -> tuple[list[Digest], int, str]:
    """Bring *chunks* from *place* into *store*; returns those kept, the bytes read, and why the others were not.

    Raises
    ------
    StoreFull
        If there is no room.
    """
    kept: list[Digest] = []
    total_bytes = 0
    try:
        for digest, codec_name, payload in _payloads(place, chunks):
            store.write_encoded(digest, codec_name, payload, place.where)
            kept.append(digest)
            total_bytes += len(payload)
    except (ChunkInvalid, ChunkMissing, OSError, ValueError) as error:
        return kept, total_bytes, str(error) or repr(error)
    return kept, total_bytes, ""


def _payloads(place: Place, chunks: Mapping[Digest, Extent]) -> Any:
    if place.kind == "store":
        layout = Layout(Path(place.where))
        for digest in chunks:
            yield digest, *_from_store(layout, digest)
        return
    with opened(place.where) as file:
        for digest, extent in sorted(chunks.items(), key=lambda item: item[1]):
            if not 0 <= extent.size_bytes <= PAYLOAD_LIMIT_BYTES or extent.offset < 0:
                raise ValueError(f"chunk {digest} claims {extent.size_bytes} bytes at {extent.offset}")
            if not 0 <= extent.codec_number < len(CODECS):
                raise ValueError(f"chunk {digest} claims the codec {extent.codec_number}")
            file.seek(extent.offset)
            yield digest, CODECS[extent.codec_number], file.read(extent.size_bytes)


def _from_store(layout: Layout, digest: Digest) -> tuple[str, bytes]:
    for name in codec.available():
        payload = content_of(layout.chunk(digest, codec.SUFFIXES[name]), PAYLOAD_LIMIT_BYTES)
        if payload is not None and len(payload) <= PAYLOAD_LIMIT_BYTES:
            return name, payload
    raise ChunkMissing(digest, str(layout.root))


def _is_marked(place: Place) -> bool:
    if place.kind == "store":
        found = content_of(Layout(Path(place.where)).host_id, 64)
        return found is not None and found.decode("ascii", "replace").strip() == place.mark
    if place.kind != "bundle":
        return False
    with opened(place.where) as file:
        return bool(read_manifest(file, place.where).id == place.mark)
