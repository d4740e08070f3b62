from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.environments import PLACEHOLDER, tiny_environment
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks, damaged_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_an_intact_store_has_nothing_damaged(store: Store) -> None:
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    (prefix / "lib/__pycache__").mkdir()
    (prefix / "lib/__pycache__/x.pyc").touch()
    assert list(damaged_chunks(store, store.read_manifest(environment_id))) == []
    assert list(damaged_files(store, environment_id)) == []


def test_each_damaged_or_missing_chunk_is_named(store: Store) -> None:
    manifest = store.read_manifest(tiny_environment(store))
    one, two, *_ = sorted(manifest.chunks)
    next(store.layout.chunks.glob(f"*/{one}.*")).write_bytes(b"x")
    next(store.layout.chunks.glob(f"*/{two}.*")).unlink()
    found = list(damaged_chunks(store, manifest))
    assert len(found) == 2
    assert one in "".join(found) and two in "".join(found)


def replace_link(prefix: Path) -> None:
    (prefix / "bin/alias").unlink()
    (prefix / "bin/alias").symlink_to("/etc/passwd")


def break_hard_link(prefix: Path) -> None:
    content = (prefix / "bin/tool-1").read_bytes()
    (prefix / "bin/tool-1").unlink()
    (prefix / "bin/tool-1").write_bytes(content)


def link_instead_of_file(prefix: Path) -> None:
    (prefix / "lib/empty").unlink()
    (prefix / "lib/empty").symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda p: (p / "lib/empty").write_bytes(b"x"), "lib/empty has other content"),
        (lambda p: (p / "lib/empty").unlink(), "lib/empty cannot be read: No such file or directory"),
        (lambda p: (p / "lib/empty").chmod(0o755), "lib/empty has become executable"),
        (lambda p: (p / "lib/added").touch(), "lib/added was added"),
        (lambda p: os.symlink("x", p / "lib/added"), "lib/added was added"),
        (lambda p: (p / "lib/nothing-inside").rmdir(), "lib/nothing-inside is missing"),
        (replace_link, "bin/alias is not the link to tool any more"),
        (break_hard_link, "bin/tool-1 is not the same file as bin/tool any more"),
        (link_instead_of_file, "lib/empty is no regular file"),
    ],
)
def test_each_change_to_a_built_environment_is_named(store: Store, damage: Callable[[Path], None], line: str) -> None:
    environment_id = tiny_environment(store)
    damage(materialise(store, environment_id))
    assert [str(damage) for damage in damaged_files(store, environment_id)] == [line]


def test_a_file_that_grew_beyond_all_measure_is_not_read(store: Store) -> None:
    environment_id = tiny_environment(store)
    os.truncate(materialise(store, environment_id) / "lib/empty", 1 << 40)
    assert [str(damage) for damage in damaged_files(store, environment_id)] == ["lib/empty has other content"]


def test_a_changed_byte_in_a_relocated_file_is_found(store: Store) -> None:
    environment_id = tiny_environment(store)
    path = materialise(store, environment_id) / "lib/libx.so"
    path.write_bytes(path.read_bytes()[:-2] + b"X\0")
    assert [damage.path for damage in damaged_files(store, environment_id)] == ["lib/libx.so"]


def test_all_that_can_be_told_without_a_missing_chunk_is(store: Store) -> None:
    """Of files that name their prefix: the others, and whether those of that chunk are there."""
    script = b"#!" + PLACEHOLDER.encode() + b"/bin/python\n"
    files = {name: (script + name[-1:].encode(), "text") for name in ("bin/a", "bin/b", "bin/c")}
    environment_id = tiny_environment(store, {**files, "lib/z": b"z"}, chunk_bytes=len(script) + 1)
    prefix = materialise(store, environment_id)
    for name in ("bin/b", "bin/c", "lib/z"):
        (prefix / name).write_bytes(b"edited")
    (prefix / "bin/a").chmod(0o755)
    lost = digest_of(script + b"a")
    next(store.layout.chunks.glob(f"*/{lost}.*")).unlink()
    found: list[str] = []
    with pytest.raises(ChunkMissing, match=lost):
        for damage in damaged_files(store, environment_id):
            found.append(str(damage))
    assert found == [
        "bin/a has become executable",
        "bin/b has other content",
        "bin/c has other content",
        "lib/z has other content",
    ]


def test_what_is_not_built_cannot_be_verified(store: Store) -> None:
    with pytest.raises(EnvironmentMissing):
        list(damaged_files(store, EnvironmentId(tiny_environment(store))))
