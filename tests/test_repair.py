from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.environments import PLACEHOLDER, environment_of, package_of, tiny_environment
from worker_bootstrap import ready_mark, soundness
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import ChunkMissing
from worker_bootstrap.manifest import HardLink, Manifest
from worker_bootstrap.materialise import materialise
from worker_bootstrap.repair import mend, repair
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def environment_id(store: Store) -> EnvironmentId:
    environment_id = tiny_environment(store)
    materialise(store, environment_id)
    return environment_id


def folder_in_the_way(prefix: Path) -> None:
    (prefix / "lib/empty").unlink()
    (prefix / "lib/empty/full").mkdir(parents=True)


def link_out(prefix: Path) -> None:
    shutil.rmtree(prefix / "lib/data")
    (prefix / "lib/data").symlink_to(prefix.parents[2] / "outside")


def moved_behind_a_link(prefix: Path) -> None:
    """Everything looks whole through the link."""
    (prefix / "lib").rename(prefix.parents[2] / "moved")
    (prefix / "lib").symlink_to(prefix.parents[2] / "moved")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "bin/tool").unlink(),
        lambda p: (p / "bin/tool").write_bytes(b"edited"),
        lambda p: (p / "bin/tool-1").unlink(),
        lambda p: (p / "bin/tool").chmod(0o644),
        lambda p: (p / "bin/alias").unlink(),
        lambda p: (p / "lib/libx.so").write_bytes(b""),
        lambda p: (p / "lib/nothing-inside").rmdir(),
        lambda p: shutil.rmtree(p / "lib"),
        folder_in_the_way,
        link_out,
        moved_behind_a_link,
    ],
)
def test_damage_is_mended_where_it_is_used_without_a_question(
    store: Store, environment_id: EnvironmentId, change: Callable[[Path], object], tmp_path: Path
) -> None:
    """In place, so that nothing moves under processes that run from it."""
    (tmp_path / "outside").mkdir()
    prefix = store.layout.prefix(environment_id)
    inode = prefix.stat().st_ino
    change(prefix)
    assert list(damaged_files(store, environment_id))
    if sound_prefix(store, environment_id) is not None:  # a mode is not found at a quick look
        repair(store, environment_id)
    assert materialise(store, environment_id) == prefix
    assert list(damaged_files(store, environment_id)) == []
    assert sound_prefix(store, environment_id) == prefix
    assert prefix.stat().st_ino == inode
    assert list((tmp_path / "outside").iterdir()) == []
    assert list(store.layout.tmp.iterdir()) == []


def test_a_process_that_has_the_file_open_goes_on(store: Store) -> None:
    environment_id = tiny_environment(store, {"run*": b"#!/bin/sh\nread line\necho still here\n", "other": b"x"})
    prefix = materialise(store, environment_id)
    process = subprocess.Popen([prefix / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    os.utime(prefix / "run")  # as if somebody had written to it
    (prefix / "run").chmod(0o644)
    (prefix / "other").unlink()
    materialise(store, environment_id)
    assert (prefix / "other").read_bytes() == b"x"
    assert stat.S_IMODE((prefix / "run").stat().st_mode) == 0o755
    assert process.communicate(b"go\n", timeout=30)[0] == b"still here\n"


def test_a_missing_chunk_is_named_and_the_rest_can_wait_for_it(store: Store, environment_id: EnvironmentId) -> None:
    prefix = store.layout.prefix(environment_id)
    (prefix / "lib/data/large.bin").unlink()
    content = {path: path.read_bytes() for path in store.layout.chunks.glob("*/*")}
    shutil.rmtree(store.layout.chunks)
    store.layout.chunks.mkdir()
    with pytest.raises(ChunkMissing):
        materialise(store, environment_id)
    for path, data in content.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert materialise(store, environment_id) == prefix
    assert list(damaged_files(store, environment_id)) == []


def test_what_needs_no_chunk_that_is_missing_is_mended(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """And no more than that is told."""
    files = {"a": b"a" * 100, "a-too": HardLink("a-too", "a"), "b": b"b" * 100, "z": b"z" * 100}
    environment_id = tiny_environment(store, files, chunk_bytes=100)
    prefix = materialise(store, environment_id)
    for name in ("a", "b", "z"):
        (prefix / name).unlink()
    chunk = next(store.layout.chunks.glob(f"*/{digest_of(b'a' * 100)}.*"))
    content = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(ChunkMissing) as raised:
        repair(store, environment_id)
    assert raised.value.digest == digest_of(b"a" * 100)
    assert {damage.path for damage in damaged_files(store, environment_id)} == {"a", "a-too"}
    assert "2 files were mended" in caplog.text
    outcome = mend(store, environment_id)
    assert (outcome.mended, outcome.left[0].path, outcome.is_whole) == ([], "a", False)
    chunk.write_bytes(content)
    assert {damage.path for damage in repair(store, environment_id)} == {"a", "a-too"}
    assert list(damaged_files(store, environment_id)) == []


def test_what_was_added_goes_only_when_asked(store: Store, environment_id: EnvironmentId) -> None:
    prefix = store.layout.prefix(environment_id)
    (prefix / "lib/added").touch()
    (prefix / "added-too").mkdir()
    (prefix / "added-too/x").touch()
    assert repair(store, environment_id) == []
    assert (prefix / "lib/added").exists()
    mended = mend(store, environment_id, remove_added=True).mended
    assert sorted(damage.path for damage in mended) == ["added-too/x", "lib/added"]
    assert list(damaged_files(store, environment_id)) == []


def test_a_file_that_was_touched_is_not_compared_for_ever(store: Store, environment_id: EnvironmentId) -> None:
    prefix = store.layout.prefix(environment_id)
    os.utime(prefix / "lib/empty")
    assert sound_prefix(store, environment_id) is None
    materialise(store, environment_id)
    assert sound_prefix(store, environment_id) == prefix


def test_a_link_shared_with_another_environment_is_mended_in_each(store: Store) -> None:
    """An edit in place reaches every hard link; each environment finds it, and mending one leaves the other alone."""
    common = package_of(store, {"shared": b"shared" * 10}, "common")
    one = environment_of(store, [common, package_of(store, {"one": b"1"}, "one")]).id
    two = environment_of(store, [common, package_of(store, {"two": b"2"}, "two")]).id
    first, second = materialise(store, one), materialise(store, two, link_mode="hardlink")
    assert (first / "shared").samefile(second / "shared")
    (first / "shared").write_bytes(b"edited")
    for environment_id, prefix in ((one, first), (two, second)):
        assert (prefix / "shared").read_bytes() == b"edited"
        materialise(store, environment_id)
        assert (prefix / "shared").read_bytes() == b"shared" * 10


LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"


def environment_that_compiles(store: Store, *modules: str) -> EnvironmentId:
    """An environment of this interpreter whose *modules* name the prefix, so that their byte code is made there."""
    text = f"HERE = '{PLACEHOLDER}'\n" + "".join(f"x{n} = {n!r} * 3\n" for n in range(500))
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'.encode()
    files = {f"{LIBRARY}/{name}.py": (text.encode(), "text") for name in modules}
    package = package_of(store, {"bin/python*": python, **files})
    return store.write_manifest(Manifest("linux-64", ".".join(map(str, sys.version_info[:3])), [package]))


@pytest.mark.parametrize("how", ["a restart of the machine", "verify --repair"])
@pytest.mark.parametrize("knows", [True, False])
def test_byte_code_that_was_made_where_it_lies_is_made_again(
    store: Store, how: str, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may have left any part of it, and of the inventory, and no listing says what it should be."""
    environment_id = environment_that_compiles(store, "mine")
    prefix = materialise(store, environment_id)
    (code,) = (prefix / LIBRARY / "__pycache__").iterdir()
    data = code.read_bytes()
    code.write_bytes(data[:100] + bytes(len(data) - 100))
    if not knows:
        store.layout.inventory(environment_id).write_bytes(b"")
    if how == "verify --repair":
        mend(store, environment_id)
    else:
        monkeypatch.setattr(ready_mark, "boot_id", lambda: "another boot")
        materialise(store, environment_id)
    assert code.read_bytes() == data
    assert next(soundness.damage(store.layout, environment_id), None) is None
    assert list(damaged_files(store, environment_id)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda code: code.write_bytes(code.read_bytes()[:-1] + b"?"), "has other content"),
        (lambda code: code.unlink(), "cannot be read: No such file or directory"),
        (lambda code: (code.unlink(), code.symlink_to("/dev/null")), "is no regular file"),
    ],
)
def test_byte_code_that_was_made_where_it_lies_is_compared_with_what_was_made(
    store: Store, change: Callable[[Path], object], problem: str
) -> None:
    environment_id = environment_that_compiles(store, "one", "two")
    prefix = materialise(store, environment_id)
    one, _ = sorted((prefix / LIBRARY / "__pycache__").iterdir())
    before, made_ns = one.read_bytes(), one.stat().st_mtime_ns
    assert list(damaged_files(store, environment_id)) == []
    assert repair(store, environment_id) == []
    assert one.stat().st_mtime_ns == made_ns, "what is as it was made is left alone"
    change(one)
    (damage,) = damaged_files(store, environment_id)
    assert (prefix / damage.path, damage.problem) == (one, problem)
    assert mend(store, environment_id).mended == [damage]
    assert one.read_bytes() == before and not one.is_symlink()
    assert list(damaged_files(store, environment_id)) == []


@pytest.mark.parametrize("way", ["moved", "copied", "restored from a backup"])
def test_an_environment_in_a_store_that_lies_elsewhere_now_is_made_to_name_that_place(
    store: Store, tmp_path: Path, way: str
) -> None:
    """Its scripts and its byte code would go on leading to where it was."""
    environment_id = environment_that_compiles(store, "mine")
    old = materialise(store, environment_id, durable=True)
    there = tmp_path / "there"
    if way == "moved":
        store.layout.root.rename(there)
    else:
        shutil.copytree(store.layout.root, there, copy_function=shutil.copy if way == "copied" else shutil.copy2)
    moved = Store(there)
    assert moved.built(environment_id) is None
    prefix = materialise(moved, environment_id, durable=True)
    assert prefix == moved.built(environment_id) == moved.layout.prefix(environment_id)
    assert list(damaged_files(moved, environment_id)) == []
    for path in prefix.rglob("mine.*"):
        assert str(prefix).encode() in path.read_bytes() and str(old).encode() not in path.read_bytes()


def test_an_environment_that_was_built_for_another_place_is_not_run_in_a_read_only_store(
    store: Store, environment_id: EnvironmentId, tmp_path: Path
) -> None:
    store.layout.root.rename(tmp_path / "there")
    own = Store(tmp_path / "own", [tmp_path / "there"])
    assert own.built(environment_id) is None
    assert materialise(own, environment_id) == own.layout.prefix(environment_id)


def test_an_environment_that_is_reached_by_another_name_is_run_as_it_is(
    store: Store, environment_id: EnvironmentId, tmp_path: Path
) -> None:
    """What it names leads to it, whether by a link, as automounters make them, or by a mount."""
    (tmp_path / "link").symlink_to(store.layout.root)
    link = Store(tmp_path / "link")
    assert link.built(environment_id) == link.layout.prefix(environment_id)
