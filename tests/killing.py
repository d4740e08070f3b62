"""Kill -9 at a chosen point: a program of its own, run by `tests.test_kill`.

Prepares a store, forks, and lets the child do one thing (load, save, build, mend, stage, evict) until its n-th step at
the file system, where it is killed. Steps are what Python audits (opening, renaming, linking, removing, locking, ...),
writes (half of one is done), and syncs; those of processes that the child forks count too, and all of them are killed
at once. A process that has one thread forks in milliseconds, so hundreds of points are tried in seconds. Prints one
JSON object: how often it killed, and every state that was neither old nor new.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from envship.bundle import read_bundle, write_bundle
from envship.options import PackOptions
from envship.pack import pack
from envship.packer import Packer
from envship.scan_index import ScanIndex
from envship.sources.tree import Trees
from tests.environments import EVERY_KIND, environment_of, package_of
from worker_bootstrap.errors import BundleInvalid
from worker_bootstrap.evict import collect
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks, damaged_files

STEPS = frozenset(
    (
        *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime"),
        *("os.truncate", "os.scandir", "fcntl.flock", "fcntl.ioctl"),
    )
)


class Scene:
    """A folder with all that the works need; made anew before each."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.store_root = self.root / "store"
        self.bundle = self.root / "it.envship"
        self._template = folder / "template"
        packed = Store(folder / "packed")
        common = package_of(packed, {f"lib/common-{i}": b"%d" % i * 99 for i in range(5)}, "common")
        self.old = environment_of(packed, [common, package_of(packed, {"old": b"old" * 50}, "old")])
        self.new = environment_of(packed, [common, package_of(packed, EVERY_KIND)])
        self.packed = packed
        self.new_bundle = folder / "new.envship"
        write_bundle(self.new, packed, self.new_bundle)
        self.old_bytes = write_and_read(self.old, packed, folder / "old.envship")
        self.new_bytes = self.new_bundle.read_bytes()
        self._templates: dict[str, Path] = {}

    def reset(self, work: str) -> None:
        """Everything as it is before *work*."""
        template = self._templates.get(work)
        shutil.rmtree(self.root, ignore_errors=True)
        if template is None:
            self.root.mkdir()
            self.bundle.write_bytes(self.old_bytes)
            store = Store(self.store_root)
            read_bundle(self.bundle, store)
            materialise(store, self.old.id)
            if work != "load":
                read_bundle(self.new_bundle, store)
            if work in ("evict", "mend"):
                materialise(store, self.new.id)
                (store.layout.prefix(self.new.id) / "lib/data/large.bin").unlink()
                if work == "evict":
                    materialise(store, self.new.id)
            template = self._templates[work] = self.root.with_name("template-" + work)
            self.root.rename(template)
        shutil.copytree(template, self.root, symlinks=True, copy_function=Copier())


class Copier:
    """Copies files with their times; the names of one file are the names of one copy."""

    def __init__(self) -> None:
        self._copies: dict[int, str] = {}

    def __call__(self, source: str, target: str) -> str:
        inode = os.lstat(source).st_ino
        if inode in self._copies:
            os.link(self._copies[inode], target)
        else:
            self._copies[inode] = str(shutil.copy2(source, target, follow_symlinks=False))
        return target


def write_and_read(manifest: Manifest, store: Store, path: Path) -> bytes:
    write_bundle(manifest, store, path)
    return path.read_bytes()


def works(scene: Scene) -> dict[str, Callable[[], object]]:
    def store() -> Store:
        return Store(scene.store_root)

    return {
        "load": lambda: read_bundle(scene.new_bundle, store()),
        "save": lambda: write_bundle(scene.new, store(), scene.bundle),
        "build": lambda: materialise(store(), scene.new.id),
        "mend": lambda: materialise(store(), scene.new.id),
        "stage": lambda: materialise(store(), scene.new.id, durable=True),
        "evict": lambda: collect(store(), 0, grace_s=0),
    }


def killed_at(step: int, chance: random.Random, work: Callable[[], object]) -> int:
    """Do *work* in a child that is killed at its *step*-th step; 0 stands for never. Returns the child's steps."""
    reading, writing = os.pipe()
    half = chance.random() < 0.5
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(reading)
        code = 3
        try:
            counter = Counter(step, half)
            counter.install()
            work()
            os.write(writing, str(counter.count).encode()) if not step else None
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    told = os.read(reading, 20)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the work failed by itself, at step {step}")
    return int(told or 0)


class Counter:
    """Counts the steps of this process and its forks, and kills all of them at one of the steps."""

    _NUMBER = struct.Struct("Q")

    def __init__(self, last: int, half: bool) -> None:
        self._shared = mmap.mmap(-1, self._NUMBER.size)
        self._last = last
        self._half = half
        self._write = os.write

    def install(self) -> None:
        """From now on. Never undone: the process is to end."""
        sys.addaudithook(self._audit)
        os.write = self._do_write  # type: ignore[assignment]
        fsync = os.fsync

        def counted_fsync(handle: Any) -> None:
            self.step()
            fsync(handle)

        os.fsync = counted_fsync

    @property
    def count(self) -> int:
        number: int = self._NUMBER.unpack(self._shared)[0]
        return number

    def step(self) -> None:
        self._NUMBER.pack_into(self._shared, 0, self.count + 1)  # two at once may count as one
        if 0 < self._last <= self.count:
            os.killpg(0, signal.SIGKILL)

    def _audit(self, event: str, _: Any) -> None:
        if event in STEPS:
            self.step()

    def _do_write(self, handle: int, data: Any) -> int:
        if 0 < self._last <= self.count + 1 and self._half:
            self._write(handle, memoryview(data)[: len(data) // 2])
        self.step()
        return self._write(handle, data)


def problems(scene: Scene, work: str) -> list[str]:
    """What is neither as before nor as after; then the work is done again, to its end."""
    found = [*_mixtures(scene)]
    works(scene)[work]()
    found += [f"done again: {line}" for line in _mixtures(scene)]
    store = Store(scene.store_root)
    if work == "evict" and store.environments():
        found.append("done again: environments are left")
    if work in ("build", "mend", "stage") and sound_prefix(store, scene.new.id) is None:
        found.append("done again: it is not built")
    if work == "save" and scene.bundle.read_bytes() != scene.new_bytes:
        found.append("done again: the bundle is not the new one")
    if work == "load" and scene.new.id not in store.environments():
        found.append("done again: it is not in the store")
    return found


def _mixtures(scene: Scene) -> list[str]:
    """Verify everything: whatever is there must be whole."""
    found = []
    try:
        if scene.bundle.read_bytes() not in (scene.old_bytes, scene.new_bytes):
            found.append("the bundle is neither the old nor the new one")
        store = Store(scene.store_root)
        for environment_id in store.environments():
            found += damaged_chunks(store, store.read_manifest(environment_id))
        for manifest in (scene.old, scene.new):
            if store.built(manifest.id) is None:
                continue
            if manifest.id not in store.environments():
                found.append(f"{manifest.id} is built and has no manifest")
            elif sound_prefix(store, manifest.id) is not None:
                found += map(str, damaged_files(store, manifest.id))
    except (OSError, BundleInvalid) as error:
        found.append(repr(error))
    return found


def try_points(folder: Path, work: str, seed: int, runs: int) -> dict[str, Any]:
    """Kill *work* at *runs* random points, one after the other."""
    chance = random.Random(f"{seed} {work}")
    scene = Scene(folder)
    todo = works(scene)[work]
    scene.reset(work)
    steps = killed_at(0, chance, todo)
    kills = 0
    found = []
    for number in range(runs):
        scene.reset(work)
        step = chance.randint(1, steps)
        kills += killed_at(step, chance, todo) == -1
        found += [f"run {number}, killed at step {step} of {steps}: {line}" for line in problems(scene, work)]
    return {"work": work, "steps": steps, "kills": kills, "problems": found}


def try_packing(folder: Path, prefix: Path, seed: int, runs: int) -> dict[str, Any]:
    """Kill the packing of *prefix* at *runs* random points of the store that the one before left."""
    chance = random.Random(f"{seed} pack")
    store_root = folder / "store"
    whole = pack(prefix, store=Store(folder / "reference"))

    def work() -> None:
        store, options = Store(store_root), PackOptions()
        Packer(store, options, None, processes=2).pack(prefix, Trees(), ScanIndex.load(store, str(prefix), options))

    steps = killed_at(0, chance, work)
    kills = 0
    found = []
    for number in range(runs):
        # From scratch now and then; else a pack goes on from what an earlier one has left.
        if number % 3 == 0:
            shutil.rmtree(store_root)
        kills += killed_at(chance.randint(1, steps), chance, work) == -1
        store = Store(store_root)
        for environment_id in store.environments():
            if environment_id != whole.id:
                found.append(f"run {number}: another environment, {environment_id}")
            found += [f"run {number}: {line}" for line in damaged_chunks(store, store.read_manifest(environment_id))]
    done = pack(prefix, store=Store(store_root))
    if done.id != whole.id:
        found.append(f"done again: {done.id} instead of {whole.id}")
    found += damaged_chunks(done.store, done.manifest)
    return {"work": "pack", "steps": steps, "kills": kills, "problems": found}


if __name__ == "__main__":
    where, kind, given_seed, given_runs, *rest = sys.argv[1:]
    if kind == "pack":
        outcome = try_packing(Path(where), Path(rest[0]), int(given_seed), int(given_runs))
    else:
        outcome = try_points(Path(where), kind, int(given_seed), int(given_runs))
    print(json.dumps(outcome))  # noqa: T201
