"""Packs that are killed, interrupted, run out of room, race one another, or whose source changes meanwhile."""

from __future__ import annotations

import marshal
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from envship.bytecode import Compiler
from envship.environment import Environment
from envship.errors import SourceProblems
from envship.options import NO_OPTIONS
from envship.pack import pack
from envship.packer import Packer
from envship.scan_index import ScanIndex, index_folder
from envship.sources.draft import CodeItem
from envship.sources.tree import Trees
from worker_bootstrap import ready_mark, scratch
from worker_bootstrap.errors import StoreFull
from worker_bootstrap.evict import collect
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks

from .contents import contents, package
from .prefixes import onlyhere_wheel, settle, small_venv

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
TIMEOUT_S = 100


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A venv to change."""
    return small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])


def started(prefix: Path, store: Store) -> subprocess.Popen[bytes]:
    """``envship pack`` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "envship.cli", "pack", str(prefix), "--store", str(store.layout.root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def chunks(store: Store) -> dict[Path, int]:
    """Chunks on disk, and which file each is."""
    return {path: path.stat().st_ino for path in store.layout.chunks.rglob("*.zst")}


def assert_sound(store: Store, expected: Environment) -> None:
    """Every manifest is whole, and packing ends in the *expected* environment."""
    for environment_id in store.environments():
        assert not store.missing(store.read_manifest(environment_id).chunks)
    for digest in expected.chunks:
        store.read_chunk(digest)


@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_a_pack_that_is_interrupted_leaves_a_sound_store_and_nobody_behind_and_the_next_one_resumes(
    mine: Path, store: Store, how: str
) -> None:
    process = started(mine, store)
    until(lambda: len(chunks(store)) > 5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    _, told = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (130 if how == "Ctrl-C" else -signal.SIGKILL)
    assert b"Traceback" not in told
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family))
    assert store.environments() == []
    kept = chunks(store)
    environment = pack(mine, store=store)
    assert_sound(store, environment)
    assert kept.items() <= chunks(store).items()


@pytest.mark.parametrize("how", [pytest.param("Ctrl-C", marks=pytest.mark.heavy), "killed"])
def test_a_pack_of_an_archive_that_is_interrupted_leaves_nothing_unpacked_or_a_sweep_takes_it(
    mine: Path, store: Store, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "env.tar"
    pack(mine, store=store).export(archive)
    process = started(archive, store)
    until(lambda: len(list(store.layout.tmp.glob("archive-*/**/*.py"))) > 5)
    os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    left = list(store.layout.tmp.glob("archive-*"))
    assert bool(left) == (how == "killed")
    monkeypatch.setattr(scratch, "STALE_S", -1.0)
    collect(store, None)
    assert list(store.layout.tmp.glob("archive-*")) == []


def test_a_pack_that_a_power_cut_interrupted_leaves_chunks_that_the_next_one_reads(
    mine: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only their names may have come to the disk: then they are written anew, before a manifest speaks of them."""
    Packer(store, NO_OPTIONS, None).pack(mine, Trees(), ScanIndex.none(store))
    (environment_id,) = store.environments()
    store.layout.manifest(environment_id).unlink()
    shutil.rmtree(index_folder(store))
    for path in sorted(chunks(store))[::2]:
        path.write_bytes(b"")
    monkeypatch.setattr(ready_mark, "booted_at", time.time)
    assert Packer(store, NO_OPTIONS, None).pack(mine, Trees(), ScanIndex.none(store)) == environment_id
    assert list(damaged_chunks(store, store.read_manifest(environment_id))) == []


@pytest.mark.parametrize("change", ["nothing", pytest.param("a file of nobody", marks=pytest.mark.heavy)])
def test_a_pack_that_knows_everything_reads_the_chunks_that_a_power_cut_may_have_taken(
    mine: Path, store: Store, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The index and the manifest came to the disk, and of the chunks a part: nobody has to ask twice."""
    settle(mine)
    first = pack(mine, store=store)
    for path in sorted(chunks(store))[::2]:
        os.truncate(path, path.stat().st_size - 1)
    monkeypatch.setattr(ready_mark, "booted_at", time.time)
    if change == "a file of nobody":
        (mine / "share").mkdir(exist_ok=True)
        (mine / "share" / "note.txt").write_text("mine")
    again = pack(mine, store=store)
    assert (again.id == first.id) == (change == "nothing")
    assert list(damaged_chunks(store, again.manifest)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a part of an environment."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_ends_the_pack_and_with_more_room_it_goes_on(mine: Path, small_disk: Path) -> None:
    store = Store(small_disk / "store")
    with pytest.raises(StoreFull) as caught:
        pack(mine, store=store)
    assert caught.value.path == str(store.layout.root)
    assert store.environments() == []
    kept = chunks(store)
    assert len(kept) > 5
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    environment = pack(mine, store=store)
    assert_sound(store, environment)
    assert kept.items() <= chunks(store).items()


def test_two_packs_at_once_give_one_environment(mine: Path, store: Store) -> None:
    processes = [started(mine, store) for _ in range(2)]
    for process in processes:
        _, told = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, told
    (environment_id,) = store.environments()
    environment = pack(mine, store=store)
    assert environment.id == environment_id
    assert_sound(store, environment)


class Meddler:
    """Changes files each time that a pack begins to read, after it has looked at all of them."""

    def __init__(self, times: int, change: Callable[[int], None]) -> None:
        self.count = 0
        self._times = times
        self._change = change

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "pack" and done_bytes == 0 and self.count < self._times:
            self.count += 1
            self._change(self.count)


def edit(prefix: Path, number: int) -> None:
    (prefix / SITE / "onlyhere.py").write_text(f"N = {number}\n")


def replace(prefix: Path, number: int) -> None:
    (prefix / "new").write_text(f"N = {number}\n")
    (prefix / "new").rename(prefix / SITE / "onlyhere.py")


def remove(prefix: Path, number: int) -> None:
    (prefix / SITE / "another.py").unlink()


def add(prefix: Path, number: int) -> None:
    (prefix / SITE / f"added{number}.py").write_text("")


@pytest.mark.parametrize(
    "change", [edit, *(pytest.param(how, marks=pytest.mark.heavy) for how in (replace, remove, add))]
)
def test_a_source_that_changes_is_packed_again_as_it_is_then(
    mine: Path, store: Store, change: Callable[[Path, int], None]
) -> None:
    (mine / SITE / "another.py").write_text("")
    meddler = Meddler(1, lambda number: change(mine, number))
    environment_id = Packer(store, NO_OPTIONS, meddler).pack(mine, Trees(), ScanIndex.none(store))
    assert meddler.count == 1
    assert environment_id == pack(mine, store=store).id
    environment = Environment.open(environment_id, store)
    mine_now: dict[str, bytes] = {}
    for each in environment.packages:
        mine_now.update(contents(environment, each))
    for path in (mine / SITE).glob("*.py"):
        assert mine_now[f"{SITE}/{path.name}"] == path.read_bytes()
    assert f"{SITE}/another.py" in mine_now or change is remove


@pytest.mark.parametrize("name", ["Before", pytest.param("after", marks=pytest.mark.heavy)])
def test_byte_code_is_that_of_the_source_that_was_read(
    mine: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Edited once its source has been read to be compiled: after the turn of the file itself, or before it."""
    module = mine / SITE / f"{name}.py"
    module.write_text("X = 1\n")
    make = Compiler.make

    def edited_first(self: Compiler, item: CodeItem, source: bytes) -> bytes | None:
        if Path(item.origin) == module and source == b"X = 1\n":
            module.write_text("X = 2\n")
        return make(self, item, source)

    monkeypatch.setattr(Compiler, "make", edited_first)
    environment_id = Packer(store, NO_OPTIONS, None).pack(mine, Trees(), ScanIndex.none(store))
    monkeypatch.undo()
    of_code, of_source = values_of_x(Environment.open(environment_id, store), name)
    assert of_code == of_source
    module.write_text("X = 1\n")
    assert values_of_x(pack(mine, store=store), name) == (1, 1), "nor is anything else kept for later"


def values_of_x(environment: Environment, name: str) -> tuple[int, int]:
    """What ``X`` is in a module: in its byte code, and in its source."""
    files = contents(environment, package(environment, "", "files"))
    code: dict[str, int] = {}
    exec(marshal.loads(files[f"{SITE}/__pycache__/{name}.{sys.implementation.cache_tag}.pyc"][16:]), code)
    source: dict[str, int] = {}
    exec(files[f"{SITE}/{name}.py"], source)
    return code["X"], source["X"]


def test_a_source_that_goes_on_changing_is_refused(mine: Path, store: Store) -> None:
    meddler = Meddler(100, lambda number: edit(mine, number))
    with pytest.raises(SourceProblems, match="changed while it was packed") as caught:
        Packer(store, NO_OPTIONS, meddler).pack(mine, Trees(), ScanIndex.none(store))
    assert meddler.count > 1
    assert all("onlyhere.py" in problem for problem in caught.value.problems)
    assert store.environments() == []


@pytest.mark.heavy
def test_one_edited_file_of_a_large_project_is_little_to_ship(tmp_path: Path, store: Store) -> None:
    """However large the project is that is installed in editable mode."""
    root = tmp_path / "project"
    (root / "mine").mkdir(parents=True)
    for number in range(300):
        (root / "mine" / f"module{number}.py").write_text(f"DATA = {os.urandom(20_000)!r}\n")
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    info = prefix / SITE / "onlyhere-1.0.dist-info"
    (info / "direct_url.json").write_text(f'{{"url": "file://{root}", "dir_info": {{"editable": true}}}}')
    (prefix / SITE / "mine.pth").write_text(f"{root}\n")
    with open(info / "RECORD", "a") as record:
        record.write("mine.pth,,\n")
    first = pack(prefix, store=store)
    assert package(first, "onlyhere").size_bytes > 15_000_000
    for number in (0, 150, 299):
        (root / "mine" / f"module{number}.py").write_text(f"DATA = {os.urandom(20_000)!r}\n")
        edited = pack(prefix, store=store)
        found = first.diff(edited)
        assert [change.name for change in found.packages] == ["onlyhere"]
        assert 20_000 < found.ship_bytes <= 1 << 20
        first = edited
