"""Bundles and stores that hosts read themselves: nothing is uploaded, and nothing is believed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import Client, LocalCluster

from envship import journey
from envship.bundle import bundle_at, survey_bundle, write_bundle
from envship.environment import Environment
from envship.errors import SourceNotFound
from worker_bootstrap.bundle_index import Extent
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import BundleInvalid
from worker_bootstrap.shared import NOWHERE, Place, SharedReader, read_into
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, Cluster
from .environments import environment_of, package_of

pytestmark = SWAP_MARKS


def random_environment(store: Store, codec: str = "zlib") -> Environment:
    """One that the hosts can read themselves; they have no ``zstandard``."""
    package = package_of(store, {"lib/data": os.urandom(1 << 20)}, chunk_bytes=100_000, codec=codec)
    return Environment(environment_of(store, [package]), store)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return random_environment(Store(tmp_path / "source"))


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store(tmp_path / "target")


def bundle_of(environment: Environment, path: Path) -> tuple[Place, dict[Digest, Extent]]:
    write_bundle(environment.manifest, environment.store, path)
    manifest, extents = survey_bundle(str(path))
    assert manifest.id == environment.id
    return Place("bundle", str(path), environment.id), extents


# -- what a host reads


def test_a_bundle_is_read_chunk_by_chunk(environment: Environment, target: Store, tmp_path: Path) -> None:
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    some = dict(list(extents.items())[::2])
    kept, size_bytes, reason = read_into(target, place, some)
    assert (sorted(kept), reason) == (sorted(some), "")
    assert size_bytes == sum(extent.size_bytes for extent in some.values())
    assert target.missing(extents) == [digest for digest in extents if digest not in some]


def test_a_store_is_read_in_place(environment: Environment, target: Store) -> None:
    place = Place("store", str(environment.store.layout.root), environment.store.host_id)
    kept, _, reason = read_into(target, place, dict.fromkeys(environment.chunks, NOWHERE))
    assert (sorted(kept), reason) == (sorted(environment.chunks), "")


@pytest.mark.parametrize(
    "extent", [Extent(0, 0, 1000), Extent(1 << 40, 0, 1000), Extent(-1, 0, 5), Extent(0, 0, 1 << 40), Extent(0, 9, 5)]
)
def test_a_place_that_lies_brings_nothing(
    environment: Environment, target: Store, tmp_path: Path, extent: Extent
) -> None:
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    digest = next(iter(extents))
    kept, _, reason = read_into(target, place, {digest: extent})
    assert kept == []
    assert reason
    assert not target.has_chunk(digest)


def test_what_was_intact_before_the_fault_is_kept(environment: Environment, target: Store, tmp_path: Path) -> None:
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    last = max(extents, key=lambda digest: extents[digest])
    with open(place.where, "r+b") as file:
        file.seek(extents[last].offset)
        file.write(b"damaged")
    kept, _, reason = read_into(target, place, extents)
    assert last in reason
    assert sorted(kept) == sorted(set(extents) - {last})


@pytest.mark.parametrize("scheme", ["", "file://", "zip://x.envship::file://"])
def test_whatever_fsspec_opens_is_seen(environment: Environment, target: Store, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "x.envship"
    place, extents = bundle_of(environment, path)
    if scheme.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.write(path, "x.envship")
        path = tmp_path / "x.zip"
    place = place._replace(where=f"{scheme}{path}")
    reader = SharedReader(target, on_received=lambda digests: None)
    assert asyncio.run(reader.sees(place))
    assert not asyncio.run(reader.sees(place._replace(mark="0" * 64))), "another environment lies there"
    kept, _, reason = read_into(target, place, extents)
    assert (len(kept), reason) == (len(extents), "")


@pytest.mark.parametrize(
    "place",
    [
        Place("bundle", "/nowhere/x.envship", "0" * 64),
        Place("bundle", "nothing-like-this://x.envship", "0" * 64),
        Place("store", "/nowhere", "0" * 32),
        Place("other", "/", ""),
    ],
)
def test_what_cannot_be_read_is_not_seen(target: Store, place: Place) -> None:
    assert not asyncio.run(SharedReader(target, on_received=lambda digests: None).sees(place))


def test_a_bundle_that_is_cut_short_is_found_out_without_reading_it(environment: Environment, tmp_path: Path) -> None:
    place, _ = bundle_of(environment, tmp_path / "x.envship")
    os.truncate(place.where, os.path.getsize(place.where) - 9)
    with pytest.raises(BundleInvalid):
        survey_bundle(place.where)
    with pytest.raises(SourceNotFound):
        survey_bundle(str(tmp_path / "other.envship"))


def test_a_path_or_a_url_that_ends_as_bundles_do_means_a_bundle(tmp_path: Path) -> None:
    assert bundle_at("s3://bucket/x.envship") == "s3://bucket/x.envship"
    assert bundle_at(tmp_path / "x.envship") == str(tmp_path / "x.envship")
    (tmp_path / "folder.envship").mkdir()
    assert bundle_at(tmp_path / "folder.envship") is None
    assert bundle_at("analysis") is bundle_at(None) is None


# -- in a cluster


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path) -> Iterator[Cluster]:
    with Cluster(base_venv, lab / "sharing") as cluster:
        cluster.start_scheduler()
        for host in ("b", "c"):
            cluster.start_worker(host, "--no-nanny", host=host)
        yield cluster


@pytest.fixture
def client(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "own"))
    with cluster.client(workers=2) as client:
        yield client


def received(client: Client) -> dict[str, int]:
    """Bytes that all hosts have received so far, by where from."""
    total: dict[str, int] = {}
    for host in client.environment_status().hosts.values():
        for source, size_bytes in host.received.items():
            kind = source if source in ("client", "shared file") else "peers"
            total[kind] = total.get(kind, 0) + size_bytes
    return total


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {kind: size - before.get(kind, 0) for kind, size in after.items() if size > before.get(kind, 0)}


def all_built(cluster: Cluster, environment: Environment) -> bool:
    return all(Store(cluster.store(host)).built(environment.id) for host in ("a", "b", "c"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_bundle_that_the_hosts_see_is_not_uploaded(
    cluster: Cluster, client: Client, environment: Environment, tmp_path: Path, scheme: str
) -> None:
    """Each chunk is read there once, by one of them; not even the client reads them."""
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    before = received(client)
    result = client.stage_environment(scheme + place.where)
    assert (result.environment_id, result.uploaded_bytes) == (environment.id, 0)
    assert all_built(cluster, environment)
    moved = grown(before, received(client))
    assert moved["shared file"] == sum(extent.size_bytes for extent in extents.values())
    assert moved["peers"] > 0
    assert "client" not in moved
    assert Store(tmp_path / "own").missing(extents) == list(extents)


def test_a_bundle_that_only_the_hosts_see_is_used(
    cluster: Cluster, client: Client, environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = bundle_of(environment, tmp_path / "x.envship")

    def unseen(where: str) -> Any:
        raise SourceNotFound(where, [where])

    monkeypatch.setattr(journey, "survey_bundle", unseen)
    result = client.stage_environment(place.where)
    assert (result.environment_id, result.uploaded_bytes) == (environment.id, 0)
    assert all_built(cluster, environment)
    with pytest.raises(SourceNotFound):
        client.stage_environment(tmp_path / "nowhere.envship")


def test_what_the_hosts_cannot_decode_is_uploaded(cluster: Cluster, client: Client, tmp_path: Path) -> None:
    """By the client, which knows what they can: in a store or a bundle all is zstd where that is installed."""
    environment = random_environment(Store(tmp_path / "zstd"), "zstd")
    with dask.config.set({"envship.share-store": True}):
        assert client.stage_environment(environment).uploaded_chunks == len(environment.chunks)
    another = random_environment(Store(tmp_path / "zstd"), "zstd")
    place, extents = bundle_of(another, tmp_path / "x.envship")
    assert client.stage_environment(place.where).uploaded_chunks == len(extents)
    assert all_built(cluster, environment)
    assert all_built(cluster, another)


@pytest.fixture
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Of a cluster with a single host, that has all that the client has: ``zstandard``, and what opens URLs."""
    monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "host"))
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as local,
        Client(local) as client,
    ):
        yield client


def test_a_store_that_the_hosts_see_is_read_in_place(able: Client, tmp_path: Path) -> None:
    """By hosts that can decode whatever a store may hold."""
    environment = random_environment(Store(tmp_path / "zstd"), "zstd")
    with dask.config.set({"envship.share-store": True}):
        result = able.stage_environment(environment, progress=False)
    assert (result.uploaded_bytes, result.uploaded_chunks) == (0, 0)
    sizes = [len(environment.store.read_encoded(digest, ("zstd",))[1]) for digest in environment.chunks]
    assert received(able) == {"shared file": sum(sizes)}
    assert Store(tmp_path / "host").built(environment.id) is not None


def test_a_bundle_behind_a_url_is_read_by_the_hosts(able: Client, environment: Environment, tmp_path: Path) -> None:
    """In parts, by those whose libraries can open it: fsspec needs aiohttp for ``http``."""
    pytest.importorskip("aiohttp")
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    with served(tmp_path) as (url, answers):
        result = able.stage_environment(f"{url}/x.envship", progress=False)
    assert (result.environment_id, result.uploaded_bytes) == (environment.id, 0)
    assert received(able) == {"shared file": sum(extent.size_bytes for extent in extents.values())}
    assert Store(tmp_path / "host").built(environment.id) is not None
    assert sum(answers) >= os.path.getsize(place.where)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """The files of *folder* over HTTP, in parts; gives the URL, and how many bytes each answer had."""
    answers: list[int] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            data = (folder / self.path.lstrip("/")).read_bytes()
            begin, end = 0, len(data) - 1
            asked = self.headers.get("Range")
            if asked:
                first, last = asked.removeprefix("bytes=").split("-")
                begin, end = int(first), min(int(last or end), end)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end + 1 - begin))
            self.end_headers()
            if body:
                answers.append(end + 1 - begin)
                self.wfile.write(data[begin : end + 1])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", answers
        finally:
            server.shutdown()
            thread.join()


def test_a_store_is_not_shared_unless_its_file_system_is(client: Client, environment: Environment) -> None:
    assert client.stage_environment(environment).uploaded_chunks == len(environment.chunks)


def test_a_bundle_that_is_damaged_is_an_error_that_says_so(
    cluster: Cluster, client: Client, environment: Environment, tmp_path: Path
) -> None:
    """Hosts notice, the client reads it itself, and finds the same."""
    place, extents = bundle_of(environment, tmp_path / "x.envship")
    with open(place.where, "r+b") as file:
        file.seek(max(extents.values()).offset)
        file.write(b"damaged")
    with pytest.raises(BundleInvalid, match=r"x\.envship"):
        client.stage_environment(place.where)
    assert not any(Store(cluster.store(host)).built(environment.id) for host in ("a", "b", "c"))


def test_a_bundle_that_only_the_client_sees_is_uploaded(
    cluster: Cluster, client: Client, environment: Environment, tmp_path: Path
) -> None:
    place, extents = bundle_of(environment, tmp_path / "x.envship")

    def blind(dask_worker: Any) -> None:
        async def sees(place: Any) -> Any:
            return {"ok": False}

        dask_worker.handlers["envship_sees"] = sees

    def blind_scheduler(dask_scheduler: Any) -> None:
        async def sees(place: Any) -> Any:
            return {"ok": False}

        dask_scheduler.handlers["envship_sees"] = sees

    client.run(blind)
    client.run_on_scheduler(blind_scheduler)
    result = client.stage_environment(place.where)
    assert result.uploaded_chunks == len(extents)
    assert all_built(cluster, environment)
