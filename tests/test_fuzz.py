"""Bytes that nobody wrote on purpose, given to every reader; at length under the marker ``heavy``."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from envship.environment import Environment
from tests.environments import EVERY_KIND, PLACEHOLDER, environment_of, package_of
from tests.fuzzing import read_any_bundle, read_any_chunk, read_any_listing, read_any_manifest, relocate_anything
from worker_bootstrap import codec
from worker_bootstrap.digest import digest_of
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.manifest import Chunk, Package
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

SHORT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
LENGTHS = [SHORT, pytest.param(LONG, marks=[pytest.mark.heavy, pytest.mark.timeout(900)])]
each_length = pytest.mark.parametrize("length", LENGTHS, ids=lambda each: f"{each.max_examples} examples")

D = "0" * 64


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """*whole* with some bytes changed, left out, put in or repeated."""

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for place, length, instead in edits:
            at = place % (len(data) + 1)
            data = data[:at] + instead + data[at + length :]
        return data

    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=40))
    return st.lists(edit, min_size=1, max_size=4).map(apply)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


texts = st.text(max_size=5) | st.sampled_from(
    ["..", "../x", "/etc", "a", "a/b", "a/b/c", "b", "\ud800", "\udce9", "\0"]
)
atoms = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(D)
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))
files = st.tuples(
    *(st.just("f"), texts, st.integers(-1, 1 << 62) | atoms, st.just(D) | atoms, st.integers(-1, 2) | atoms)
).map(list)
links = st.tuples(st.sampled_from("lhcpsd"), texts, texts).map(list)
folders = st.tuples(st.just("d"), texts).map(list)
rows = st.lists(files | links | folders | values, max_size=6)
sorted_rows = st.lists(files | links | folders, max_size=6, unique_by=lambda row: row[1]).map(
    lambda found: sorted(found, key=lambda row: row[1])
)
listings = st.binary(max_size=100) | rows.map(canonical) | sorted_rows.map(canonical)
packages = st.tuples(texts, texts, texts, texts, st.tuples(st.just(D), st.integers()), st.lists(values, max_size=2))
manifests = st.fixed_dictionaries(
    {
        "format": st.just(1) | atoms,
        "platform": texts | values,
        "python": texts | values,
        "environ": st.dictionaries(texts, texts | values, max_size=2) | values,
        "packages": st.lists(packages | values, max_size=3) | values,
    }
).map(canonical)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    store = Store(tmp_path_factory.mktemp("fuzz") / "store")
    return Environment(environment_of(store, [package_of(store, EVERY_KIND)], {"A": "b"}), store)


@each_length
def test_any_manifest(whole: Environment, length: settings) -> None:
    @length
    @given(st.binary(max_size=200) | manifests | values.map(canonical) | damaged(whole.manifest.to_bytes()))
    @example(b"[" * 100_000)
    @example(b"9" * 10_000)
    @example(b'{"a":1,"a":2}')
    def check(data: bytes) -> None:
        read_any_manifest(data)

    check()


@each_length
def test_any_listing(whole: Environment, length: settings) -> None:
    listing = whole.store.read_chunk(whole.packages[0].listing.digest)

    @length
    @given(listings | damaged(listing))
    @example(canonical([["l", "a", "a/" * 2000 + ".."]]))
    @example(canonical([["d", "a/" * 2000 + "a"]]))
    @example(canonical([["f", "a", 1e400, D, 0]]))
    def check(data: bytes) -> None:
        read_any_listing(data)

    check()


@each_length
def test_any_payload(length: settings) -> None:
    payloads = [codec.encode(bytes(range(256)) * 40, name) for name in codec.available()]

    @length
    @given(st.binary(max_size=200) | st.one_of(*map(damaged, payloads)))
    def check(data: bytes) -> None:
        read_any_chunk(data)

    check()


@each_length
def test_any_bundle(whole: Environment, tmp_path: Path, length: settings) -> None:
    data = whole.save(tmp_path / "whole.envship").read_bytes()

    @length
    @given(damaged(data))
    def check(data: bytes) -> None:
        read_any_bundle(data, tmp_path)

    check()


@each_length
def test_any_relocation(length: settings) -> None:
    pieces = st.sampled_from(
        [b"#!", b"/p", b" ", b"\n", b"\0", b"-x", b"python", PLACEHOLDER.encode(), b"#!/p/python -"]
    )
    contents = st.lists(pieces | st.binary(max_size=5), max_size=30).map(b"".join)

    @length
    @given(contents, st.sampled_from(["/p", "/p/", PLACEHOLDER, "/\udce9"]), st.sampled_from(["text", "binary"]))
    @example(b"#!/p" + b" " * 1_000_000 + b"x\n", "/p", "text")
    @example(b"/p" * 1_000_000, "/p", "binary")
    def check(data: bytes, placeholder: str, mode: str) -> None:
        relocate_anything(data, placeholder, mode)

    check()


paths = st.lists(st.sampled_from(["a", "b", "..", "c", ".", "outside"]), min_size=1, max_size=4).map("/".join)
entries = (
    paths.map(lambda path: ["d", path])
    | paths.map(lambda path: ["f", path, 0, digest_of(b""), 0])
    | st.tuples(st.just("l"), paths, paths).map(list)
    | st.tuples(st.just("h"), paths, paths).map(list)
)
trees = st.lists(entries, max_size=7, unique_by=lambda row: row[1]).map(
    lambda found: sorted(found, key=lambda row: row[1])
)


@each_length
def test_any_tree_is_built_inside_of_its_prefix_or_not_at_all(length: settings) -> None:
    """Every link in it, however many others it leads through, ends in the prefix."""

    @length
    @given(trees)
    def check(rows: list[Any]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="envship-fuzz-"))
        try:
            (folder / "outside").mkdir()
            build(Store(folder / "s"), rows)
            assert sorted(os.listdir(folder)) == ["outside", "s"]
            assert os.listdir(folder / "outside") == []
        finally:
            shutil.rmtree(folder)

    check()


def build(store: Store, rows: list[Any]) -> None:
    raw = canonical(rows)
    package = Package("p", "1", "0", "files", Chunk(store.write_chunk(raw), len(raw)), ())
    environment_id = environment_of(store, [package]).id
    try:
        prefix = materialise(store, environment_id)
    except EnvshipError:
        assert list(store.layout.envs.iterdir()) == []
        return
    for path in prefix.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        assert prefix in (prefix / os.path.realpath(path)).parents or os.path.realpath(path) == str(prefix)
