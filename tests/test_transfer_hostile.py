"""Liars, laggards and pickles on the other side of a transfer."""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from distributed.comm import listen
from distributed.core import ConnectionPool
from distributed.protocol import Serialized, ToPickle, to_serialize

from worker_bootstrap import wire
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import TransferError
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import ChunkServer, PeerChunks

from .peers import Peer


@pytest.mark.parametrize(
    "asked",
    ["../../etc/passwd", "/etc/passwd", b"x" * 64, "A" * 64, 7, None, ["a" * 64]],
    ids=["relative", "absolute", "bytes", "upper", "number", "none", "list"],
)
def test_peers_ask_by_digest_only(tmp_path: Path, asked: object) -> None:
    async def main() -> None:
        async with Peer(ChunkServer(Store(tmp_path)).handlers()) as agent, Peer({}) as receiver:
            for op in ("envship_get_chunks", "envship_has_chunks"):
                with pytest.raises(TransferError, match=r"SHA-256") as caught:
                    await wire.call(receiver.server.rpc, agent.address, op, {"digests": [asked]}, timeout_s=10)
                assert caught.value.peer == agent.address
            with pytest.raises(TransferError, match=r"SHA-256"):
                row = [asked, "raw", wire.frame(b"x")]
                await wire.call(
                    receiver.server.rpc, agent.address, "envship_put_chunks", {"chunks": [row]}, timeout_s=10
                )

    asyncio.run(main())


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def pickled_type(bomb: Bomb) -> Serialized:
    """What Dask's own family of serialisers unpickles: the type of the object, in the header."""
    header = {"serializer": "dask", "sub-header": {}, "type-serialized": pickle.dumps(bomb)}
    return Serialized(header, [b"x"])


BOMBS: dict[str, Callable[[Bomb], Any]] = {
    "pickle family": lambda bomb: {"status": "OK", "chunks": to_serialize(bomb)},
    "whole reply": lambda bomb: ToPickle({"status": "OK", "chunks": bomb}),
    "marked pickle": lambda bomb: {"status": "OK", "chunks": [["a" * 64, "raw", ToPickle(bomb)]]},
    "type": lambda bomb: {"status": "OK", "chunks": [["a" * 64, "raw", pickled_type(bomb)]]},
    "exception": lambda bomb: {"status": "uncaught-error", "exception": to_serialize(pickle.dumps(bomb))},
    "bytes": lambda bomb: {"status": "OK", "chunks": pickle.dumps(bomb)},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_that_a_peer_sends_is_unpickled(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "made by a pickle"

    async def main() -> None:
        async def get_chunks(digests: Any, accept: Any) -> Any:
            return BOMBS[kind](Bomb(mark))

        async with Peer({"envship_get_chunks": get_chunks}) as liar, Peer({}) as receiver:
            with pytest.raises(TransferError) as caught:
                await receiver.chunks().get(liar.address, [Digest("a" * 64), Digest("b" * 64)])
            assert caught.value.peer == liar.address

    # "type" does arrive as a plain frame, whose header nobody looks at: then it is just a chunk, with the wrong bytes.
    if kind == "type":
        with pytest.raises(pytest.fail.Exception):
            asyncio.run(main())
    else:
        asyncio.run(main())
    assert not mark.exists()


def test_daskss_own_reading_would_have_unpickled(tmp_path: Path) -> None:
    """The bombs of the test above are live: each kind that Dask reads by unpickling goes off there."""
    mark = tmp_path / "mark"

    async def main(kind: str) -> None:
        async def get_chunks() -> Any:
            return BOMBS[kind](Bomb(mark))

        async with Peer({"envship_get_chunks": get_chunks}) as liar, Peer({}) as receiver:
            remote = receiver.server.rpc(liar.address)
            try:
                await remote.envship_get_chunks(deserializers=["dask"])
            except Exception as error:
                assert not isinstance(error, FileNotFoundError)

    for kind in ("marked pickle", "type"):
        asyncio.run(main(kind))
        assert mark.exists(), kind
        mark.rmdir()


def raw_reply(frames: Sequence[bytes], *, head_bytes: int | None = None, lengths: Sequence[int] | None = None) -> bytes:
    """A message on the wire, with lengths that may lie."""
    claimed = [len(frame) for frame in frames] if lengths is None else list(lengths)
    body = struct.pack(f"{len(claimed) + 1}Q", len(claimed), *claimed) + b"".join(frames)
    return struct.pack("Q", len(body) if head_bytes is None else head_bytes) + body


LIES = {
    "claims 2**60 bytes": raw_reply([b""], head_bytes=1 << 60),
    "claims no bytes": struct.pack("Q", 0),
    "claims a huge frame": raw_reply([b""], lengths=[1 << 50]),
    "claims many frames": struct.pack("QQ", 8, 1 << 40),
    "a frame across the end": raw_reply([b"abc"], lengths=[10]),
    "not msgpack": raw_reply([b"\xc1\xc1\xc1"]),
    "points to no frame": raw_reply([msgpack.dumps({"status": "OK", "chunks": {"__Serialized__": 9}})]),
    "points to itself": raw_reply([msgpack.dumps({"status": "OK", "chunks": {"__Serialized__": 0}})]),
    "points with a text": raw_reply([msgpack.dumps({"status": "OK", "chunks": {"__Serialized__": "x"}})]),
    "compressed": raw_reply(
        [
            msgpack.dumps({"status": "OK", "chunks": {"__Serialized__": 1}}),
            msgpack.dumps({"num-sub-frames": 1, "compression": ["zlib"]}),
            b"bomb",
        ]
    ),
    "deeply nested": raw_reply([b"\x91" * 5000 + b"\xc0"]),
    "a list": raw_reply([msgpack.dumps([1, 2])]),
    "no chunks": raw_reply([msgpack.dumps({"status": "OK"})]),
    "chunks that nobody asked for": raw_reply([msgpack.dumps({"status": "OK", "chunks": [["c" * 64, "raw", b"x"]]})]),
    "a text for bytes": raw_reply([msgpack.dumps({"status": "OK", "chunks": [["a" * 64, "raw", "x"]]})]),
    "hangs up": b"",
    "hangs up in the middle": raw_reply([b"abc"])[:20],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_breaks_the_protocol_is_named(lie: str) -> None:
    async def main() -> None:
        async def answer(comm: Any) -> None:
            await comm.read()
            comm.stream.write(LIES[lie])
            await comm.stream.write(b"")
            await comm.close()

        listener = await listen("tcp://127.0.0.1:0", answer, deserialize=False)
        pool = await ConnectionPool()
        try:
            with pytest.raises(TransferError) as caught:
                await PeerChunks(pool, 10).get(listener.contact_address, [Digest("a" * 64)])
            assert caught.value.peer == listener.contact_address
            assert not pool.active
        finally:
            await pool.close()
            listener.stop()
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_peer_that_never_answers_costs_its_timeout() -> None:
    async def main() -> None:
        released = asyncio.Event()

        async def get_chunks(digests: Any, accept: Any) -> Any:
            await released.wait()

        async with Peer({"envship_get_chunks": get_chunks}) as silent, Peer({}) as receiver:
            with pytest.raises(TransferError, match="no answer"):
                await receiver.chunks(timeout_s=0.1).get(silent.address, [Digest("a" * 64)])
            released.set()

    asyncio.run(main())


def test_a_peer_without_envship_is_named() -> None:
    async def main() -> None:
        async with Peer({}) as plain, Peer({}) as receiver:
            with pytest.raises(TransferError, match="does not know"):
                await receiver.chunks().get(plain.address, [Digest("a" * 64)])

    asyncio.run(main())
