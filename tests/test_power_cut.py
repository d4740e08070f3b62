"""What a power cut leaves: recorded system calls, replayed up to a cut on a disk that forgets what was not synced.

Whatever is there afterwards is whole, what had been acknowledged is there, and without the fsyncs the same look finds
that it is not so.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from envship.bundle import read_bundle, write_bundle
from envship.options import NO_OPTIONS
from envship.pack import pack
from envship.packer import Packer
from envship.scan_index import ScanIndex
from envship.sources.tree import Trees
from worker_bootstrap import ready_mark
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import BundleInvalid
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks, damaged_files

from .environments import EVERY_KIND, environment_of, package_of
from .filesystems import in_memory
from .replay import KEEPS, NOTHING, REPLAY_MARKS, SYNCS, Call, Disk, Opened, record, without

pytestmark = REPLAY_MARKS

CODE = str(Path(ready_mark.__file__).parents[1])
HEAD = f"""
import sys
sys.path.insert(0, {CODE!r})
from pathlib import Path
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.store import Store
root = Path(sys.argv[1])
"""
IN_TWO_PROCESSES = """
from worker_bootstrap import crew, writer
writer.ALONE_FILES = writer.JOB_BYTES = 0
crew.PROCESSES = 2
"""
PROGRAMS = {
    "save": "from envship.bundle import write_bundle\n"
    "store = Store(Path(sys.argv[2]))\n"
    "write_bundle(store.read_manifest(EnvironmentId(sys.argv[3])), store, root / 'it.envship')\n",
    "fetch": "import asyncio\n"
    "from tests.fetching import bring\n"
    "packed = Store(Path(sys.argv[2]))\n"
    "asyncio.run(bring(packed.read_manifest(EnvironmentId(sys.argv[3])), Store(root / 'store'), packed))\n",
    "pack": "from envship.options import NO_OPTIONS\n"
    "from envship.packer import Packer\n"
    "from envship.scan_index import ScanIndex\n"
    "from envship.sources.tree import Trees\n"
    "store = Store(root / 'store')\n"
    "index = ScanIndex.load(store, sys.argv[5], NO_OPTIONS)\n"
    "Packer(store, NO_OPTIONS, None, processes=2).pack(Path(sys.argv[5]), Trees(), index)\n",
    "load": "from envship.bundle import read_bundle\nread_bundle(Path(sys.argv[4]), Store(root / 'store'))\n",
    "build": "from worker_bootstrap.materialise import materialise\nmaterialise(Store(root / 'store'), sys.argv[3])\n",
    "stage": "from worker_bootstrap.materialise import materialise\n"
    "materialise(Store(root / 'store'), sys.argv[3], durable=True)\n",
    "evict": "from worker_bootstrap.evict import collect\ncollect(Store(root / 'store'), 0, grace_s=0)\n",
    "mend": "from worker_bootstrap.materialise import materialise\n"
    "store = Store(root / 'store')\n"
    "(store.layout.prefix(sys.argv[3]) / 'lib/data/large.bin').unlink()\n"
    "materialise(store, sys.argv[3])\n",
}
PROGRAMS |= {f"{name} in two processes": IN_TWO_PROCESSES + PROGRAMS[name] for name in ("build", "stage")}
SMALL_PROGRAMS = sorted(PROGRAMS.keys() - {"pack"})
"""Those whose recorded calls are not 140 MB."""


class Run(NamedTuple):
    """A recorded run of a program, by its first word: how the disk was before, and what was called."""

    name: str
    root: Path
    start: Path
    calls: list[Call]
    environment_id: EnvironmentId
    old: Manifest
    new: Manifest
    prefix: Path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, venv: Path) -> Iterator[Callable[[str], Run]]:
    """Gives the recorded run of a program; each is recorded once. A pack is one of *venv*."""
    with in_memory(tmp_path_factory.mktemp("recorded")) as folder:
        yield functools.cache(lambda name: _record(name, folder / name, venv))


def _record(name: str, folder: Path, venv: Path) -> Run:
    folder.mkdir()
    packed = Store(folder / "packed")
    old = environment_of(packed, [package_of(packed, {"old": b"old" * 50}, "old")])
    if name == "pack":
        new = pack(venv, store=packed).manifest
    else:
        new = environment_of(packed, [package_of(packed, EVERY_KIND)])
    bundle = folder / "new.envship"
    write_bundle(new, packed, bundle)
    program, name = PROGRAMS[name], name.partition(" ")[0]
    root, start = folder / "root", folder / "start"
    root.mkdir()
    write_bundle(old, packed, root / "it.envship")
    if name in ("build", "stage", "evict", "mend"):
        store = Store(root / "store")
        read_bundle(bundle, store)
        if name in ("evict", "mend"):
            materialise(store, new.id, durable=True)
    subprocess.run(["cp", "-a", root, start], check=True)
    arguments = str(root), str(packed.layout.root), new.id, str(bundle), str(venv)
    calls = record(HEAD + program, *arguments, trace=folder / "trace")
    return Run(name, root, start, calls, new.id, old, new, venv)


@pytest.fixture(autouse=True)
def another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has been started anew since."""
    monkeypatch.setattr(ready_mark, "boot_id", lambda: "the boot after the power cut")
    monkeypatch.setattr(ready_mark, "booted_at", time.time)


def problems(run: Run, root: Path, *, acknowledged: bool) -> list[str]:
    """What is neither as before nor as after, looking at everything."""
    # A prefix holds its own path; it must lie where it lay.
    shutil.rmtree(run.root)
    root.rename(run.root)
    found = [*_bundle_problems(run, acknowledged)]
    if (run.root / "store").is_dir():
        try:
            store = Store(run.root / "store")
            found += _store_problems(run, store, acknowledged)
        except Exception as error:
            found.append(f"the store cannot be opened any more: {error!r}")
    elif acknowledged and run.name != "save":
        found.append("the store is not there")
    return found


def _bundle_problems(run: Run, acknowledged: bool) -> list[str]:
    scratch = Store(run.root.parent / "scratch")
    try:
        manifest = read_bundle(run.root / "it.envship", scratch)
    except (BundleInvalid, OSError) as error:
        return [f"the bundle: {error}"]
    finally:
        shutil.rmtree(scratch.layout.root)
    allowed = [run.new.id] if acknowledged and run.name == "save" else [run.old.id, run.new.id]
    return [] if manifest.id in allowed else ["the bundle is the old one, though the new one was acknowledged"]


def _store_problems(run: Run, store: Store, acknowledged: bool) -> list[str]:
    found = []
    is_there = run.environment_id in store.environments()
    if acknowledged and run.name in ("load", "fetch", "pack", "build", "stage") and not is_there:
        found.append("the manifest was acknowledged and is gone")
    if acknowledged and run.name == "stage" and store.built(run.environment_id) is None:
        found.append("the staged environment was acknowledged and is gone")
    # What is mended was damaged before: then it is enough that the quick look says so.
    if (sound_prefix if run.name == "mend" else Store.built)(store, run.environment_id) is not None:
        try:
            found += [f"counts as built: {each}" for each in damaged_files(store, run.environment_id)]
        except Exception as error:
            found.append(f"counts as built, but: {error}")
    if run.name == "load":
        read_bundle(run.root.parent / "new.envship", store)
        found += [f"loaded again, but: {each}" for each in damaged_chunks(store, run.new)]
    if run.name == "pack":
        index = ScanIndex.load(store, str(run.prefix), NO_OPTIONS)
        if Packer(store, NO_OPTIONS, None).pack(run.prefix, Trees(), index) != run.environment_id:
            found.append("packed again, it is another environment")
        found += [f"packed again, but: {each}" for each in damaged_chunks(store, run.new)]
    if is_there:
        # What was lost is fetched again, and then all is well.
        packed = Store(run.root.parent / "packed")
        list(damaged_chunks(store, run.new))  # drops them, as an agent does
        for digest in run.new.chunks:
            store.write_chunk(packed.read_chunk(digest))
        materialise(store, run.environment_id)
        found += [f"does not heal: {each}" for each in damaged_files(store, run.environment_id)]
    return found


def violations(run: Run, calls: list[Call], count: int, seed: int) -> Iterator[tuple[int, list[str]]]:
    """Cut the run at *count* places; of each state that is neither old nor new, the cut and what is wrong."""
    chance = random.Random(f"{seed} {run.name}")
    for number in range(count):
        # Every fourth cut is after the end: then everything had been acknowledged.
        cut = len(calls) if number % 4 == 0 else chance.randrange(len(calls) + 1)
        disk = Disk(run.root, run.start)
        disk.replay(calls[:cut])
        target = run.root.with_name("after")
        disk.crash(target, chance, chance.choice(KEEPS))
        what = problems(run, target, acknowledged=cut == len(calls))
        if what:
            yield cut, what


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 16) for name in SMALL_PROGRAMS),
        *(pytest.param(name, 150, marks=pytest.mark.heavy) for name in SMALL_PROGRAMS),
        pytest.param("pack", 24, marks=[pytest.mark.heavy, pytest.mark.timeout(900)]),
    ],
)
def test_a_power_cut_leaves_the_old_or_the_new(recorded: Callable[[str], Run], name: str, count: int) -> None:
    run = recorded(name)
    assert len(run.calls) > 20
    assert list(violations(run, run.calls, count, seed=1)) == []


@pytest.mark.parametrize("name", ["build", "fetch", "mend", "save", "stage in two processes"])
def test_the_disk_of_these_tests_is_as_the_real_one(recorded: Callable[[str], Run], name: str) -> None:
    """With everything synced after the last call, all is there: the replay has overlooked no call."""
    run = recorded(name)
    disk = Disk(run.root, run.start)
    disk.replay([*run.calls, Call("syncfs", (), None)])
    after = run.root.with_name("after")
    disk.crash(after, random.Random(0), NOTHING)
    assert problems(run, after, acknowledged=True) == []


def is_sync(call: Call) -> bool:
    return call.name in SYNCS


def is_sync_of_a_folder(call: Call) -> bool:
    first = call.arguments[0] if call.arguments else None
    return (
        call.name == "fsync"
        and isinstance(first, Opened)
        and os.path.splitext(first.path)[1] == ""
        and (first.path.endswith(("/manifests", "/ready", "/root")))
    )


def is_syncfs(call: Call) -> bool:
    return call.name == "syncfs"


@pytest.mark.parametrize(
    ("name", "unwanted"),
    [
        ("save", is_sync),
        ("save", is_sync_of_a_folder),
        ("load", is_sync),
        ("load", is_sync_of_a_folder),
        ("fetch", is_sync),
        ("fetch", is_sync_of_a_folder),
        pytest.param("pack", is_sync, marks=[pytest.mark.heavy, pytest.mark.timeout(900)]),
        pytest.param("pack", is_sync_of_a_folder, marks=[pytest.mark.heavy, pytest.mark.timeout(900)]),
        ("mend", is_sync),
        ("stage in two processes", is_syncfs),
        ("stage", is_syncfs),
        ("stage", is_sync),
        ("stage", is_sync_of_a_folder),
        ("evict", is_sync_of_a_folder),
    ],
)
def test_without_the_fsyncs_it_is_found_out(
    recorded: Callable[[str], Run], name: str, unwanted: Callable[[Call], bool]
) -> None:
    run = recorded(name)
    calls = without(run.calls, unwanted)
    assert len(calls) < len(run.calls)
    # Mostly among the first; which of a mend are decisive is a matter of the trace, so there are many to look at.
    assert next(violations(run, calls, 1000, seed=2), None) is not None
