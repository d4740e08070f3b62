"""Packing against conda-pack and against the least that it can take; prints ratios and what they should be.

    python benchmarks/pack.py [PREFIX] [--changed OTHER] [--repetitions N] [--json FILE]
    python benchmarks/pack.py --chunking OLD.whl NEW.whl [OLD.whl NEW.whl ...]

PREFIX is a conda environment; OTHER is the same one with one package in another version, without which a module is
edited. Without PREFIX, ``big311`` and ``big311b`` in the folder ``envs`` of ``ENVSHIP_CONDA_LAB``
(``~/.cache/envship-conda-lab``) are taken, the active conda environment if these are not there.

Everything is measured in this run, one thing after the other, on warm caches; stores, archives and copies lie in the
temporary folder, which needs three times the room of the environment. The floor is reading every file of PREFIX and
putting it through SHA-256 and zstd in two processes. With --chunking, the way in which packages are cut is compared
with others, on two versions of packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
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
import zstandard
from chunking import compare_cuts
from environments import prefixes

import envship
from envship.cli.tables import console, table
from worker_bootstrap.codec import ZSTD_LEVEL
from worker_bootstrap.manifest import Package
from worker_bootstrap.store import Store

AIMS = {
    "cold_over_conda_pack": 0.5,
    "cold_over_floor": 1.25,
    "unchanged_over_walk": 1.5,
    "one_changed_over_unchanged": 2.0,
    "one_changed_bytes_over_package": 1.1,
    "peak_mb": 400.0,
    "store_over_tar_zst": 1.05,
}
FLOOR_PROCESSES = 2
FLOOR_PIECE_BYTES = 1 << 20
SAMPLE_EVERY_S = 0.1

# Timed inside, so that starting an interpreter and importing Dask does not count: users have done that already.
PACK = """
import sys, time
from pathlib import Path
from envship.pack import pack
from worker_bootstrap.store import Store
store = Store(Path(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    environment = pack(sys.argv[1], store=store)
    print(time.perf_counter() - began, environment.id)
"""

Figures = dict[str, list[float]]


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", type=Path, metavar="PREFIX")
    parser.add_argument("--changed", type=Path, metavar="OTHER", help="the same environment with one package changed")
    parser.add_argument("--repetitions", type=int, default=3, help="of what takes long (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics, figures and samples there")
    parser.add_argument("--chunking", nargs="+", type=Path, metavar="WHEEL", help="compare ways to cut these packages")
    options = parser.parse_args()
    if options.chunking:
        compare_cuts(options.chunking)
        return
    prefix, changed = prefixes(options.prefix, options.changed)
    with tempfile.TemporaryDirectory(prefix="envship-pack-") as folder:
        figures = measure(prefix, changed, Path(folder), options.repetitions)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    metrics = metrics_of(figures, medians)
    print_tables(figures, medians, metrics)
    if options.json is not None:
        report = {"metrics": metrics, "medians": medians, "samples": figures, "machine": machine()}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(prefix: Path, changed: Path | None, folder: Path, repetitions: int) -> Figures:
    """Seconds and bytes of every measurement."""
    figures: Figures = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    say("reading everything once")
    floor(prefix)
    for repetition in range(repetitions):
        say(f"repetition {repetition + 1} of {repetitions}: the floor, a cold pack")
        note("floor", timed(lambda: floor(prefix)))
        store = folder / f"store{repetition}"
        (seconds,) = packed(prefix, store, 1)
        note("cold", seconds)
    say("a cold pack again: looking at its memory takes time that must not count")
    note("peak bytes", watched(lambda: packed(prefix, folder / "watched", 1)))
    say("walks, and packs of what is unchanged")
    for _ in range(5):
        note("walk", timed(lambda: walk(str(prefix))))
        note("unchanged", min(packed(prefix, folder / "store0", 2)))
    note("store bytes", size_of(folder / "store0" / "chunks"))
    note("environment bytes", Store(folder / "store0").read_manifest(environment_of(folder / "store0")).size_bytes)
    measure_change(prefix, changed, folder, note)
    say("conda-pack")
    for kind in ("tar.zst", "tar.gz"):
        archive = folder / f"environment.{kind}"
        command = [sys.executable, "-m", "conda_pack.cli", "-q", "-p", prefix, "-o", archive, "-j", "2"]
        command += ["--ignore-missing-files", "--ignore-editable-packages"]
        note(f"conda-pack {kind}", timed(lambda command=command: subprocess.run(command, check=True)))  # type: ignore[misc]
        note(f"{kind} bytes", archive.stat().st_size)
        if kind == "tar.zst":
            note("tar.zst bytes at our level", at_our_level(archive))
        archive.unlink()
    return figures


def measure_change(prefix: Path, changed: Path | None, folder: Path, note: Callable[[str, float], None]) -> None:
    """A copy of the environment, packed, then with one package changed, packed again."""
    say("a copy, and one package changed in it")
    for repetition in range(2):
        copy, store = folder / "copy", folder / "copy-store"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", prefix, copy], check=True)
        time.sleep(2.5)  # files as young as this are read again, whatever their times say
        packed(copy, store, 1)
        note("copy unchanged", min(packed(copy, store, 2)))
        before = envship.Environment.open(environment_of(store), Store(store))
        name = change_package(copy, changed) if changed is not None else change_module(copy)
        time.sleep(2.5)
        (seconds,) = packed(copy, store, 1)
        note("one changed", seconds)
        if repetition == 0:
            (new,) = set(Store(store).environments()) - {before.id}
            after = envship.Environment.open(new, Store(store))
            note("shipped bytes", before.diff(after).ship_bytes)
            whole = [package for package in after.packages if package.name == name]
            note("package bytes", sum(compressed_bytes(package, after.store) for package in whole))
    shutil.rmtree(folder / "copy")


def change_package(copy: Path, changed: Path) -> str:
    """Put the package of *changed* that differs in the place of the one in *copy*, as conda would; return its name."""
    records = [{path.name: path for path in (prefix / "conda-meta").glob("*.json")} for prefix in (copy, changed)]
    (old,), (new,) = (
        [mine[name] for name in sorted(mine.keys() - other.keys())] for mine, other in (records, records[::-1])
    )
    for path in recorded(old):
        (copy / path).unlink(missing_ok=True)
    for path in recorded(new):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(changed / path, copy / path, follow_symlinks=False)
    old.unlink()
    shutil.copy2(new, copy / "conda-meta" / new.name)
    return str(json.loads(new.read_bytes())["name"])


def recorded(record: Path) -> list[str]:
    return list(json.loads(record.read_bytes())["files"])


def change_module(copy: Path) -> str:
    """Edit a module of the package that has the most of them; return its name."""
    records = [json.loads(path.read_bytes()) for path in (copy / "conda-meta").glob("*.json")]
    record = max(records, key=lambda record: sum(path.endswith(".py") for path in record["files"]))
    module = next(copy / path for path in record["files"] if path.endswith(".py") and (copy / path).stat().st_size)
    text = module.read_text()
    module.unlink()
    module.write_text(text + "\n# edited\n")
    return str(record["name"])


def at_our_level(archive: Path) -> int:
    """Bytes of conda-pack's *archive*, which it compresses at level 9 whatever it is told, at the level of chunks."""
    compressor, size_bytes = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj(), 0
    with zstandard.open(archive, "rb") as stream:
        while piece := stream.read(4 << 20):
            size_bytes += len(compressor.compress(piece))
    return size_bytes + len(compressor.flush())


def packed(prefix: Path, store: Path, times: int) -> list[float]:
    """Seconds of so many packs, one after the other in a process of its own."""
    command = [sys.executable, "-c", PACK, str(prefix), str(store), str(times)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line.split()[0]) for line in done.stdout.splitlines()]


def environment_of(store: Path) -> Any:
    (found,) = Store(store).environments()
    return found


def compressed_bytes(package: Package, store: Store) -> int:
    chunks = {chunk.digest for chunk in (package.listing, *package.chunks)}
    return sum(len(store.read_encoded(digest, ["zstd"])[1]) for digest in chunks)


def floor(prefix: Path) -> None:
    """Put all files below *prefix* through SHA-256 and zstd in two processes; small ones together, as in chunks."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(prefix) for name in names]
    paths = [path for path in paths if not os.path.islink(path)]
    with multiprocessing.get_context("fork").Pool(FLOOR_PROCESSES) as pool:
        pool.map(digest_and_compress, [paths[start : start + 200] for start in range(0, len(paths), 200)], chunksize=1)


def digest_and_compress(paths: Sequence[str]) -> int:
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    pending, size_bytes = b"", 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(4 << 20):
                hashlib.sha256(piece).digest()
                pending += piece
                if len(pending) >= FLOOR_PIECE_BYTES:
                    size_bytes += len(compressor.compress(pending))
                    pending = b""
    return size_bytes + len(compressor.compress(pending))


def walk(folder: str) -> int:
    """The least that looking at every file takes."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
            count += walk(entry.path) if entry.is_dir(follow_symlinks=False) else 1
    return count


def watched(work: Callable[[], object]) -> float:
    """The most memory in bytes that the processes which *work* starts hold together."""
    peak_bytes, ended = 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak_bytes
        me = psutil.Process()
        while not ended.wait(SAMPLE_EVERY_S):
            held_bytes = 0
            for process in me.children(recursive=True):
                try:
                    # Proportional: memory that forks share is counted once.
                    held_bytes += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak_bytes = max(peak_bytes, held_bytes)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        ended.set()
        sampler.join()
    return peak_bytes


def metrics_of(figures: Figures, medians: dict[str, float]) -> dict[str, float]:
    """The ratios that have an aim."""
    conda_pack = min(medians["conda-pack tar.zst"], medians["conda-pack tar.gz"])
    return {
        "cold_over_conda_pack": medians["cold"] / conda_pack,
        "cold_over_floor": medians["cold"] / medians["floor"],
        "unchanged_over_walk": medians["unchanged"] / medians["walk"],
        "one_changed_over_unchanged": medians["one changed"] / medians["copy unchanged"],
        "one_changed_bytes_over_package": medians["shipped bytes"] / medians["package bytes"],
        "peak_mb": max(figures["peak bytes"]) / 1e6,
        "store_over_tar_zst": medians["store bytes"] / medians["tar.zst bytes at our level"],
    }


def print_tables(figures: Figures, medians: dict[str, float], metrics: dict[str, float]) -> None:
    """Seconds, sizes, and ratios beside their aims."""
    out = console()
    rows = [(name, f"{value:.3f}", str(len(figures[name]))) for name, value in medians.items() if "bytes" not in name]
    out.print(table(("seconds", "median", "n"), rows, right=("median", "n")))
    sizes = [(name, f"{value / 1e6:,.1f}") for name, value in medians.items() if "bytes" in name]
    out.print(table(("what", "MB"), sizes, right=("MB",)))
    aims = [
        (name, f"{value:.2f}", f"≤ {AIMS[name]:g}", "" if value <= AIMS[name] else "not met")
        for name, value in metrics.items()
    ]
    out.print(table(("metric", "value", "aim", ""), aims, right=("value", "aim")))
    out.print(", ".join(f"{name} {value}" for name, value in machine().items()))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "envship": envship.__version__,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(work: Callable[[], Any]) -> float:
    """The seconds that *work* takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def say(text: str) -> None:
    """Tell what is being done, on standard error."""
    sys.stderr.write(f"{text} …\n")


if __name__ == "__main__":
    main()
