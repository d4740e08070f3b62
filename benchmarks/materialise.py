"""Building environments against what the file system allows, and against tar, rattler and uv: medians and ratios.

    python benchmarks/materialise.py [PREFIX [CHANGED]] [--repetitions N] [--cache FOLDER] [--json FILE]

PREFIX is a conda environment, CHANGED the same one with another version of one package. Without them, ``big311`` and
``big311b`` in the folder ``envs`` of ``ENVSHIP_CONDA_LAB`` (``~/.cache/envship-conda-lab``) are taken, the active conda
environment if these are not there. Without CHANGED, environments that share files are not measured. What is missing for
one of the comparisons is said, and that comparison is skipped.

The measurements take turns, so that a noisy moment of the machine hits all of them, and ``sync`` comes before each.
Virtual machines that give free memory back to their host keep it meanwhile (`held_memory`). Nothing is deleted before
the end, which takes room for a few environments in each repetition: ext4 without a journal uses no inode again for
minutes after its file was deleted, and looks at all of these whenever somebody makes a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from environments import prefixes
from floors import Tree, create, link, tree_of
from held_memory import held
from rivals import Skipped, Uv, archive_of, rattler, unpack
from swap import machine, say, timed

from envship.cli.tables import console, table
from envship.environment import Environment
from envship.options import PackOptions
from envship.pack import pack
from worker_bootstrap.build import STUB
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

CHECKOUT = Path(__file__).resolve().parent.parent
FOUND_REPETITIONS = 20
SAMPLE_INTERVAL_S = 0.02
AIMS = {
    "cold_over_tar": 0.8,
    "cold_over_floor": 1.3,
    "shared_over_rattler": 1.0,
    "shared_over_uv": 1.0,
    "shared_over_floor": 1.3,
    "found_ms": 50.0,
    "peak_mb": 400.0,
}


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, nargs="?", help="a conda environment")
    parser.add_argument("changed", type=Path, nargs="?", help="the same with another version of one package")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--cache", type=Path, help="keeps what is made once: the archive, the store, uv's wheels")
    parser.add_argument("--only", metavar="NAMES", help="measurements to make, separated by commas")
    parser.add_argument("--hold", type=float, metavar="GB", help="keep so much free memory (default: see held_memory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics, medians and samples there")
    options = parser.parse_args()
    prefix, changed = prefixes(options.prefix, options.changed)
    kept = None if options.hold is None else int(options.hold * 1e9)
    if options.cache is not None:
        options.cache.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="envship-materialise-", dir=options.cache) as folder,
        held(kept) as held_bytes,
    ):
        if held_bytes:
            say(f"{held_bytes / 1e9:.1f} GB of free memory are kept from the host of this virtual machine")
        cache = options.cache or Path(folder) / "cache"
        cache.mkdir(exist_ok=True)
        bench = Bench(prefix, changed, cache.resolve(), Path(folder).resolve())
        bench.run(options.only.split(",") if options.only else list(bench.measurements), options.repetitions)
        bench.clean()
    metrics = metrics_of(bench.medians)
    print_tables(bench, metrics)
    if options.json is not None:
        report = {"metrics": metrics, "medians": bench.medians, "samples": bench.samples, "skipped": bench.skipped}
        options.json.write_text(json.dumps({**report, "machine": machine()}, indent=2) + "\n")


class Bench:
    """Two packed environments, a folder for results, and what has been measured so far."""

    def __init__(self, prefix: Path, changed: Path | None, cache: Path, folder: Path) -> None:
        self.samples: dict[str, list[float]] = {}
        self.skipped: dict[str, str] = {}
        self._prefix, self._changed, self._cache, self._folder = prefix, changed, cache, folder
        self._store = Store(cache / "store")
        say(f"packing {prefix}" + (f" and {changed}" if changed else ""))
        self._environment = pack(prefix, store=self._store, options=PackOptions(ignore_missing=True))
        self._other = pack(changed, store=self._store, options=PackOptions(ignore_missing=True)) if changed else None
        self._evict(self._environment)
        self.measurements: dict[str, Callable[[], None]] = {
            "tar": self._tar,
            "cold floor": self._cold_floor,
            "cold": self._cold,
            "shared floor": self._shared_floor,
            "shared": self._shared,
            "rattler": self._rattler,
            "uv": self._uv,
            "found ms": self._found,
            "peak mb": self._peak,
        }

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.samples.items()}

    def run(self, names: Sequence[str], repetitions: int) -> None:
        """Take so many samples of each measurement, in turns."""
        for repetition in range(repetitions):
            say(f"repetition {repetition + 1} of {repetitions}")
            for name in names:
                self.measure(name)

    def measure(self, name: str) -> None:
        """Take one more sample, or note why that is not possible."""
        if name in self.skipped:
            return
        os.sync()
        try:
            self.measurements[name]()
        except Skipped as reason:
            self.skipped[name] = str(reason)
            say(f"{name} is skipped: {reason}")
        finally:
            self._put_away(self._target)

    def clean(self) -> None:
        """Leave chunks only: the next run starts as this one did."""
        for environment in (self._environment, self._other):
            if environment is not None:
                self._evict(environment)

    @property
    def _target(self) -> Path:
        return self._folder / "target"

    def _note(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)
        say(f"  {name}: {value:.3f}")

    def _tar(self) -> None:
        archive = archive_of(self._prefix, self._cache)
        os.sync()
        self._note("tar", unpack(archive, self._target))

    def _cold_floor(self) -> None:
        self._note("cold floor", create(self._tree, self._prefix, self._target))

    def _cold(self) -> None:
        self._evict(self._environment)
        os.sync()
        self._note("cold", timed(functools.partial(self._build, self._environment))[1])

    def _shared_floor(self) -> None:
        self._needs_sharing()
        self._note("shared floor", link(self._tree, self._built(self._environment), self._target))

    def _shared(self) -> None:
        other = self._needs_sharing()
        self._built(self._environment)
        os.sync()
        self._note("shared", timed(functools.partial(self._build, other))[1])
        self._evict(other)

    def _rattler(self) -> None:
        self._note("rattler", rattler(self._changed or self._prefix, self._target))

    def _uv(self) -> None:
        self._note("uv", self._uv_tool.install(self._target))

    def _found(self) -> None:
        self._built(self._environment)
        find = functools.partial(materialise, self._store, self._environment.id)
        self._note("found ms", 1000 * statistics.median(timed(find)[1] for _ in range(FOUND_REPETITIONS)))

    def _peak(self) -> None:
        """A cold build again, and a shared one: looking at the memory takes time that must not count as ours."""
        self._evict(self._environment)
        peaks = [self._build(self._environment, watched=True)]
        if self._other is not None:
            peaks.append(self._build(self._other, watched=True))
            self._evict(self._other)
        self._note("peak mb", max(peaks))

    @functools.cached_property
    def _tree(self) -> Tree:
        return tree_of(self._built(self._environment))

    @functools.cached_property
    def _uv_tool(self) -> Uv:
        return Uv(self._changed or self._prefix, self._cache)

    def _needs_sharing(self) -> Environment:
        if self._other is None:
            raise Skipped("needs a second environment that differs in one package")
        return self._other

    def _built(self, environment: Environment) -> Path:
        built = self._store.built(environment.id)
        if built is None:
            self._build(environment)
            os.sync()
        return self._store.layout.prefix(environment.id)

    def _build(self, environment: Environment, *, watched: bool = False) -> float:
        """Build as an agent does; with *watched*, return the largest sum of memory that its processes had, in MB."""
        command = [sys.executable, "-c", STUB, str(CHECKOUT), str(self._store.layout.root), environment.id]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        over = threading.Event()
        peak = [0.0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over))
        if watched:
            watcher.start()
        answer = process.communicate()[0].splitlines()[-1]
        over.set()
        if watched:
            watcher.join()
        if process.returncode:
            raise RuntimeError(f"the build failed: {answer.decode()}")
        return peak[0]

    def _evict(self, environment: Environment) -> None:
        self._store.layout.ready(environment.id).unlink(missing_ok=True)
        self._put_away(self._store.layout.prefix(environment.id))

    def _put_away(self, tree: Path) -> None:
        """Take *tree* out of the way, to be deleted at the end of all measurements."""
        if tree.exists():
            tree.rename(tempfile.mkdtemp(dir=self._folder, prefix="away-"))


def _watch(pid: int, peak: list[float], over: threading.Event) -> None:
    """Keep in ``peak[0]`` the largest sum of the proportional set sizes of a process and its children, in MB."""
    while not over.is_set():
        try:
            root = psutil.Process(pid)
            sizes = [process.memory_full_info().pss for process in (root, *root.children(recursive=True))]
            peak[0] = max(peak[0], sum(sizes) / 1e6)
        except psutil.Error:
            pass
        time.sleep(SAMPLE_INTERVAL_S)


def metrics_of(medians: dict[str, float]) -> dict[str, float]:
    """The figures by which envship is judged, as far as they could be measured."""
    ratios = {
        "cold_over_tar": ("cold", "tar"),
        "cold_over_floor": ("cold", "cold floor"),
        "shared_over_rattler": ("shared", "rattler"),
        "shared_over_uv": ("shared", "uv"),
        "shared_over_floor": ("shared", "shared floor"),
    }
    metrics = {
        name: medians[ours] / medians[theirs]
        for name, (ours, theirs) in ratios.items()
        if ours in medians and theirs in medians
    }
    plain = {"found_ms": "found ms", "peak_mb": "peak mb"}
    return {**metrics, **{name: medians[label] for name, label in plain.items() if label in medians}}


def print_tables(bench: Bench, metrics: dict[str, float]) -> None:
    """Medians with their spread, what was skipped, then the metrics with what is aimed at."""
    out = console()
    explained = {
        "tar": "tar --zstd -xf and conda-unpack",
        "cold floor": "the same files from memory, two processes",
        "cold": "materialise, all chunks here",
        "shared floor": "links to as many files, two processes",
        "shared": "materialise, all but one package in an environment built here",
        "rattler": "rattler, from its warm cache",
        "uv": "uv pip install, from its warm cache (no Python, no byte code)",
        "found ms": "materialise, built already, in milliseconds",
        "peak mb": "largest memory of all processes of a build, in MB",
    }
    rows = []
    for name, values in bench.samples.items():
        figures = (statistics.median(values), min(values), max(values))
        rows.append((explained[name], *(f"{figure:.3f}" for figure in figures), str(len(values))))
    out.print(table(("seconds", "median", "min", "max", "n"), rows, right=("median", "min", "max", "n")))
    aims: list[tuple[str, ...]] = [(name, f"{value:.3f}", f"≤ {AIMS[name]:g}") for name, value in metrics.items()]
    out.print(table(("metric", "value", "aim"), aims, right=("value", "aim")))
    for name, reason in bench.skipped.items():
        out.print(f"skipped: {name}: {reason}")
    described: dict[str, Any] = machine()
    out.print(", ".join(f"{name} {value}" for name, value in described.items()))


if __name__ == "__main__":
    main()
