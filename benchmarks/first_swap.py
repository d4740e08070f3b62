"""A cluster that was started from one conda environment moves into another one: for the first time, and again.

    python benchmarks/first_swap.py [BASE ENVIRONMENT] [--changed OTHER] [--module NAME] [--json FILE]

A scheduler and two workers, with a store for each of two machines, all on this one, so that what would be fetched over
a network is copied from disk to disk. Nothing is packed, brought or built before. Without arguments, ``small311`` and
``big311`` of the laboratory's environments are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import environments
import swap
from distributed.versions import VersionMismatchWarning

import envship
from envship.cli.tables import console, table

Samples = dict[str, list[float]]

EXPLAINED = {
    "pack": "envship.pack, for the first time",
    "pack unchanged": "envship.pack, unchanged",
    "first": "use_environment, unknown to the cluster",
    "noop": "use_environment, there already",
    "back": "reset_environment",
    "again": "use_environment, into it again",
    "pack changed": "envship.pack, another prefix with one package changed",
    "changed": "use_environment, into that",
}


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path, metavar="BASE", help="what the cluster is started from")
    parser.add_argument("environment", nargs="?", type=Path, metavar="ENVIRONMENT", help="what it moves into")
    parser.add_argument("--changed", type=Path, metavar="OTHER", help="the same environment with one package changed")
    parser.add_argument("--module", help="imported by a task before (which fails) and after")
    parser.add_argument("--repetitions", type=int, default=5, help="of what moves no bytes (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics and samples there")
    options = parser.parse_args()
    environment, changed = environments.prefixes(options.environment, options.changed)
    base = options.base or environment.parent / "small311"
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)
    with tempfile.TemporaryDirectory(prefix="envship-first-swap-") as folder:
        samples = measure(base.absolute(), environment, changed, options.module, Path(folder), options.repetitions)
    metrics = {name: statistics.median(values) for name, values in samples.items()}
    print_table(samples)
    if options.json is not None:
        report = {"metrics": metrics, "samples": samples, "machine": swap.machine()}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(
    base: Path, environment: Path, changed: Path | None, module: str | None, folder: Path, repetitions: int
) -> Samples:
    """Seconds of every measurement, and the bytes that were uploaded under the same name with ``_bytes``."""
    os.environ["ENVSHIP_STORE"] = str(folder / "client-store")
    samples: Samples = {}

    def note(name: str, work: Callable[[], Any]) -> Any:
        swap.say(EXPLAINED[name])
        result, seconds = swap.timed(work)
        samples.setdefault(name, []).append(seconds)
        if hasattr(result, "uploaded_bytes"):
            samples.setdefault(f"{name}_bytes", []).append(result.uploaded_bytes)
            print(f"{EXPLAINED[name]}: {seconds:.2f} s, {result.uploaded_bytes:,} bytes")
        return result

    with swap.connected_cluster(base, folder / "cluster") as measured:
        client = measured.client
        assert module is None or not has(client, module), f"{module} is in {base}, too"
        note("pack", lambda: envship.pack(environment))
        note("pack unchanged", lambda: envship.pack(environment))
        move(measured, note, "first", environment)
        assert module is None or has(client, module), f"{module} cannot be imported in {environment}"
        for _ in range(repetitions):
            note("noop", lambda: client.use_environment(environment, ignore_versions=True))
            # What was parked would make the way there as quick as the way back.
            with dask.config.set({"envship.keep-warm": 0}):
                note("back", client.reset_environment)
                swap.until(lambda: not any(warm(client)), "standbys were not given up")
            client.wait_for_workers(swap.WORKERS)
            move(measured, note, "again", environment)
        if changed is not None:
            note("pack changed", lambda: envship.pack(changed))
            move(measured, note, "changed", changed)
    return samples


def move(measured: swap.Measured, note: Callable[[str, Callable[[], Any]], Any], name: str, prefix: Path) -> None:
    """Move, and wait until the cluster has parked what it left."""
    result = note(name, lambda: measured.client.use_environment(prefix, ignore_versions=True))
    measured.settle(result.previous_id)


def warm(client: Any) -> list[tuple[str, ...]]:
    """What each host keeps parked."""
    return [host.warm for host in client.environment_status().hosts.values()]


def has(client: Any, module: str) -> bool:
    """Whether a task can import *module*."""

    def found() -> bool:
        import importlib.util

        return importlib.util.find_spec(module) is not None

    return bool(client.submit(found, pure=False).result())


def print_table(samples: Samples) -> None:
    """Medians with their spread, and bytes."""
    out = console()
    rows = []
    for name, text in EXPLAINED.items():
        if name in samples:
            values = samples[name]
            size = samples.get(f"{name}_bytes")
            figures = (f"{figure:.2f}" for figure in (statistics.median(values), min(values), max(values)))
            rows.append((text, *figures, str(len(values)), "" if size is None else f"{statistics.median(size):,.0f}"))
    heads = ("seconds", "median", "min", "max", "n", "bytes uploaded")
    out.print(table(heads, rows, right=heads[1:]))
    out.print(", ".join(f"{name} {value}" for name, value in swap.machine().items()))


if __name__ == "__main__":
    main()
