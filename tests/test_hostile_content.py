"""Environments made to do harm: refused, with one of our errors, and with nothing touched outside of the prefix."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.environments import PLACEHOLDER, Content, environment_of, package_of, tiny_environment
from tests.filesystems import needs_mount, odd, remount, tmpfs
from tests.hostile import OUT, E, aimed, packed, surrounded
from tests.test_manifest import HOSTILE_ROWS
from tests.test_paths import HOSTILE_PATHS, HOSTILE_TARGETS
from worker_bootstrap import blueprint, verify, writer
from worker_bootstrap import materialise as module
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import (
    ChunkMissing,
    ContentError,
    EnvironmentMissing,
    EnvshipError,
    ManifestInvalid,
    MaterialiseError,
    StoreFull,
)
from worker_bootstrap.manifest import Chunk, HardLink, Link, Manifest, Package
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

X = digest_of(b"xxxx")
CODE = str(Path(module.__file__).parents[1])


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, store: Store) -> Iterator[Path]:
    """A folder beside the store with files worth having; in the store another environment, built.

    The test fails if anything of that changes, or if something appears that is not an environment's own.
    """
    with surrounded(tmp_path, store) as folder:
        yield folder


def assert_nothing_built(store: Store, environment_id: EnvironmentId) -> None:
    assert store.built(environment_id) is None
    assert not os.path.lexists(store.layout.prefix(environment_id))
    assert list(store.layout.tmp.iterdir()) == []


ROWS: dict[str, list[Any]] = {
    **{f"{name}, to {touched}": rows for name, (touched, rows) in OUT.items()},
    "over a file that is there": [["f", "../../../outside/secret", 0, E, 0]],
    "link out, by three": [["l", "a", "../../../outside"]],
    "link out, then a file through it": [["l", "a", "../../../outside"], ["f", "a/new", 0, E, 0]],
    "link out, then a folder through it": [["l", "a", "../../../outside"], ["d", "a/new"]],
    "link out, then a link through it": [["l", "a", "../../../outside"], ["l", "a/new", "x"]],
    "chain of links, then a link through it": [
        *(["l", "a/b/c/up", "../../.."], ["l", "out", "a/b/c/up/../../../outside"], ["l", "out/new", "x"]),
    ],
    "chain of links, by three": [["l", "a/b/c/up", "../../.."], ["l", "out", "a/b/c/up/../../../outside"]],
    "up": [["f", "../outside/secret", 0, E, 0]],
    "up in the middle": [["f", "a/../../../outside/new", 0, E, 0]],
    "absolute": [["f", "/tmp/envship-was-here", 0, E, 0]],
    "NUL": [["f", "a\0b", 0, E, 0]],
    "folder above": [["d", "../../outside/new"]],
    "link up": [["l", "a", "../outside"]],
    "absolute link": [["l", "a", "/etc/passwd"]],
    "link, then a file through it": [["l", "a", "b"], ["f", "a/x", 0, E, 0], ["f", "b/x", 0, E, 0]],
    "link, then a folder through it": [["l", "a", "b"], ["d", "a/x"], ["d", "b"]],
    "link, then a link through it": [["l", "a", "b"], ["l", "a/x", "y"], ["d", "b"]],
    "chain of links": [["l", "a/up", ".."], ["l", "out", "a/up/../outside"]],
    "deep chain of links": [["l", "a/b/c", "../.."], ["l", "d", "a/b/c/../outside/secret"]],
    "hard link up": [["h", "a", "../outside/secret"]],
    "absolute hard link": [["h", "a", "/etc/passwd"]],
    "hard link to a link": [["l", "a", "b"], ["h", "c", "a"]],
    "hard link to what is not listed": [["h", "a", "b"]],
    "hard link through a link": [["l", "a", "b"], ["f", "b/x", 0, E, 0], ["h", "c", "a/x"]],
    "file in the place of a link": [["f", "a", 0, E, 0], ["l", "a", "b"]],
    "setuid": [["f", "a", 0, E, 0o4755]],
    "mode as text": [["f", "a", 0, E, "0o4755"]],
    "device": [["c", "null", 1, 3]],
    "block device": [["b", "sda", 8, 0]],
    "FIFO": [["p", "fifo"]],
    "socket": [["s", "socket"]],
    "placeholder that is a relative path": [["f", "a", 0, E, 0, "text", "x"]],
    "placeholder with a NUL": [["f", "a", 0, E, 0, "binary", "/a\0"]],
    "a name that no file can have": [["f", "\ud800", 0, E, 0]],
    "two spellings of one name": [["f", "\udcc3\udca9", 0, E, 0], ["f", "\xe9", 0, E, 0]],
    "no list": [{"f": "a"}],
    "numbers": [1, 2.5, None],
    "twice": [["d", "a"], ["d", "a"]],
    "out of order": [["d", "b"], ["d", "a"]],
}


@pytest.mark.parametrize("name", ROWS)
def test_entries_that_would_do_harm(store: Store, name: str) -> None:
    environment_id = packed(store, aimed(store, ROWS[name]))
    with pytest.raises(ManifestInvalid):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)
    assert not os.path.lexists("/tmp/envship-was-here")


@pytest.mark.parametrize("row", HOSTILE_ROWS, ids=repr)
def test_an_entry_that_breaks_the_format_builds_nothing(store: Store, row: Any) -> None:
    environment_id = packed(store, [row])
    with pytest.raises(ManifestInvalid):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "target", "hard link"])
def test_a_path_that_leaves_the_prefix_builds_nothing(store: Store, kind: str) -> None:
    """Each of them, wherever a listing may name a path."""
    paths = [path for path in (HOSTILE_TARGETS if kind == "target" else HOSTILE_PATHS) if not isinstance(path, bytes)]
    for path in paths:
        rows: dict[str, list[Any]] = {
            "file": [["f", path, 0, E, 0]],
            "folder": [["d", path]],
            "link": [["l", path, "x"]],
            "target": [["l", "link", path]],
            "hard link": [["h", "link", path]],
        }
        environment_id = packed(store, rows[kind])
        with pytest.raises(ManifestInvalid):
            materialise(store, environment_id)
        assert_nothing_built(store, environment_id)


def test_a_file_of_another_package_cannot_be_linked(store: Store) -> None:
    other = package_of(store, {"lib/x": b"x"}, "other")
    raw = json.dumps([["h", "y", "lib/x"]], separators=(",", ":")).encode()
    evil = Package("evil", "1", "0", "files", Chunk(store.write_chunk(raw), len(raw)), ())
    with pytest.raises(ManifestInvalid):
        materialise(store, environment_of(store, [other, evil]).id)


def test_no_bit_but_the_usual_nine_is_ever_set(store: Store) -> None:
    before = os.umask(0)
    try:
        prefix = materialise(store, tiny_environment(store))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.lstat().st_mode) for path in prefix.rglob("*") if not path.is_symlink()}
    assert modes == {0o644, 0o755}


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        ([["f", "a", 5, X, 0]], [4]),
        ([["f", "a", 3, X, 0]], [4]),
        ([["f", "a", 1 << 50, X, 0]], [4]),
        ([["f", "a", -4, X, 0], ["f", "b", 8, X, 0]], [4]),
        ([["f", "a", 4, X, 0]], [5]),
        ([["f", "a", 4, X, 0]], [0, 4]),
        ([["f", "a", 4, X, 0]], [1, 1, 1, 1]),
        ([["f", "a", 2, X, 0], ["f", "b", 2, X, 0]], [4]),
        ([["f", "a", 8, X, 0]], [4, 4]),
    ],
    ids=["more", "less", "a petabyte", "negative", "chunk", "empty chunk", "small chunks", "halves", "overlap"],
)
def test_sizes_and_ranges_that_lie(store: Store, rows: list[Any], sizes: list[int]) -> None:
    digest = store.write_chunk(b"xxxx")
    environment_id = packed(store, rows, chunks=[Chunk(digest, size) for size in sizes])
    with pytest.raises(ManifestInvalid):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)


def test_a_terabyte_from_one_small_chunk_does_not_fit(store: Store) -> None:
    data = b"\0" * (16 << 20)
    chunk = Chunk(store.write_chunk(data), len(data))
    environment_id = packed(store, [["f", "a", len(data) * 65536, X, 0]], chunks=[chunk] * 65536)
    with pytest.raises(StoreFull):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)


def test_the_size_of_a_listing_that_lies(store: Store) -> None:
    raw = b"[]"
    lying = Package("evil", "1", "0", "files", Chunk(store.write_chunk(raw), 3), ())
    with pytest.raises(ManifestInvalid, match="2 bytes, the manifest says 3"):
        materialise(store, environment_of(store, [lying]).id)


def test_more_entries_than_an_environment_may_have(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many packages they come from, and before they are all read."""
    monkeypatch.setattr(blueprint, "ENTRY_LIMIT", 1000)
    raw = json.dumps([["d", f"{number:04}"] for number in range(600)], separators=(",", ":")).encode()
    package = Package("evil", "1", "0", "files", Chunk(store.write_chunk(raw), len(raw)), ())
    absent = package._replace(version="2", listing=Chunk(digest_of(b"absent"), 1))
    with pytest.raises(ManifestInvalid, match="more than 1000 entries"):
        materialise(store, environment_of(store, [package, package, absent]).id)


TEN_MILLION = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
try:
    materialise(Store(Path(sys.argv[2])), EnvironmentId(sys.argv[3]))
except ManifestInvalid as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, error)
"""


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_ten_million_entries(store: Store) -> None:
    """In ten listings of a million: refused, in the memory that the largest environment allowed would take."""
    raw = json.dumps([["d", f"{number:07}"] for number in range(1_000_000)], separators=(",", ":")).encode()
    listing = Chunk(store.write_chunk(raw), len(raw))
    packages = [Package("evil", str(number), "0", "files", listing, ()) for number in range(10)]
    command = [sys.executable, "-c", TEN_MILLION, CODE, str(store.layout.root), environment_of(store, packages).id]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    kilobytes, _, message = done.stdout.partition(" ")
    assert "more than 1000000 entries" in message
    assert int(kilobytes) < 1 << 20


def test_long_paths_do_not_stand_for_gigabytes_of_folders(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "DIRECTORY_LIMIT_CHARACTERS", 100_000)
    rows = [["d", f"{number:04}" + "/a" * 2000] for number in range(3)]
    with pytest.raises(ManifestInvalid, match="more than 100000 characters"):
        materialise(store, packed(store, rows))


def test_a_text_that_grows_without_end(store: Store) -> None:
    content = b"/e" * (8 << 20)
    rows = [["f", "a", len(content), digest_of(content), 0, "text", "/e"]]
    environment_id = packed(store, rows, content)
    with pytest.raises(ManifestInvalid, match="grow"):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)


def test_a_first_line_that_takes_for_ever(store: Store) -> None:
    content = b"#!" + PLACEHOLDER.encode() + b" " * 4_000_000 + b"x\n"
    prefix = materialise(store, tiny_environment(store, {"a*": (content, "text")}, 1 << 20))
    assert (prefix / "a").read_bytes() == content.replace(PLACEHOLDER.encode(), os.fsencode(prefix))


NAMES = [
    b"a\nb",
    b"caf\xe9",
    b"\xff\xfe",
    b"Case",
    b"case",
    b"CASE",
    b" ",
    b"\x1b[31m",
    b"-rf",
    b"*?",
    b"a\\b",
    b"x" * 255,
]


def test_names_that_are_strange_but_allowed(store: Store) -> None:
    files = {os.fsdecode(name) + "/" + os.fsdecode(name): name for name in NAMES}
    prefix = materialise(store, tiny_environment(store, files))  # type: ignore[arg-type]
    for name in NAMES:
        with open(os.path.join(os.fsencode(prefix), name, name), "rb") as file:
            assert file.read() == name
    assert len(os.listdir(prefix)) == len(NAMES)


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["x" * 200] * 20)])
def test_a_name_longer_than_the_file_system_allows(store: Store, name: str) -> None:
    environment_id = tiny_environment(store, {name: b""})
    with pytest.raises(MaterialiseError, match=r"(?i)name too long"):
        materialise(store, environment_id)
    assert_nothing_built(store, environment_id)


COLLIDING: dict[str, dict[str, Content]] = {
    "files": {"Case": b"1", "case": b"2"},
    "files with the same content": {"Case": b"1", "case": b"1"},
    "folders": {"Lib/a": b"1", "lib/b": b"2"},
    "folder and file": {"Lib/a": b"1", "lib": b"2"},
    "file and link": {"Case": b"1", "case": Link("case", "x")},
    "links": {"Case": Link("Case", "x"), "case": Link("case", "y")},
    "folder and link through which the other's files would lie": {"LIB/a": b"1", "lib": Link("lib", "bin")},
    "file and hard link": {"Case": b"1", "a": b"2", "case": HardLink("case", "a")},
    "in a folder": {"bin/Tool*": b"1", "bin/tool*": b"2"},
}


def in_small_letters(call: Callable[..., Any], argument: int, handle: str) -> Callable[..., Any]:
    """*call* with that *argument* in small letters, where it is looked up from a *handle*."""

    def lowered(*arguments: Any, **named: Any) -> Any:
        if handle in named:
            arguments = (*arguments[:argument], arguments[argument].lower(), *arguments[argument + 1 :])
        return call(*arguments, **named)

    return lowered


@pytest.mark.parametrize("link_mode", ["copy", "hardlink"])
@pytest.mark.parametrize("name", COLLIDING)
def test_names_that_differ_in_case_only_where_case_is_ignored(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, link_mode: str
) -> None:
    """The build makes each name in small letters, as a file system that has one place for both would find it.

    Where files are shared, they come from an environment that has some of the same.
    """
    materialise(store, tiny_environment(store, {"one": b"1", "two": b"2"}))
    environment_id = tiny_environment(store, COLLIDING[name])
    with monkeypatch.context() as patch:
        for call, argument, handle in (
            *((call, 0, "dir_fd") for call in ("mkdir", "chmod", "open", "unlink", "utime")),
            *(("symlink", 1, "dir_fd"), ("link", 1, "dst_dir_fd")),
        ):
            patch.setattr(writer.os, call, in_small_letters(getattr(os, call), argument, handle))
        with pytest.raises(MaterialiseError, match="exists"):
            materialise(store, environment_id, link_mode=link_mode)
    assert_nothing_built(store, environment_id)
    prefix = materialise(store, environment_id, link_mode=link_mode)
    assert {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_symlink() or path.is_file()} == {
        each.rstrip("*") for each in COLLIDING[name]
    }


@needs_mount
@pytest.mark.parametrize("link_mode", ["copy", "hardlink"])
def test_names_that_the_file_system_does_not_tell_apart(tmp_path: Path, link_mode: str) -> None:
    """The same on a file system that has one place for both: a store there takes what is told apart otherwise."""
    lower = tmp_path / "mount" / "folder"
    lower.mkdir(parents=True)
    with odd(tmp_path / "mount" / "point", lower, "ignores-case") as path:
        store = Store(path / "store")
        materialise(store, tiny_environment(store, {"one": b"1", "two": b"2"}))
        for files in COLLIDING.values():
            environment_id = tiny_environment(store, files)
            with pytest.raises(MaterialiseError, match="exists"):
                materialise(store, environment_id, link_mode=link_mode)
            assert_nothing_built(store, environment_id)
        prefix = materialise(store, tiny_environment(store), link_mode=link_mode)
        assert (prefix / "BIN" / "TOOL").samefile(prefix / "bin" / "tool")
        assert list(verify.damaged_files(store, tiny_environment(store))) == []


# -- chunks


def bomb(claimed_bytes: int) -> bytes:
    """A zstd frame that claims much, in few bytes (RFC 8878, 3.1.1.1)."""
    return bytes.fromhex("28b52ffd") + bytes([0b11100000]) + claimed_bytes.to_bytes(8, "little")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "flipped": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "zero length": lambda data: b"",
    "garbage": lambda data: os.urandom(len(data)),
    "512 MiB claimed": lambda data: bomb(512 << 20),
    "16 EiB claimed": lambda data: bomb((1 << 64) - 3),
    "longer than any chunk": lambda data: b"\0" * (20 << 20),
}


def chunk_path(store: Store, digest: str) -> Path:
    return next(store.layout.chunks.glob(f"*/{digest}.*"))


@pytest.mark.parametrize("which", ["listing", "content"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_chunk_is_dropped_and_fetched_again(store: Store, which: str, name: str) -> None:
    package = package_of(store, {"a": os.urandom(500), "b": b"b" * 500}, chunk_bytes=1000)
    environment_id = environment_of(store, [package]).id
    digest = package.listing.digest if which == "listing" else package.chunks[0].digest
    path = chunk_path(store, digest)
    content = store.read_chunk(digest)
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ChunkMissing) as caught:
        materialise(store, environment_id)
    assert caught.value.digest == digest
    assert not path.exists()
    assert_nothing_built(store, environment_id)
    store.write_chunk(content)
    assert list(verify.damaged_files(store, environment_id, materialise(store, environment_id))) == []


def test_a_chunk_under_the_name_of_another(store: Store) -> None:
    package = package_of(store, {"a": b"a" * 100, "b": b"b" * 100}, chunk_bytes=100)
    one, two = (chunk_path(store, chunk.digest) for chunk in package.chunks)
    one.write_bytes(two.read_bytes())
    with pytest.raises(ChunkMissing):
        materialise(store, environment_of(store, [package]).id)


def test_a_sound_chunk_in_another_store_is_used_instead(tmp_path: Path) -> None:
    """The first copy is damaged so that it decodes: that shows only when the content is compared."""
    staged, store = Store(tmp_path / "staged"), Store(tmp_path / "store")
    package = package_of(store, {"a": b"a" * 100, "b": b"b" * 100}, chunk_bytes=200)
    package_of(staged, {"a": b"a" * 100, "b": b"b" * 100}, chunk_bytes=200)
    other = staged.write_chunk(b"c" * 200)
    path = chunk_path(staged, package.chunks[0].digest)
    path.write_bytes(chunk_path(staged, other).read_bytes())
    both = Store(tmp_path / "store", [tmp_path / "staged"])
    environment_id = environment_of(store, [package]).id
    assert list(verify.damaged_files(both, environment_id, materialise(both, environment_id))) == []
    assert path.exists()


@pytest.mark.parametrize("place", [0, 10, 100, -1])
def test_a_bit_flipped_in_a_manifest(store: Store, place: int) -> None:
    environment_id = tiny_environment(store)
    path = store.layout.manifest(environment_id)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(EnvironmentMissing):
        materialise(store, environment_id)
    assert not path.exists()


def test_a_manifest_with_its_right_name_that_is_none(store: Store) -> None:
    for data in (b"[" * 1_000_000, b'{"format":1}', b"\0" * 1000, b"9" * 100_000):
        environment_id = EnvironmentId(hashlib.sha256(data).hexdigest())
        store.layout.manifest(environment_id).write_bytes(data)
        with pytest.raises(ContentError):
            materialise(store, environment_id)
        assert_nothing_built(store, environment_id)


def test_a_package_named_like_a_path(store: Store) -> None:
    """Names of packages and versions are never part of a path."""
    package = package_of(store, {"a": b""}, "../../outside/secret", "/etc")
    assert (materialise(store, environment_of(store, [package], {"../x": "\n"}).id) / "a").exists()


def test_chunks_whose_digests_are_paths(store: Store) -> None:
    chunk: Any = Chunk("../../outside/secret", 1)  # type: ignore[arg-type]
    manifest = Manifest("linux-64", "3", [Package("evil", "1", "0", "files", chunk, ())])
    with pytest.raises(ManifestInvalid):
        materialise(store, store.write_manifest(manifest))


# -- file systems and limits


@needs_mount
def test_inodes_that_run_out_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before; where that is not possible, nothing is left; with more of them the same call succeeds."""
    with tmpfs(tmp_path / "mount", "size=50m,nr_inodes=120") as path:
        staged = Store(tmp_path / "staged")
        environment_id = tiny_environment(staged, {f"{number:03}": b"x" for number in range(300)})
        store = Store(path / "store", [tmp_path / "staged"])
        with pytest.raises(StoreFull):
            materialise(store, environment_id)
        monkeypatch.setattr(module, "_check_room", lambda *_: None)
        with pytest.raises(StoreFull) as caught:
            materialise(store, environment_id)
        assert caught.value.free_bytes is None
        assert_nothing_built(store, environment_id)
        remount(path, "nr_inodes=1000")
        assert len(list(materialise(store, environment_id).iterdir())) == 300


@needs_mount
def test_a_file_system_on_which_nothing_can_be_run(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=50m,noexec") as path:
        store = Store(path / "store")
        environment_id = tiny_environment(store)
        with pytest.raises(MaterialiseError, match="noexec"):
            materialise(store, environment_id)
        assert_nothing_built(store, environment_id)
        remount(path, "exec")
        materialise(store, environment_id)


@needs_mount
def test_a_file_system_that_has_become_read_only(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=50m") as path:
        store = Store(path / "store")
        environment_id = tiny_environment(store)
        remount(path, "ro")
        with pytest.raises(EnvshipError, match="Read-only file system"):
            materialise(store, environment_id)
        remount(path, "rw")
        prefix = materialise(store, environment_id)
        remount(path, "ro")
        assert materialise(store, environment_id) == prefix


FEW_FILES = """
import os, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
store = Store(Path(sys.argv[2]))
spare, hard = 0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
while True:
    limit = len(os.listdir("/proc/self/fd")) - 1 + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        materialise(store, EnvironmentId(sys.argv[3]), processes=2)
        break
    except EnvshipError as error:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert not store.layout.prefix(EnvironmentId(sys.argv[3])).exists(), "something was built"
        print(type(error).__name__, error)
    spare += 1
print("built", spare)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_too_many_open_files_never_pass_for_a_missing_chunk(store: Store) -> None:
    """With every number of descriptors that is not enough: our error, and nothing built; no chunk is dropped."""
    environment_id = tiny_environment(store, {f"{number:03}": b"%d" % number for number in range(300)})
    chunks = sorted(store.layout.chunks.rglob("*"))
    command = [sys.executable, "-c", FEW_FILES, CODE, str(store.layout.root), environment_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    *failures, last = done.stdout.splitlines()
    assert failures and last.startswith("built")
    assert all("Too many open files" in line for line in failures), failures
    assert sorted(store.layout.chunks.rglob("*")) == chunks


def test_files_may_not_grow_over_a_limit(store: Store) -> None:
    """As on a disk with a quota for files (``ulimit -f``): the kernel's signal does not end Python."""
    environment_id = tiny_environment(store, {"a": os.urandom(200_000)}, 1 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(MaterialiseError, match="File too large"):
            materialise(store, environment_id)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_nothing_built(store, environment_id)
