from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.environments import tiny_environment
from worker_bootstrap import soundness
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import Inventory, damage, sound_prefix
from worker_bootstrap.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def environment_id(store: Store) -> EnvironmentId:
    environment_id = tiny_environment(store)
    materialise(store, environment_id)
    return environment_id


def test_what_was_just_built_is_sound(store: Store, environment_id: EnvironmentId) -> None:
    assert list(damage(store.layout, environment_id)) == []
    assert sound_prefix(store, environment_id) == store.built(environment_id)


def replaced(path: Path, content: bytes) -> None:
    """As editors, ``sed -i`` and ``pip`` do: a new file under the old name."""
    other = path.with_name("other")
    other.write_bytes(content)
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda p: (p / "lib/empty").unlink(), "lib/empty"),
        (lambda p: (p / "lib/empty").write_bytes(b"edited"), "lib/empty"),
        (lambda p: replaced(p / "lib/data/large.bin", bytes(range(256)) * 10), "lib/data/large.bin"),
        (lambda p: (p / "lib/nothing-inside").rmdir(), "lib/nothing-inside"),
        (lambda p: (p / "bin/alias").unlink(), "bin/alias"),
        (lambda p: ((p / "bin/alias").unlink(), os.symlink("/etc/passwd", p / "bin/alias")), "bin/alias"),
        (lambda p: (p / "lib/data").rename(p / "lib/moved"), "lib/data/large.bin"),
        (lambda p: ((p / "bin").rename(p / "b"), os.symlink("b", p / "bin")), "bin"),
    ],
)
def test_what_is_missing_or_altered_is_found(
    store: Store, environment_id: EnvironmentId, change: Callable[[Path], object], found: str
) -> None:
    change(store.layout.prefix(environment_id))
    assert found in list(damage(store.layout, environment_id))
    assert sound_prefix(store, environment_id) is None


def test_what_an_interpreter_or_a_program_adds_is_no_damage(store: Store, environment_id: EnvironmentId) -> None:
    prefix = store.layout.prefix(environment_id)
    (prefix / "lib/__pycache__").mkdir()
    (prefix / "lib/__pycache__/x.pyc").touch()
    (prefix / "lib/cache.dat").touch()
    assert list(damage(store.layout, environment_id)) == []


def test_an_edit_in_place_is_found_in_the_end_where_not_every_file_is_looked_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is missing or replaced at once, because its folder tells."""
    monkeypatch.setattr(soundness, "SAMPLE", 2)
    environment_id = tiny_environment(store, {f"{i:02}": b"x" for i in range(20)})
    prefix = materialise(store, environment_id)
    (prefix / "07").write_bytes(b"y")
    looks = [list(damage(store.layout, environment_id, looks=0)) for _ in range(400)]
    assert ["07"] in looks and [] in looks
    (prefix / "13").unlink()
    assert "13" in list(damage(store.layout, environment_id, looks=0))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"envship-inventory 1 0 0 0\n",
        b"envship-inventory 2 1 0 0\n\0",
        b"envship-inventory 2 2 0 0 0\n\0",
        b"envship-inventory 2 1 1 0 0\n\0a",
        b"envship-inventory 2 1 0 2 0\n\0a\0",
        b"envship-inventory 2 1 0 -1 1\n\0",
    ],
)
def test_a_damaged_inventory_is_damage(store: Store, environment_id: EnvironmentId, content: bytes) -> None:
    store.layout.inventory(environment_id).write_bytes(content)
    assert list(damage(store.layout, environment_id)) == [str(store.layout.inventory(environment_id))]
    materialise(store, environment_id)
    assert sound_prefix(store, environment_id) is not None


def test_an_inventory_comes_back_from_its_bytes() -> None:
    for inventory in (
        Inventory(b"\0", b"", b"", b""),
        Inventory(b"\0a\0", b"a/caf\xe9\0new\nline\0", b"l\0a/x\0m\0.\0", b"a.pyc\x0012\0"),
    ):
        assert Inventory.from_bytes(inventory.to_bytes()) == inventory


def test_a_damaged_one_of_a_read_only_store_is_built_here_instead(tmp_path: Path) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    (materialise(staged, environment_id) / "lib/empty").unlink()
    own = Store(tmp_path / "own", [tmp_path / "staged"])
    prefix = materialise(own, environment_id)
    assert prefix == own.layout.prefix(environment_id)
    assert (prefix / "lib/empty").exists()
    assert not (staged.layout.prefix(environment_id) / "lib/empty").exists()


def test_one_on_a_network_file_system_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    prefix = materialise(staged, environment_id)
    (prefix / "lib/empty").unlink()
    own = Store(tmp_path / "own", [tmp_path / "staged"])
    monkeypatch.setattr(soundness, "file_system_of", lambda path: "nfs4")
    assert sound_prefix(own, environment_id) == prefix
