"""Kill -9 at chosen points of what writes to a store: a program of its own, run by `tests.test_kill`.

Prepares a store, forks, and lets the child do one thing (load, save, fetch, build, mend, stage, evict) until it is
killed (`tests.steps`), with all that it forked. Then everything is looked at, and the same is done again, to its end.
Prints one JSON object: where it killed, and every state that was neither old nor new. Packing has a program of its own
(`tests.killing_packs`).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from envship import bundle
from tests.environments import EVERY_KIND, environment_of, package_of
from tests.fetching import bring
from tests.halves import halves
from tests.steps import drawn, killed, tell_outcome, traced
from tests.wrong_ways import WRONG_WAYS
from worker_bootstrap import crew, writer
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.evict import collect
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks

BUILDING = ("fetch", "build", "stage")
"""Works in which every second run writes with two processes."""


class Scene:
    """A folder with all that the works need; made anew before each."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.store_root = self.root / "store"
        self.bundle = self.root / "it.envship"
        packed = Store(folder / "packed")
        common = package_of(packed, {f"lib/common-{i}": b"%d" % i * 99 for i in range(5)}, "common")
        self.old = environment_of(packed, [common, package_of(packed, {"old": b"old" * 50}, "old")])
        self.new = environment_of(packed, [common, package_of(packed, EVERY_KIND)])
        self.packed = packed
        self.new_bundle = folder / "new.envship"
        bundle.write_bundle(self.new, packed, self.new_bundle)
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
            bundle.read_bundle(self.bundle, store)
            materialise(store, self.old.id)
            if work not in ("load", "fetch"):
                bundle.read_bundle(self.new_bundle, store)
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
    bundle.write_bundle(manifest, store, path)
    return path.read_bytes()


def works(scene: Scene) -> dict[str, Callable[[], object]]:
    def store() -> Store:
        return Store(scene.store_root)

    def fetch() -> None:
        asyncio.run(bring(scene.new, store(), scene.packed))
        materialise(store(), scene.new.id)

    return {
        "load": lambda: bundle.read_bundle(scene.new_bundle, store()),
        "save": lambda: bundle.write_bundle(scene.new, store(), scene.bundle),
        "fetch": fetch,
        "build": lambda: materialise(store(), scene.new.id),
        "mend": lambda: materialise(store(), scene.new.id),
        "stage": lambda: materialise(store(), scene.new.id, durable=True),
        "evict": lambda: collect(store(), 0, grace_s=0),
    }


def write_with_two_processes() -> None:
    """However little there is to write, each file is a job of its own."""
    writer.ALONE_FILES = writer.JOB_BYTES = 0
    crew.PROCESSES = 2


def problems(scene: Scene, work: str) -> Iterator[str]:
    """What is neither as before nor as after; then the work is done again, to its end."""
    yield from _mixtures(scene, work)
    works(scene)[work]()
    store = Store(scene.store_root)
    for line in (*_mixtures(scene, ""), *_shortfalls(scene, work, store)):
        yield f"done again: {line}"


def _shortfalls(scene: Scene, work: str, store: Store) -> Iterator[str]:
    """What a work that came to its end has not done."""
    if work == "evict" and (store.environments() or any(store.layout.envs.iterdir())):
        yield "environments are left"
    if work == "evict" and any(store.layout.chunks.glob("*/*")):
        yield "chunks are left"
    if work in ("mend", *BUILDING) and store.built(scene.new.id) is None:
        yield "it is not built"
    if work == "save" and scene.bundle.read_bytes() != scene.new_bytes:
        yield "the bundle is not the new one"
    if work in ("load", "fetch") and scene.new.id not in store.environments():
        yield "it is not in the store"


def _mixtures(scene: Scene, work: str) -> Iterator[str]:
    """Verify everything: whatever is there must be whole. With a *work*, after it was killed."""
    if scene.bundle.read_bytes() not in (scene.old_bytes, scene.new_bytes):
        yield "the bundle is neither the old nor the new one"
    try:
        store = Store(scene.store_root)
        # What is mended was damaged before.
        yield from halves(store, [scene.new.id] if work == "mend" else [])
        names = store.environments()
        for manifest in (scene.old, scene.new):
            if store.built(manifest.id) is not None and manifest.id not in names:
                yield f"{manifest.id} is built and has no manifest"
            # A fetch begins with the manifest: chunks may be missing then.
            if manifest.id in names and not (work == "fetch" and manifest is scene.new):
                yield from damaged_chunks(store, manifest)
    except (OSError, EnvshipError) as error:
        yield repr(error)


def try_points(folder: Path, work: str, seed: int, runs: int, wrong_way: str = "") -> dict[str, Any]:
    """Kill *work*, done in a *wrong_way* if one is named, at *runs* points, one after the other."""
    chance = random.Random(f"{seed} {work}")
    scene = Scene(folder)
    ways: dict[str, Callable[[], None]] = {"alone": lambda: None}
    if wrong_way:
        ways = {wrong_way: WRONG_WAYS[wrong_way]}
    elif work in BUILDING:
        ways["in two processes"] = write_with_two_processes

    def todo(way: str) -> Callable[[], object]:
        return lambda: (ways[way](), works(scene)[work]())

    traces = {}
    for way in ways:
        scene.reset(work)
        traces[way] = traced(todo(way), scene.store_root)
    killed_at = []
    found = []
    for number, (way, point) in enumerate(drawn(traces, runs, chance)):
        scene.reset(work)
        if killed(todo(way), scene.store_root, point, half=chance.random() < 0.5):
            killed_at.append(point.kind)
        where = f"run {number}, {way}, killed at {point.kind} {point.number}"
        found += [f"{where}: {line}" for line in problems(scene, work)]
    kinds = sorted({kind for trace in traces.values() for kind in trace.kinds})
    return {"work": work, "kinds": kinds, "killed_at": killed_at, "problems": found}


if __name__ == "__main__":
    tell_outcome(try_points, "work", str, WRONG_WAYS)
