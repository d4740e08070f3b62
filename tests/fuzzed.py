"""``python -m tests.fuzzed NAME EXAMPLES SECONDS``: a reader, given bytes that nobody wrote on purpose, within limits.

The process may take `MEMORY_BYTES` more than it has when everything is imported, and SECONDS for each example; what
goes beyond ends it with a traceback, as does anything that `tests.fuzzing` finds. `tests/test_fuzz.py` runs it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from envship.bundle import END, MAGIC
from envship.environment import Environment
from tests.environments import EVERY_KIND, PLACEHOLDER, environment_of, package_of
from tests.fuzzing import (
    build_any_tree,
    read_any_bundle,
    read_any_chunk,
    read_any_listing,
    read_any_manifest,
    relocate_anything,
    unpack_any_archive,
)
from worker_bootstrap import codec
from worker_bootstrap.bundle_index import CODECS, RECORD
from worker_bootstrap.digest import digest_of
from worker_bootstrap.manifest import Chunk, Manifest, Package
from worker_bootstrap.store import Store

MEMORY_BYTES = 1 << 30
"""Of address space: a chunk of 16 MiB in three forms, a manifest of 64 MiB as Python objects, and threads' stacks."""
D = "0" * 64


class TooLong(BaseException):
    """An example took more than it may. No reader takes this for an error of its own."""


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


ways = st.lists(st.sampled_from(["a", "b", "a/b", "..", "../..", "outside", "secret"]), min_size=1, max_size=5).map(
    "/".join
)
places = st.lists(st.sampled_from(["a", "b", "c", "outside", "bin"]), min_size=1, max_size=4).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, *[tarfile.SYMTYPE] * 3, tarfile.LNKTYPE])
members = st.tuples(places | ways, kinds, ways)


@st.composite
def chained(draw: st.DrawFn) -> list[tuple[str, bytes, str]]:
    """Members of an archive: a link up to the top, another one from there further up, and something below that one."""
    top = draw(places)
    above, below = (draw(st.integers(0, 5)) for _ in range(2))
    chain = [
        (f"{top}/top", tarfile.SYMTYPE, "/".join([".."] * (top.count("/") + 1))),
        ("up", tarfile.SYMTYPE, "/".join([top, "top", *[".."] * above])),
        ("/".join(["up", *[".."] * below, draw(places)]), draw(kinds), draw(ways)),
    ]
    return draw(st.permutations([*chain, *draw(st.lists(members, max_size=3))]))


@st.composite
def bundles(draw: st.DrawFn) -> bytes:
    """A bundle in which every chunk has its right digest, and one or two things are not where they belong, or nothing.

    Listings, sizes and the number of chunks are whatever they are: only a build compares those.
    """
    contents = draw(
        st.lists(st.binary(max_size=50) | trees.map(canonical) | rows.map(canonical), min_size=1, max_size=4)
    )

    def chunk() -> Chunk:
        content = draw(st.sampled_from(contents))
        return Chunk(digest_of(content), max(0, len(content) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 20]))))

    def package(name: str) -> Package:
        return Package(name, "1", "0", "files", chunk(), tuple(chunk() for _ in range(draw(st.integers(0, 2)))))

    manifest = Manifest("linux-64", "3", [package(name) for name in draw(st.lists(texts, min_size=1, max_size=3))])
    by_digest = {digest_of(content): content for content in contents}
    records = [draw(encoded(by_digest[digest])) for digest in manifest.chunks]
    raw = manifest.to_bytes()
    parts = [MAGIC, struct.pack(">Q", len(raw)), raw, *records, END]
    for _ in range(draw(st.integers(0, 2))):
        # Seldom the beginning, without which nothing else is looked at.
        first = min(3, len(parts) - 1) if draw(st.integers(0, 4)) else 0
        place, other = (draw(st.integers(first, len(parts) - 1)) for _ in range(2))
        edit = draw(st.sampled_from(["swap", "leave out", "repeat", "another"]))
        if edit == "swap":
            parts[place], parts[other] = parts[other], parts[place]
        elif edit == "repeat":
            parts.insert(place, parts[other])
        elif edit == "another":
            parts.insert(place, draw(encoded(draw(st.binary(max_size=50)))))
        elif len(parts) > 1:
            del parts[place]
    return b"".join(parts)


@st.composite
def encoded(draw: st.DrawFn, content: bytes) -> bytes:
    """The record of a chunk, by any codec; now and then with the number of another one, or another length."""
    name = draw(st.sampled_from(["raw", *codec.available()]))
    payload = codec.encode(content, name)
    number = CODECS.index(name) if draw(st.integers(0, 9)) else draw(st.integers(0, 255))
    length = len(payload) if draw(st.integers(0, 9)) else draw(st.integers(0, (1 << 32) - 1))
    return RECORD.pack(bytes.fromhex(digest_of(content)), number, length) + payload


class Target(NamedTuple):
    """A check of `tests.fuzzing`, what makes its arguments, and some that are always tried."""

    check: Callable[..., None]
    arguments: Callable[[], st.SearchStrategy[tuple[Any, ...]]]
    examples: Sequence[tuple[Any, ...]] = ()


def seeds(name: str) -> list[bytes]:
    """Sound inputs, from which a fuzzer may start: of an environment with one of everything."""
    with tempfile.TemporaryDirectory(prefix="envship-fuzz-") as folder:
        store = Store(Path(folder) / "store")
        environment = Environment(environment_of(store, [package_of(store, EVERY_KIND)], {"A": "b"}), store)
        listing = store.read_chunk(environment.packages[0].listing.digest)
        if name == "bundle":
            return [environment.save(Path(folder) / "whole.envship").read_bytes()]
    if name == "chunk":
        return [codec.encode(listing, codec_name) for codec_name in codec.available()]
    return [listing if name == "listing" else environment.manifest.to_bytes()]


def any_manifest() -> st.SearchStrategy[bytes]:
    return st.binary(max_size=200) | manifests | values.map(canonical) | st.one_of(*map(damaged, seeds("manifest")))


def any_listing() -> st.SearchStrategy[bytes]:
    return listings | st.one_of(*map(damaged, seeds("listing")))


def any_payload() -> st.SearchStrategy[bytes]:
    payloads = [codec.encode(bytes(range(256)) * 40, name) for name in codec.available()]
    return st.binary(max_size=200) | st.one_of(*map(damaged, payloads))


def any_bundle() -> st.SearchStrategy[bytes]:
    return bundles() | st.one_of(*map(damaged, seeds("bundle")))


def any_text() -> st.SearchStrategy[tuple[bytes, str, str]]:
    pieces = st.sampled_from(
        [b"#!", b"/p", b" ", b"\n", b"\0", b"-x", b"python", PLACEHOLDER.encode(), b"#!/p/python -"]
    )
    contents = st.lists(pieces | st.binary(max_size=5), max_size=30).map(b"".join)
    placeholders = st.sampled_from(["/p", "/p/", PLACEHOLDER, "/\udce9"])
    return st.tuples(contents, placeholders, st.sampled_from(["text", "binary"]))


def alone(made: Callable[[], st.SearchStrategy[Any]]) -> Callable[[], st.SearchStrategy[tuple[Any]]]:
    return lambda: st.tuples(made())


TARGETS: dict[str, Target] = {
    "manifest": Target(
        read_any_manifest, alone(any_manifest), [(b"[" * 100_000,), (b"9" * 10_000,), (b'{"a":1,"a":2}',)]
    ),
    "listing": Target(
        read_any_listing,
        alone(any_listing),
        [
            (canonical([["l", "a", "a/" * 2000 + ".."]]),),
            (canonical([["d", "a/" * 2000 + "a"]]),),
            (canonical([["f", "a", 1e400, D, 0]]),),
        ],
    ),
    "chunk": Target(read_any_chunk, alone(any_payload)),
    "bundle": Target(read_any_bundle, alone(any_bundle)),
    "tree": Target(build_any_tree, alone(lambda: trees)),
    "archive": Target(unpack_any_archive, alone(lambda: st.lists(members, max_size=7) | chained())),
    "relocation": Target(
        relocate_anything,
        any_text,
        [(b"#!/p" + b" " * 1_000_000 + b"x\n", "/p", "text"), (b"/p" * 1_000_000, "/p", "binary")],
    ),
}


def greedy(data: bytes) -> None:
    """What a reader does that believes a size: shows that the limit of memory holds."""
    bytearray(MEMORY_BYTES + (1 << 20))


def endless(data: bytes) -> None:
    """What a reader does that finds no end: shows that the limit of time holds."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(1)


def deaf(data: bytes) -> None:
    """The same in a library that does not return to Python."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    endless(data)


BEYOND = {check.__name__: Target(check, alone(st.binary)) for check in (greedy, endless, deaf)}


def run(target: Target, count: int, example_s: float) -> None:
    """Try *count* inputs, each for *example_s* at most."""
    arguments = target.arguments()
    limit_memory()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(arguments)
    def check(given_arguments: tuple[Any, ...]) -> None:
        with limited(example_s, given_arguments):
            target.check(*given_arguments)

    for always in target.examples:
        check = example(always)(check)
    check()


def limit_memory() -> None:
    """From now on this process may take `MEMORY_BYTES` more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit_bytes = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


@contextlib.contextmanager
def limited(example_s: float, arguments: tuple[Any, ...]) -> Iterator[None]:
    """Raise `TooLong` after *example_s*; where that does not reach the code, end the process after twice that time."""

    def end(*_: object) -> None:
        raise TooLong(f"more than {example_s} s for {arguments!r:.2000}")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, example_s)
    faulthandler.dump_traceback_later(2 * example_s, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    run({**TARGETS, **BEYOND}[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3]))
