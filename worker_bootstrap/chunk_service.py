"""The chunk operations between agents, both ends: what is served to peers, and how peers are asked.

Peers ask by digest and nothing else. What arrives is checked against its name before it is kept. How a message travels
is `worker_bootstrap.wire`; the loops that use these operations are `worker_bootstrap.transfer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from worker_bootstrap import codec
from worker_bootstrap.assignments import BATCH_LIMIT_CHUNKS
from worker_bootstrap.courtesy import Pace, step_back
from worker_bootstrap.digest import Digest, is_digest
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, EnvshipError, ProtocolBroken, TransferError
from worker_bootstrap.store import Store
from worker_bootstrap.wire import Mark, Payload, call, frame, payload_of

logger = logging.getLogger(__name__)

_Parsed = TypeVar("_Parsed")

MESSAGE_LIMIT_BYTES = 32 << 20
"""A server reads no more than this into one reply: twice a batch, should the codecs have made nothing smaller."""
TIMEOUT_S = 60.0
"""A message must be through in this time: 16 MiB at 2 Mbit/s."""
PUT_WAIT_LIMIT_S = 10.0
"""The limit of what is received delays an answer so long at most: who sends would take silence for a failure."""


class EncodedChunk(NamedTuple):
    """A chunk as it travels: *payload* is its content, compressed with *codec*. Not verified yet."""

    digest: Digest
    codec: str
    payload: Payload


class Held(NamedTuple):
    """What a peer says of some chunks: those that it holds, and the codecs that it can decode."""

    digests: tuple[Digest, ...]
    accept: tuple[str, ...]


class ChunkServer:
    """Serves the chunks of *store* to peers, and takes chunks from them.

    Parameters
    ----------
    store
        The store of this host.
    on_received
        Called on the event loop with the digests that a peer has put here.
    sending
        How fast chunks may be sent.
    receiving
        What peers put here is counted there: the answer waits as long as the ones before were too fast.

    Notes
    -----
    Register it with ``server.handlers.update(chunk_server.handlers())`` on any `distributed.core.Server`. Handlers
    answer errors in words, never by raising, because Dask sends exceptions pickled.
    """

    def __init__(
        self,
        store: Store,
        on_received: Callable[[list[Digest]], object] | None = None,
        sending: Pace | None = None,
        receiving: Pace | None = None,
    ) -> None:
        self._store = store
        self._sending = sending or Pace()
        self._receiving = receiving or Pace()
        self._on_received = on_received

    def handlers(self) -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
        """Operation names and their handlers."""
        return {
            "envship_get_chunks": self.get_chunks,
            "envship_put_chunks": self.put_chunks,
            "envship_has_chunks": self.has_chunks,
            "envship_check_chunks": self.check_chunks,
        }

    async def get_chunks(self, comm: Any, digests: Any = (), accept: Any = ()) -> dict[str, Any]:
        """Chunks in codecs that the peer accepts; those that this store lacks are left out."""
        try:
            found = await asyncio.to_thread(read_chunks, self._store, _checked(digests), _codec_names(accept))
        except (EnvshipError, ValueError, OSError) as error:
            return _refusal(error)
        step_back(comm, self._sending.rate)
        await self._sending.spend(sum(len(chunk.payload) for chunk in found))
        rows = [(chunk.digest, chunk.codec, frame(chunk.payload)) for chunk in found]
        return {"status": "OK", "chunks": rows}

    async def put_chunks(self, comm: Any, chunks: Any = ()) -> dict[str, Any]:
        """Verify and keep chunks; answers which were kept, and why the others were not."""
        try:
            rows = [_chunk_of(row) for row in chunks]
            kept, invalid = await asyncio.to_thread(write_chunks, self._store, rows, str(comm.peer_address))
        except (EnvshipError, ValueError, TypeError, OSError) as error:
            return _refusal(error)
        if self._on_received is not None and kept:
            self._on_received(kept)
        await self._receiving.spend(sum(len(row.payload) for row in rows), PUT_WAIT_LIMIT_S)
        return {"status": "OK", "received": kept, "invalid": invalid}

    async def has_chunks(self, digests: Any = ()) -> dict[str, Any]:
        """Which of *digests* this store holds, and the codecs that it can decode."""
        try:
            asked = _checked(digests, limit=None)
            missing = set(await asyncio.to_thread(self._store.missing, asked))
        except (ValueError, OSError) as error:
            return _refusal(error)
        held = [digest for digest in asked if digest not in missing]
        return {"status": "OK", "held": held, "accept": codec.accepted()}

    async def check_chunks(self, digests: Any = ()) -> dict[str, Any]:
        """A peer found these wrong: read them, which drops copies that are damaged here. Answers what is left."""
        try:
            asked = _checked(digests)
            return {"status": "OK", "held": await asyncio.to_thread(intact, self._store, asked)}
        except (ValueError, OSError) as error:
            return _refusal(error)


class PeerChunks:
    """The chunk operations of other agents, called over *pool* (``server.rpc`` or ``client.rpc``).

    Every method raises `TransferError`, naming the peer, if the peer cannot be reached in *timeout_s* or breaks the
    protocol. What is got is counted on *receiving*, what is put on *sending*: the next call waits as long as this one
    was too fast. Connections of *pool* that carry chunks are marked as bulk: let it be one that carries nothing else.
    """

    def __init__(
        self,
        pool: Any,
        timeout_s: float = TIMEOUT_S,
        *,
        receiving: Pace | None = None,
        sending: Pace | None = None,
    ) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._receiving = receiving or Pace()
        self._sending = sending or Pace()

    async def get(self, address: str, digests: Sequence[Digest]) -> list[EncodedChunk]:
        """Those of *digests* that the peer holds, unverified, in codecs that this process can decode."""
        message = {"digests": list(digests), "accept": list(codec.accepted())}
        reply = await self._call(address, "envship_get_chunks", message)
        chunks = self._parsed(address, lambda: [_chunk_of(row) for row in reply["chunks"]])
        wanted = set(digests)
        if len(chunks) > len(wanted) or not wanted.issuperset(chunk.digest for chunk in chunks):
            raise ProtocolBroken(address, "it sent chunks that nobody asked for")
        await self._receiving.spend(sum(len(chunk.payload) for chunk in chunks))
        return chunks

    async def put(self, address: str, chunks: Sequence[EncodedChunk]) -> list[Digest]:
        """Send *chunks* to the peer; return those that it kept."""
        await self._sending.spend(sum(len(chunk.payload) for chunk in chunks))
        rows = [(chunk.digest, chunk.codec, frame(chunk.payload)) for chunk in chunks]
        reply = await self._call(address, "envship_put_chunks", {"chunks": rows}, self._mark)
        kept = self._parsed(address, lambda: _checked(reply["received"]))
        for digest, reason in dict(reply.get("invalid") or {}).items():
            logger.warning("%s did not keep chunk %s: %s", address, digest, reason)
        return kept

    async def held(self, address: str, digests: Sequence[Digest]) -> Held:
        """Which of *digests* the peer holds, and the codecs that it can decode."""
        reply = await self._call(address, "envship_has_chunks", {"digests": list(digests)})
        return self._parsed(
            address, lambda: Held(tuple(_checked(reply["held"], limit=None)), _codec_names(reply["accept"]))
        )

    async def complain(self, address: str, digests: Sequence[Digest]) -> None:
        """Tell the peer that it sent these wrong, so that it drops what is damaged. Failing that does not matter."""
        try:
            await self._call(address, "envship_check_chunks", {"digests": list(digests)})
        except TransferError as error:
            logger.info("%s", error)

    async def _call(self, address: str, op: str, message: dict[str, Any], mark: Mark = None) -> dict[str, Any]:
        return await call(self._pool, address, op, message, timeout_s=self._timeout_s, mark=mark)

    def _mark(self, comm: Any) -> None:
        step_back(comm, self._sending.rate)

    @staticmethod
    def _parsed(address: str, parse: Callable[[], _Parsed]) -> _Parsed:
        try:
            return parse()
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolBroken(address, f"its answer breaks the protocol: {error}") from error


def read_chunks(store: Store, digests: Iterable[Digest], accept: Collection[str]) -> list[EncodedChunk]:
    """The chunks that *store* holds among *digests*; one that vanishes meanwhile is a miss."""
    found = []
    size_bytes = 0
    for digest in digests:
        try:
            chunk = EncodedChunk(digest, *store.read_encoded(digest, accept))
        except ChunkMissing:
            continue
        size_bytes += len(chunk.payload)
        if size_bytes > MESSAGE_LIMIT_BYTES:
            raise ValueError(f"more than {MESSAGE_LIMIT_BYTES} bytes in one message")
        found.append(chunk)
    return found


def write_chunks(store: Store, chunks: Iterable[EncodedChunk], where: str) -> tuple[list[Digest], dict[Digest, str]]:
    """Keep *chunks*; return the digests kept, and those that were not what they are called, with the reasons."""
    kept: list[Digest] = []
    invalid: dict[Digest, str] = {}
    for digest, codec_name, payload in chunks:
        try:
            store.write_encoded(digest, codec_name, payload, where)
        except ChunkInvalid as error:
            invalid[digest] = str(error)
        else:
            kept.append(digest)
    return kept, invalid


def intact(store: Store, digests: Iterable[Digest]) -> list[Digest]:
    """Those of *digests* that *store* holds whole; reading them drops the others."""
    found = []
    for digest in digests:
        with contextlib.suppress(ChunkMissing):
            store.read_chunk(digest)
            found.append(digest)
    return found


def _chunk_of(row: Any) -> EncodedChunk:
    digest, codec_name, payload = row
    return EncodedChunk(_checked([digest])[0], str(codec_name), payload_of(payload))


def _checked(digests: Any, limit: int | None = BATCH_LIMIT_CHUNKS) -> list[Digest]:
    """*digests* from a peer, each one checked to be a digest: nothing else ever becomes a path."""
    if not isinstance(digests, (list, tuple)) or (limit is not None and len(digests) > limit):
        raise ValueError(f"a list of at most {limit} digests is expected")
    if not all(is_digest(digest) for digest in digests):
        raise ValueError("chunks are named by their SHA-256 in lower-case hexadecimal, nothing else")
    return list(digests)


def _codec_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)):
        raise ValueError("a list of codec names is expected")
    return tuple(name for name in names if name in codec.SUFFIXES)


def _refusal(error: BaseException) -> dict[str, Any]:
    return {"status": "error", "text": f"{type(error).__name__}: {error}"}
