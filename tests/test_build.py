"""A build in its own process, while chunks still come."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import dask
import pytest

import worker_bootstrap
from worker_bootstrap.build import Arrived, build
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import ChunkMissing, ManifestInvalid, TransferError
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import Store

from .environments import environment_of, package_of, tiny_environment

CODE = str(Path(worker_bootstrap.__file__).parent.parent)
pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def source(tmp_path: Path) -> Store:
    """Where chunks come from."""
    return Store(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    """Where the environment is built."""
    return Store(tmp_path / "target")


def manifest_in(target: Store, source: Store, environment_id: EnvironmentId) -> Manifest:
    manifest = source.read_manifest(environment_id)
    target.write_manifest(manifest)
    return manifest


def copy(source: Store, target: Store, digests: Sequence[Digest]) -> None:
    for digest in digests:
        target.write_chunk(source.read_chunk(digest))


def built(target: Store, environment_id: EnvironmentId, fetch: Callable[[Arrived], Awaitable[None]] | None) -> Path:
    return Path(asyncio.run(build(target, environment_id, CODE, "auto", lambda done, total: None, fetch)))


def scratch(target: Store) -> list[Path]:
    return list(target.layout.tmp.glob("build-*/*"))


async def until(look: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 30
    while not look():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


def test_a_store_over_its_limit_is_collected_after_a_build(target: Store) -> None:
    """What was built stays, however small the limit; what nobody used for long goes."""
    old = tiny_environment(target, {"lib/old": b"old" * 100})
    assert built(target, old, None).is_dir()
    for path in (target.layout.manifest(old), target.layout.ready(old), *target.layout.chunks.glob("*/*")):
        os.utime(path, (0, 0))
    new = tiny_environment(target, {"lib/new": b"new" * 100})
    with dask.config.set({"envship.store-limit": "1 B"}):
        prefix = built(target, new, None)
    assert target.environments() == [new]
    assert target.built(old) is None
    assert (prefix / "lib/new").read_bytes() == b"new" * 100


def test_files_are_written_before_the_last_chunk_has_come(source: Store, target: Store) -> None:
    """And the listing, without which nothing can be written, may come while the process waits for it."""
    packages = [package_of(source, {f"{name}/file": os.urandom(500)}, name) for name in "abc"]
    manifest = environment_of(source, packages)
    target.write_manifest(manifest)
    seen: list[str] = []

    async def fetch(arrived: Arrived) -> None:
        listings = [package.listing.digest for package in packages]
        copy(source, target, listings)
        arrived(listings)
        for package in packages[:2]:
            digests = [chunk.digest for chunk in package.chunks]
            copy(source, target, digests)
            arrived(digests)
            await until(lambda name=package.name: list(target.layout.tmp.glob(f"build-*/{name}/file")))
            seen.append(package.name)
        copy(source, target, list(manifest.chunks))

    prefix = built(target, manifest.id, fetch)
    assert seen == ["a", "b"]
    assert sorted(path.name for path in prefix.iterdir()) == ["a", "b", "c"]


def test_a_fetch_that_fails_ends_the_build_and_leaves_nothing(source: Store, target: Store) -> None:
    manifest = manifest_in(target, source, tiny_environment(source))
    digests = list(manifest.chunks)

    async def fetch(arrived: Arrived) -> None:
        copy(source, target, digests[:-1])
        arrived(digests[:-1])
        await until(lambda: scratch(target))
        raise TransferError("the cluster", "1 chunk is on no host any more")

    with pytest.raises(TransferError, match="on no host"):
        built(target, manifest.id, fetch)
    assert list(target.layout.tmp.iterdir()) == []
    assert target.built(manifest.id) is None
    copy(source, target, digests[-1:])
    assert built(target, manifest.id, None).is_dir(), "what has arrived is used the next time"


def test_a_cancelled_build_ends_its_process_and_its_fetch(source: Store, target: Store) -> None:
    manifest = manifest_in(target, source, tiny_environment(source))
    ended: list[bool] = []

    async def fetch(arrived: Arrived) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)

    async def main() -> None:
        task = asyncio.ensure_future(build(target, manifest.id, CODE, "auto", lambda done, total: None, fetch))
        await until(target.layout.lock(manifest.id).exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == [True]
    assert target.built(manifest.id) is None


def test_a_chunk_damaged_on_the_way_does_not_end_the_fetch(source: Store, target: Store) -> None:
    """The next try then lacks that chunk only."""
    manifest = manifest_in(target, source, tiny_environment(source))
    digests = list(manifest.chunks)
    bad = manifest.packages[0].chunks[0].digest
    done: list[bool] = []

    async def fetch(arrived: Arrived) -> None:
        copy(source, target, digests)
        path, _ = next(iter(target._candidates(bad)))
        path.write_bytes(b"damaged")
        arrived(digests)
        await until(lambda: not target.has_chunk(bad))
        done.append(True)

    with pytest.raises(ChunkMissing) as caught:
        built(target, manifest.id, fetch)
    assert caught.value.digest == bad
    assert done == [True]
    assert target.missing(digests) == [bad]


def test_content_that_breaks_the_listing_ends_the_fetch_at_once(source: Store, target: Store) -> None:
    good, other = package_of(source, {"a": os.urandom(300)}), package_of(source, {"a": os.urandom(300)})
    manifest = environment_of(source, [good._replace(chunks=other.chunks)])
    target.write_manifest(manifest)

    async def fetch(arrived: Arrived) -> None:
        copy(source, target, list(manifest.chunks))
        arrived(list(manifest.chunks))
        await asyncio.get_running_loop().create_future()

    with pytest.raises(ManifestInvalid):
        built(target, manifest.id, fetch)
    assert list(target.layout.tmp.iterdir()) == []
