"""Stores with chunks, and servers on loopback that hand them to one another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from distributed.core import Server
from distributed.security import Security

from worker_bootstrap.digest import Digest
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import PeerChunks

TLS_FOLDER = Path(__file__).parent / "tls"
Reply = Callable[..., Awaitable[Any]]


def tls() -> Security:
    cert, key = str(TLS_FOLDER / "cert.pem"), str(TLS_FOLDER / "key.pem")
    files = {
        f"tls_{role}_{part}": path for role in ("client", "worker") for part, path in (("cert", cert), ("key", key))
    }
    return Security(tls_ca_file=cert, require_encryption=True, **files)


def filled(root: Path, count: int = 12, size_bytes: int = 100_000) -> tuple[Store, dict[Digest, int]]:
    """A store with *count* chunks that do not compress, and their sizes."""
    store = Store(root)
    return store, {store.write_chunk(os.urandom(size_bytes)): size_bytes for _ in range(count)}


def damage(store: Store, digest: Digest) -> None:
    """Flip a byte in the middle of the stored chunk."""
    path, _ = next(iter(store._candidates(digest)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Peer:
    """A server on loopback, with a pool to call others; for use as ``async with``."""

    def __init__(self, handlers: dict[str, Any], security: Security | None = None, deserialize: bool = True) -> None:
        self.security = security
        arguments = security.get_connection_args("worker") if security else {}
        self.server = Server(dict(handlers), deserialize=deserialize, connection_args=arguments)

    async def __aenter__(self) -> Peer:
        scheme = "tls" if self.security else "tcp"
        arguments = self.security.get_listen_args("worker") if self.security else {}
        await self.server.listen(f"{scheme}://127.0.0.1:0", **arguments)
        await self.server
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()
        await asyncio.sleep(0.01)  # closed connections leave the loop in a later turn of it

    @property
    def address(self) -> str:
        return str(self.server.address)

    def chunks(self, timeout_s: float = 10.0) -> PeerChunks:
        return PeerChunks(self.server.rpc, timeout_s)
