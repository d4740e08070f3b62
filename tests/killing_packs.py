"""Kill -9 at chosen points of packing: a program of its own, run by `tests.test_kill`; see `tests.killing`.

A pack starts from an empty store (*cold*), from one that holds all chunks (*resumed*, as if the one before had been
killed at its very end), or from one that it has been packed into (*again*).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from envship.options import PackOptions
from envship.pack import pack
from envship.packer import Packer
from envship.scan_index import ScanIndex
from envship.sources.tree import Trees
from tests.halves import halves
from tests.steps import drawn, killed, tell_outcome, traced
from tests.wrong_ways import WRONG_WAYS
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks

STARTS = ("cold", "resumed", "again")
MOMENTS = ("rename chunks", "rename manifests", "rename index", "sync tmp", "sync manifests")
"""Whatever else is drawn: when a chunk, the manifest and the index appear."""


class Scene:
    """A store as it is before a pack of *prefix*."""

    def __init__(self, folder: Path, prefix: Path) -> None:
        self.prefix = prefix
        self.store_root = folder / "store"
        self._finished = folder / "finished"
        self.whole = pack(prefix, store=Store(folder / "reference")).id

    def reset(self, start: str) -> None:
        """Everything as it is before a pack that starts so."""
        shutil.rmtree(self.store_root, ignore_errors=True)
        if start == "cold":
            return
        shutil.copytree(self._finished, self.store_root)
        if start == "resumed":
            shutil.rmtree(self.store_root / "manifests")
            shutil.rmtree(self.store_root / "index")

    def keep(self) -> None:
        """The store is as a pack left it that came to its end."""
        self.store_root.rename(self._finished)

    def pack(self) -> EnvironmentId:
        """With two processes that write, as `envship.packing_process` does."""
        store, options = Store(self.store_root), PackOptions()
        index = ScanIndex.load(store, str(self.prefix), options)
        return Packer(store, options, None, processes=2).pack(self.prefix, Trees(), index)


def problems(scene: Scene) -> Iterator[str]:
    """What is there by halves; then the environment is packed again, to the end."""
    yield from _mixtures(scene)
    traced(scene.pack, scene.store_root)
    yield from (f"done again: {line}" for line in _mixtures(scene))
    store = Store(scene.store_root)
    if store.environments() != [scene.whole]:
        yield f"done again: {store.environments()} instead of {scene.whole}"


def _mixtures(scene: Scene) -> Iterator[str]:
    store = Store(scene.store_root)
    yield from halves(store)
    for environment_id in store.environments():
        if environment_id != scene.whole:
            yield f"another environment, {environment_id}"
        yield from damaged_chunks(store, store.read_manifest(environment_id))


def try_points(folder: Path, prefix: Path, seed: int, runs: int, wrong_way: str = "") -> dict[str, Any]:
    """Kill the packing of *prefix*, done in a *wrong_way* if one is named, at *runs* points."""
    chance = random.Random(f"{seed} pack")
    scene = Scene(folder, prefix)
    put_in_place: Callable[[], None] = WRONG_WAYS[wrong_way] if wrong_way else lambda: None

    def work() -> None:
        put_in_place()
        scene.pack()

    traces = {}
    for start in STARTS:
        scene.reset(start)
        traces[start] = traced(work, scene.store_root)
        if start == "cold":
            scene.keep()
    killed_at = []
    found = []
    plan = drawn(traces, runs, chance, MOMENTS)
    for number, (start, point) in enumerate(plan):
        scene.reset(start)
        if killed(work, scene.store_root, point, half=chance.random() < 0.5):
            killed_at.append(point.kind)
        where = f"run {number}, {start}, killed at {point.kind} {point.number}"
        found += [f"{where}: {line}" for line in problems(scene)]
    kinds = sorted({kind for trace in traces.values() for kind in trace.kinds if kind.startswith(MOMENTS)})
    return {"work": "pack", "kinds": kinds, "killed_at": killed_at, "problems": found}


if __name__ == "__main__":
    tell_outcome(try_points, "prefix", Path, WRONG_WAYS)
