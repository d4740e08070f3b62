from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from tests.environments import PLACEHOLDER, Content, environment_of, package_of
from worker_bootstrap import donor, ready_mark, verify
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import SettingInvalid
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

COMMON: dict[str, Content] = {
    "lib/common": b"the same" * 50,
    "bin/tool*": b"the same, executable" * 20,
    "bin/script*": (b"#!" + PLACEHOLDER.encode() + b"/bin/python\n", "text"),
    "lib/edited": b"somebody edits this",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def two(store: Store) -> tuple[EnvironmentId, EnvironmentId]:
    """Two environments: one package in common, one changed, one that only the second has."""
    common = package_of(store, COMMON, "common")
    old = package_of(store, {"a/changed": b"old", "a/kept": b"kept", "a/mode": b"mode"}, "changed", "1")
    new = package_of(store, {"a/changed": b"new", "a/kept": b"kept", "a/mode*": b"mode"}, "changed", "2")
    added = package_of(store, {"added": b"added"}, "added")
    return environment_of(store, [common, old]).id, environment_of(store, [common, new, added]).id


def shared(one: Path, other: Path) -> set[str]:
    paths = [str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()]
    return {path for path in paths if (one / path).exists() and (one / path).samefile(other / path)}


def test_what_is_common_and_unchanged_is_hard_linked(store: Store) -> None:
    first, second = two(store)
    one, other = materialise(store, first), materialise(store, second, link_mode="hardlink")
    assert shared(one, other) == {"lib/common", "bin/tool", "lib/edited", "a/kept"}
    assert list(verify.damaged_files(store, second)) == []
    assert list(verify.damaged_files(store, first)) == []


def test_a_copy_shares_nothing(store: Store) -> None:
    first, second = two(store)
    one, other = materialise(store, first), materialise(store, second, link_mode="copy")
    assert shared(one, other) == set()
    assert list(verify.damaged_files(store, second)) == []


def test_auto_works_on_any_file_system(store: Store) -> None:
    first, second = two(store)
    one, other = materialise(store, first), materialise(store, second, link_mode="auto")
    assert list(verify.damaged_files(store, second)) == []
    common = {"bin/tool", "lib/common", "a/kept"}
    assert shared(one, other) >= common or reflinks(one / "lib/common", store.layout.tmp / "clone")


def reflinks(path: Path, clone: Path) -> bool:
    """Whether the file system shares blocks (FICLONE, linux/fs.h)."""
    with open(path, "rb") as source, open(clone, "wb") as target:
        try:
            fcntl.ioctl(target, 0x40049409, source.fileno())
        except OSError:
            return False
    return True


def test_reflinks_where_there_are_none_are_copies(store: Store) -> None:
    first, second = two(store)
    one, other = materialise(store, first), materialise(store, second, link_mode="reflink")
    assert shared(one, other) == set()
    assert list(verify.damaged_files(store, second)) == []
    assert all(path.stat().st_mtime_ns == WRITTEN_AT_NS for path in other.rglob("*") if path.is_file())


def test_what_somebody_edited_or_removed_is_not_taken(store: Store) -> None:
    first, second = two(store)
    one = materialise(store, first)
    (one / "lib/edited").write_bytes(b"somebody EDITS this")
    (one / "lib/common").unlink()
    (one / "bin/tool").chmod(0o644)
    other = materialise(store, second, link_mode="hardlink")
    assert shared(one, other) == {"a/kept"}
    assert list(verify.damaged_files(store, second)) == []


def test_one_that_may_not_have_survived_a_restart_gives_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two(store)
    one = materialise(store, first)
    monkeypatch.setattr(ready_mark, "boot_id", lambda: "another boot")
    assert shared(one, materialise(store, second, link_mode="hardlink")) == set()


def test_a_symbolic_link_put_in_a_files_place_is_not_taken(store: Store, tmp_path: Path) -> None:
    first, second = two(store)
    one = materialise(store, first)
    secret = tmp_path / "secret"
    secret.write_bytes((one / "bin/tool").read_bytes())
    os.utime(secret, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))
    (one / "bin/tool").unlink()
    # As long as the file, of the same time, executable as all links are: nothing but its kind tells them apart.
    (one / "bin/tool").symlink_to("/" * (secret.stat().st_size - len(str(secret))) + str(secret))
    os.utime(one / "bin/tool", ns=(WRITTEN_AT_NS, WRITTEN_AT_NS), follow_symlinks=False)
    other = materialise(store, second, link_mode="hardlink")
    assert not (other / "bin/tool").is_symlink()
    assert list(verify.damaged_files(store, second)) == []


@pytest.mark.parametrize("damage", ["a file", "a link to itself", "a link to nothing"])
@pytest.mark.parametrize("link_mode", ["auto", "reflink", "hardlink"])
def test_a_folder_that_is_none_any_more_gives_nothing(store: Store, damage: str, link_mode: str) -> None:
    first, second = two(store)
    one = materialise(store, first)
    (one / "a").rename(store.layout.tmp / "away")
    if damage == "a file":
        (one / "a").write_bytes(b"a file")
    else:
        (one / "a").symlink_to("a" if damage == "a link to itself" else "nothing")
    other = materialise(store, second, link_mode=link_mode)
    assert list(verify.damaged_files(store, second)) == []
    if link_mode == "hardlink":
        assert shared(one, other) == {"lib/common", "bin/tool", "lib/edited"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EUCLEAN])
@pytest.mark.parametrize("call", ["stat", "link"])
def test_a_disk_that_gives_a_file_away_no_more_is_done_without(
    store: Store, code: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two(store)
    one = materialise(store, first)
    answer = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
        if path == "lib/common" and not named.keys().isdisjoint(("dir_fd", "src_dir_fd")):
            raise OSError(code, os.strerror(code), path)
        return answer(path, *arguments, **named)

    monkeypatch.setattr(donor.os, call, refuse)
    other = materialise(store, second, link_mode="hardlink")
    monkeypatch.undo()
    assert shared(one, other) == {"bin/tool", "lib/edited", "a/kept"}
    assert list(verify.damaged_files(store, second)) == []


def test_shared_content_needs_no_chunks(store: Store) -> None:
    package = package_of(store, {"x": b"x" * 500}, "x")
    materialise(store, environment_of(store, [package]).id)
    for digest in {chunk.digest for chunk in package.chunks}:
        next(store.layout.chunks.glob(f"*/{digest}.*")).unlink()
    other = environment_of(store, [package, package_of(store, {"y": b"y"}, "y")])
    assert (materialise(store, other.id, link_mode="hardlink") / "x").read_bytes() == b"x" * 500


def test_an_unknown_link_mode_is_refused(store: Store) -> None:
    with pytest.raises(SettingInvalid):
        materialise(store, two(store)[0], link_mode="symlink")
