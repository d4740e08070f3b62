"""A pack that knows most packages ends as one that knows none, whatever packages have in common."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from envship.options import NO_OPTIONS, PackOptions
from envship.pack import pack
from envship.scan_index import index_folder
from worker_bootstrap import ready_mark
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks

from .contents import all_entries, contents, package
from .prefixes import copy_of, install, onlyhere_wheel, rename_module, settle

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
SHARED = f"{SITE}/libmini/__init__.py"
"""A file of the package libmini that another one records as well."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One for all, so that the interpreter is read once."""
    return Store(tmp_path_factory.mktemp("again") / "store")


@pytest.fixture
def prefix(conda_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A conda environment to change."""
    return copy_of(conda_pair[0], tmp_path / "env")


def packed_twice(prefix: Path, store: Store, options: PackOptions = NO_OPTIONS) -> None:
    """Pack, add a file of nobody, pack again: that ends as it does without the index."""
    packed_once(prefix, store, options)
    (prefix / "share" / "note.txt").write_text("mine")
    again = pack(prefix, store=store, options=options)
    assert again.id == without_index(prefix, store, options)
    assert "share/note.txt" in all_entries(again)


def packed_once(prefix: Path, store: Store, options: PackOptions = NO_OPTIONS) -> None:
    """Pack when everything is old enough for its time stamps to be believed."""
    settle(prefix)
    pack(prefix, store=store, options=options)


def without_index(prefix: Path, store: Store, options: PackOptions = NO_OPTIONS) -> str:
    for path in index_folder(store).glob("*.json"):
        path.unlink()
    return pack(prefix, store=store, options=options).id


def install_over(prefix: Path, folder: Path, path: str) -> None:
    """A package of pip's that installs the file at *path* as it is already."""
    module = f"{SITE}/{path}"
    wheel = onlyhere_wheel(folder, source=(prefix / module).read_text())
    rename_module(wheel, "onlyhere.py", path)
    install(prefix, str(wheel))


def add_record(prefix: Path, name: str, *paths: str) -> None:
    """A conda package that recorded *paths*, whoever else did."""
    record = {"name": name, "version": "1.0", "build": "0", "paths_data": {"paths": [{"_path": p} for p in paths]}}
    (prefix / "conda-meta" / f"{name}-1.0-0.json").write_text(json.dumps(record))


def test_a_file_that_pip_installed_as_conda_had_it_is_there_the_second_time(
    prefix: Path, store: Store, tmp_path: Path
) -> None:
    install_over(prefix, tmp_path, "libmini/__init__.py")
    packed_twice(prefix, store)


@pytest.mark.parametrize("name", ["earlier", pytest.param("zz-later", marks=pytest.mark.heavy)])
def test_a_file_that_two_conda_packages_recorded_is_there_the_second_time(
    prefix: Path, store: Store, name: str
) -> None:
    add_record(prefix, name, SHARED, "share/libmini/libmini.conf")
    packed_twice(prefix, store)


@pytest.mark.parametrize("name", [pytest.param("earlier", marks=pytest.mark.heavy), "zz-later"])
def test_a_package_that_comes_later_and_recorded_a_file_of_another(prefix: Path, store: Store, name: str) -> None:
    """The first in order owns it, also where the other one was packed before."""
    packed_once(prefix, store)
    add_record(prefix, name, SHARED)
    again = pack(prefix, store=store)
    assert (SHARED in contents(again, package(again, "libmini"))) == (name != "earlier")
    assert again.id == without_index(prefix, store)


def test_chunks_of_packages_that_are_not_even_planned_are_read_after_a_power_cut(
    prefix: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_once(prefix, store)
    first = pack(prefix, store=store)
    chunk = package(first, "libmini").chunks[0]
    path = next(store.layout.chunks.glob(f"*/{chunk.digest}.*"))
    path.write_bytes(b"\0" * path.stat().st_size)
    monkeypatch.setattr(ready_mark, "booted_at", time.time)
    (prefix / "share" / "note.txt").write_text("mine")
    again = pack(prefix, store=store)
    assert again.id != first.id
    assert list(damaged_chunks(store, again.manifest)) == []


def test_records_that_are_left_out_are_no_reason_to_miss_their_files(prefix: Path, store: Store) -> None:
    packed_twice(prefix, store, PackOptions((("exclude", "conda-meta/*"), ("exclude", "*.dist-info/*"))))


def test_what_a_link_out_of_the_environment_points_to_is_read_again(prefix: Path, store: Store, tmp_path: Path) -> None:
    """In its place in a package of conda, none of whose own files have changed."""
    outside, inside = tmp_path / "outside.conf", prefix / "share" / "libmini" / "libmini.conf"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    options = PackOptions(copy_outside_links=True)
    packed_once(prefix, store, options)
    outside.write_text("changed\n")
    again = pack(prefix, store=store, options=options)
    assert contents(again, package(again, "libmini"))["share/libmini/libmini.conf"] == b"changed\n"


@pytest.mark.heavy
def test_a_path_file_of_a_conda_package_is_followed_the_second_time(prefix: Path, store: Store, tmp_path: Path) -> None:
    """It leads to a project outside since somebody edited it."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "outside.py").write_text("VALUE = 1\n")
    (prefix / SITE / "edited.pth").write_text(f"{tmp_path}/project\n")
    add_record(prefix, "edited", f"{SITE}/edited.pth")
    packed_twice(prefix, store)


def test_a_path_file_that_comes_later_leads_to_modules_of_a_conda_package(prefix: Path, store: Store) -> None:
    """They have byte code from then on, though none of the package's own files has changed."""
    module, code = "opt/plugins/plugin.py", f"opt/plugins/__pycache__/plugin.{sys.implementation.cache_tag}.pyc"
    (prefix / module).parent.mkdir(parents=True)
    (prefix / module).write_text("VALUE = 1\n")
    add_record(prefix, "plugins", module)
    packed_once(prefix, store)
    (prefix / SITE / "mine.pth").write_text("../../../opt/plugins\n")
    again = pack(prefix, store=store)
    assert code in contents(again, package(again, "plugins"))
    assert again.id == without_index(prefix, store)
