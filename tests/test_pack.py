"""Packing as such: unchanged means nearly nothing to do, an interruption leaves nothing wrong, progress is told."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import dask
import pytest

from envship.environment import Environment
from envship.errors import SourceNotFound
from envship.options import NO_OPTIONS
from envship.pack import pack
from envship.scan_index import ScanIndex, index_folder
from envship.sources.tree import Trees
from worker_bootstrap.store import Store

from .contents import contents, package
from .environments import tiny_environment
from .prefixes import onlyhere_wheel, settle, small_venv

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A venv to change, old enough for its time stamps to be believed."""
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    settle(prefix)
    return prefix


def test_an_unchanged_environment_is_recognised_without_reading_it(
    mine: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(mine, store=store)

    def packed(*arguments: object, **options: object) -> None:
        raise AssertionError("packed again")

    for name in ("pack_in_processes", "Packer"):
        monkeypatch.setattr(sys.modules["envship.pack"], name, packed)
    assert pack(mine, store=store).id == first.id


def test_what_git_does_is_no_change(mine: Path, store: Store) -> None:
    """In the repository in whose folder the environment was made."""
    (mine / ".git").mkdir()
    first = pack(mine, store=store)
    (mine / ".git" / "index").write_text("new")
    index = ScanIndex.load(store, str(mine), NO_OPTIONS)
    assert index.unchanged(Trees()) == first.id


PACK_WATCHED = """
import json, os, sys
from envship.pack import pack
opened = []
def hook(event, arguments):
    if event in ("open", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec"):
        path = arguments[0] if arguments else ""
        opened.append([event, "" if isinstance(path, int) else os.fsdecode(path)])
sys.addaudithook(hook)
environment = pack(sys.argv[1], store=sys.argv[2])
print(json.dumps([environment.id, opened]))
"""


@pytest.mark.parametrize("kind", ["venv", "conda"])
def test_of_an_unchanged_environment_no_file_is_opened(
    kind: str, mine: Path, conda_pair: tuple[Path, Path], tmp_path: Path, shared_store: Store
) -> None:
    """Below the prefix, that is, and but for conda-meta; nor is another process started, which could."""
    prefix = {"venv": mine, "conda": conda_pair[0]}[kind]
    settle(prefix)
    first = pack(prefix, store=shared_store)

    def seen() -> tuple[str, list[tuple[str, str]]]:
        command = [sys.executable, "-c", PACK_WATCHED, str(prefix), str(shared_store.layout.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        environment_id, opened = json.loads(done.stdout)
        found = [(event, path) for event, path in opened if event != "open" or path.startswith(f"{prefix}/")]
        return environment_id, [row for row in found if not row[1].startswith(f"{prefix}/conda-meta/")]

    assert seen() == (first.id, [])
    if kind == "venv":
        (prefix / SITE / "onlyhere.py").write_text("N = 1\n")
        assert ("open", f"{prefix}/{SITE}/onlyhere.py") in seen()[1], "what is opened is seen"


@pytest.mark.heavy
def test_a_store_may_be_named_by_its_folder(mine: Path, tmp_path: Path) -> None:
    packed = pack(mine, store=str(tmp_path / "named"))
    assert packed.store.layout.root == tmp_path / "named"
    assert Environment.open(packed.id, tmp_path / "named").chunks == packed.chunks


@pytest.mark.parametrize("same_size_and_time", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_an_edited_file_is_noticed(mine: Path, store: Store, same_size_and_time: bool) -> None:
    first = pack(mine, store=store)
    path = mine / SITE / "onlyhere.py"
    before = path.stat()
    path.write_text(path.read_text().replace("41", "40" if same_size_and_time else "4100"))
    if same_size_and_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = pack(mine, store=store)
    assert second.id != first.id
    (mine_again,) = (p for p in second.packages if p.name == "onlyhere")
    assert mine_again != package(first, "onlyhere")
    assert package(second, "python") == package(first, "python")


def test_an_edit_just_after_the_pack_is_noticed(mine: Path, store: Store) -> None:
    """An edit in the same tick of the clock as the file's last change leaves no other trace than its content."""
    path = mine / SITE / "onlyhere.py"
    ids = set()
    for number in range(5):
        path.write_text(f"N = {number}\n")
        environment = pack(mine, store=store)
        assert (
            contents(environment, package(environment, "onlyhere"))[f"{SITE}/onlyhere.py"] == f"N = {number}\n".encode()
        )
        ids.add(environment.id)
    assert len(ids) == 5


def test_added_and_removed_files_are_noticed(mine: Path, store: Store) -> None:
    ids = [pack(mine, store=store).id]
    (mine / "extra").write_text("x")
    ids.append(pack(mine, store=store).id)
    (mine / "extra").unlink()
    ids.append(pack(mine, store=store).id)
    assert ids[0] == ids[2] != ids[1]


def test_a_chunk_that_the_store_lost_is_written_again(mine: Path, store: Store) -> None:
    environment = pack(mine, store=store)
    for path in itertools.islice(store.layout.chunks.rglob("*.zst"), 5):
        path.unlink()
    assert store.missing(environment.chunks)
    assert pack(mine, store=store).id == environment.id
    assert not store.missing(environment.chunks)


def test_a_damaged_index_is_passed_over(mine: Path, store: Store) -> None:
    environment = pack(mine, store=store)
    paths = sorted(index_folder(store).glob("*.json"))
    assert len(paths) == 2
    whole = paths[0].read_bytes(), paths[1].read_bytes()
    for damage in (b"", b"{}", b"[1", whole[0][:-40], b'{"rules": 1}'):
        for path in paths:
            path.write_bytes(damage)
        index = ScanIndex.load(store, str(mine), NO_OPTIONS)
        assert index.environment_id is None and not index.known.packages
    assert pack(mine, store=store).id == environment.id


def test_an_eviction_that_fails_afterwards_is_logged_and_the_pack_is_done(
    mine: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    old = tiny_environment(store)
    inventory = store.layout.inventory(old)
    (inventory / "no file").mkdir(parents=True)
    os.utime(store.layout.manifest(old), (0, 0))
    with dask.config.set({"envship.store-limit": "1 B"}):
        environment = pack(mine, store=store)
    assert store.missing(environment.manifest.chunks) == []
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(store.layout.root) in line
    assert str(inventory) in line


@pytest.mark.heavy
def test_progress_ends_where_it_said(mine: Path, store: Store) -> None:
    told: list[tuple[str, int, int]] = []
    pack(mine, store=store, report=lambda *row: told.append(row))
    assert told[0] == ("scan", 0, 0)
    stage, done, total = told[-1]
    assert stage == "pack"
    assert done == total > 0


def test_a_name_that_is_nothing_says_where_it_was_looked_for(store: Store) -> None:
    with pytest.raises(SourceNotFound) as caught:
        pack("no-such-environment", store=store)
    assert caught.value.looked_in
    with pytest.raises(SourceNotFound):
        pack("/no/such/prefix", store=store)
