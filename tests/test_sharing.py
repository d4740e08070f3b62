"""What an edit in place of one environment does to others, in each link mode, on real file systems."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments import PLACEHOLDER, Content, environment_of, package_of
from tests.filesystems import needs_mount, with_reflinks
from worker_bootstrap import verify
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

LARGE = bytes(range(256)) * 4096
FILES: dict[str, Content] = {
    "lib/large.so": LARGE,
    "bin/tool*": b"tool" * 3000,
    "bin/script*": (b"#!" + PLACEHOLDER.encode() + b"/bin/python\n", "text"),
}


def pair(store: Store) -> tuple[EnvironmentId, EnvironmentId]:
    """Two environments with a package in common."""
    common = package_of(store, FILES, "common", chunk_bytes=1 << 20)
    others = [package_of(store, {"version": version}, "other") for version in (b"1", b"2")]
    first, second = (environment_of(store, [common, other]).id for other in others)
    return first, second


def edit(path: Path) -> None:
    """Change a byte where it is, as an editor does that keeps the file."""
    with open(path, "r+b") as file:
        file.write(b"X")


def third(store: Store, tag: bytes) -> EnvironmentId:
    common = package_of(store, FILES, "common", chunk_bytes=1 << 20)
    return environment_of(store, [common, package_of(store, {"version": tag}, "other")]).id


@pytest.fixture(params=["btrfs", "xfs"])
def cloning(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store on a file system that has reflinks."""
    with with_reflinks(tmp_path / "mount", request.param) as path:
        yield Store(path / "store")


def extents_are_shared(one: Path, other: Path) -> bool:
    """Whether two files occupy the same blocks, by the kernel's own account (``FS_IOC_FIEMAP``)."""
    return physical(one) == physical(other)


def physical(path: Path) -> list[int]:
    """Where the first extents of a file lie on the disk. Source: linux/fiemap.h."""
    header, extent, count = 32, 56, 32
    request = bytearray(header + extent * count)
    request[8:16] = (1 << 62).to_bytes(8, "little")
    request[16:20] = (1).to_bytes(4, "little")  # FIEMAP_FLAG_SYNC
    request[24:28] = count.to_bytes(4, "little")
    with open(path, "rb") as file:
        fcntl.ioctl(file, 0xC020660B, request)
    mapped = int.from_bytes(request[20:24], "little")
    starts = [header + extent * number + 8 for number in range(mapped)]
    return [int.from_bytes(request[start : start + 8], "little") for start in starts]


@needs_mount
@pytest.mark.parametrize("mode", ["auto", "reflink"])
def test_a_reflink_shares_blocks_and_no_edit(cloning: Store, mode: str) -> None:
    """Both are written separately from then on, and what was edited is not taken for a third."""
    first, second = pair(cloning)
    one = materialise(cloning, first, link_mode=mode)
    other = materialise(cloning, second, link_mode=mode)
    assert not (one / "lib/large.so").samefile(other / "lib/large.so")
    assert extents_are_shared(one / "lib/large.so", other / "lib/large.so")
    assert (other / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (other / "lib/large.so").stat().st_mtime_ns == WRITTEN_AT_NS
    edit(other / "lib/large.so")
    assert list(verify.damaged_files(cloning, first)) == []
    fresh = third(cloning, b"3")
    materialise(cloning, fresh, link_mode=mode)
    assert list(verify.damaged_files(cloning, fresh)) == []


@needs_mount
def test_on_a_file_system_with_reflinks_the_other_modes_do_what_they_say(cloning: Store) -> None:
    first, second = pair(cloning)
    one = materialise(cloning, first)
    copied = materialise(cloning, second, link_mode="copy")
    assert not extents_are_shared(one / "lib/large.so", copied / "lib/large.so")
    linked = materialise(cloning, third(cloning, b"3"), link_mode="hardlink")
    names = [path / "lib/large.so" for path in (one, copied)]
    assert any((linked / "lib/large.so").samefile(name) for name in names)


def test_a_copy_shares_no_edit(store: Store) -> None:
    first, second = pair(store)
    materialise(store, first, link_mode="copy")
    edit(materialise(store, second, link_mode="copy") / "lib/large.so")
    assert list(verify.damaged_files(store, first)) == []


def test_an_edit_of_a_hard_link_is_seen_wherever_it_is_and_goes_no_further(store: Store) -> None:
    """It reaches the environments that have the file already: both are found damaged. A new one does not get it."""
    first, second = pair(store)
    one = materialise(store, first, link_mode="hardlink")
    other = materialise(store, second, link_mode="hardlink")
    assert (one / "lib/large.so").samefile(other / "lib/large.so")
    edit(other / "lib/large.so")
    for environment_id in (first, second):
        assert [str(line) for line in verify.damaged_files(store, environment_id)] == ["lib/large.so has other content"]
    fresh = third(store, b"3")
    built = materialise(store, fresh, link_mode="hardlink")
    assert list(verify.damaged_files(store, fresh)) == []
    assert (built / "bin/tool").samefile(one / "bin/tool")


def test_replacing_a_file_as_installers_do_concerns_one_environment(store: Store) -> None:
    first, second = pair(store)
    materialise(store, first, link_mode="hardlink")
    path = materialise(store, second, link_mode="hardlink") / "lib/large.so"
    path.unlink()
    path.write_bytes(b"new")
    assert list(verify.damaged_files(store, first)) == []


def test_files_that_name_their_prefix_are_never_shared(store: Store) -> None:
    first, second = pair(store)
    one, other = materialise(store, first), materialise(store, second)
    assert not (one / "bin/script").samefile(other / "bin/script")
    edit(other / "bin/script")
    assert list(verify.damaged_files(store, first)) == []


def test_a_file_with_as_many_names_as_a_file_can_have_is_written_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, *_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, "Too many links", source)

    first, second = pair(store)
    materialise(store, first, link_mode="hardlink")
    monkeypatch.setattr(os, "link", full)
    materialise(store, second, link_mode="hardlink")
    assert list(verify.damaged_files(store, second)) == []
