"""A manifest travels as what is new in it, and nothing else comes out of it than what was asked for."""

from __future__ import annotations

import asyncio
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import EnvironmentMissing, ManifestInvalid
from worker_bootstrap.exchange import Exchange
from worker_bootstrap.manifest import MANIFEST_LIMIT_BYTES, Chunk, Manifest, Package
from worker_bootstrap.manifest_delta import delta_of, likely_bases, whole_of
from worker_bootstrap.store import Store

from .environments import environment_of, package_of


def package(name: str, count: int) -> Package:
    chunks = tuple(Chunk(digest_of(f"{name} {number}".encode()), 65536) for number in range(count))
    return Package(name, "1", "", "project", chunks[0], chunks)


LARGE = [package(f"part{number:02}", 640) for number in range(26)]
"""The packages of a project of 1 GiB."""
BEFORE = Manifest("linux-64", "3.11.7", LARGE)
AFTER = Manifest("linux-64", "3.11.7", [*LARGE[:13], package("part13, edited", 640), *LARGE[14:]], {"A": "1"})
OTHER = Manifest("linux-64", "3.11.7", LARGE[:3])


def read(environment_id: EnvironmentId) -> Manifest:
    for manifest in (BEFORE, OTHER):
        if manifest.id == environment_id:
            return manifest
    raise EnvironmentMissing(environment_id, "here")


@pytest.mark.parametrize("bases", [[], [BEFORE], [OTHER], [OTHER, BEFORE]])
def test_what_comes_out_is_the_manifest(bases: list[Manifest]) -> None:
    delta = delta_of(AFTER, bases)
    assert whole_of(delta, AFTER.id, read).to_bytes() == AFTER.to_bytes()
    assert len(delta) < len(AFTER.to_bytes()) * 0.6
    if BEFORE in bases:
        assert len(delta) < len(AFTER.to_bytes()) * 0.03


def test_only_what_the_other_holds_is_a_base() -> None:
    assert likely_bases([AFTER.id, OTHER.id], read) == [OTHER]
    with pytest.raises(EnvironmentMissing):
        whole_of(delta_of(AFTER, [AFTER]), AFTER.id, read)


def delta(manifest: Any, base: Any = None) -> bytes:
    return zlib.compress(json.dumps({"base": base, "manifest": manifest}).encode())


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\0" * 100,
        zlib.compress(b"[]"),
        zlib.compress(b"[" * 100_000),
        delta([]),
        delta({"packages": [0]}),
        delta({"packages": [999]}, BEFORE.id),
        delta({"packages": 1}, BEFORE.id),
        delta({}, BEFORE.id),
        delta({}, "../../etc/passwd"),
        delta_of(OTHER),
        delta_of(BEFORE, [BEFORE]),
    ],
)
def test_anything_else_is_refused(hostile: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        whole_of(hostile, AFTER.id, read)


def test_a_bomb_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(ManifestInvalid, match="at most"):
        whole_of(zlib.compress(b" " * (MANIFEST_LIMIT_BYTES + 1), 1), AFTER.id, read)


class Hosts:
    """The agents of two hosts, as the exchange knows them. What they are sent is kept in *sent*."""

    def __init__(self, stores: dict[str, Store]) -> None:
        self.stores = stores
        self.members: dict[str, dict[str, Any]] = {}
        self.sent: dict[str, list[int]] = {address: [] for address in stores}

    def __iter__(self) -> Any:
        return iter(self.stores)

    async def agents(self) -> dict[str, dict[str, Any]]:
        return {address: {"host_id": store.host_id} for address, store in self.stores.items()}

    async def ask_quietly(self, address: str, operation: str, **arguments: Any) -> Any:
        if operation != "envship_missing":
            return False
        store, wanted, manifest = self.stores[address], arguments["environment_id"], arguments["manifest"]
        try:
            if manifest is not None:
                self.sent[address].append(len(manifest))
                store.write_manifest(whole_of(manifest, wanted, store.read_manifest))
            return store.missing(store.read_manifest(wanted).chunks)
        except EnvironmentMissing:
            return None


def test_every_host_gets_what_it_needs_of_a_manifest_and_no_more(tmp_path: Path) -> None:
    mine = Store(tmp_path / "mine")
    same = [package_of(mine, {f"{number}": bytes(50)}, f"p{number}", chunk_bytes=1) for number in range(20)]
    old = environment_of(mine, same)
    new = environment_of(mine, [*same, package_of(mine, {"new": b"new"}, "new")])
    scheduler, first, late = (Store(tmp_path / name) for name in ("scheduler", "first", "late"))
    for store in (scheduler, first):
        store.write_manifest(old)
    hosts = Hosts({"tcp://first:1": first, "tcp://late:1": late})
    exchange = Exchange(hosts, scheduler, lambda *_, **__: None)  # type: ignore[arg-type]

    async def main() -> None:
        held = await exchange.bases(new.id)
        assert held == [old.id]
        bases = likely_bases(held, mine.read_manifest)
        offer = await exchange.offer(new.id, delta_of(new, bases))
        assert {digest for _, digests in offer for digest in digests} == set(new.chunks)
        assert await exchange.bases(new.id) is None

    asyncio.run(main())
    small, whole = len(delta_of(new, [old])), len(delta_of(new))
    assert small < whole / 3
    assert hosts.sent == {"tcp://first:1": [small], "tcp://late:1": [small, whole]}
    assert first.read_manifest(new.id).to_bytes() == late.read_manifest(new.id).to_bytes() == new.to_bytes()
