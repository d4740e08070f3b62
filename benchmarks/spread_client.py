"""What the client's process of `benchmarks.spread` does, inside its network namespace; prints one line of JSON.

    python benchmarks/spread_client.py METHOD ADDRESS HOSTS ARGUMENT…

Methods are the functions of `METHODS`. Each waits until the cluster is complete, then takes the time of one way to
bring the same bytes to every host, or of tasks beside it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import dask
from distributed import Client, wait
from distributed.diagnostics.plugin import UploadDirectory

READY_TIMEOUT_S = 300
PROBE_S = 0.01
PART_BYTES = 1 << 18


def stage(client: Client, hosts: int, environment_id: str) -> dict[str, Any]:
    """envship: chunks only, nothing is built."""
    ready(client, hosts)
    client.run_on_scheduler(start_probe)
    time.sleep(1)
    idle = client.run_on_scheduler(read_probe)
    began = time.time()
    result = client.stage_environment(environment_id, build=False, progress=False)
    seconds = time.time() - began
    busy = client.run_on_scheduler(read_probe)
    return {
        "began": began,
        "seconds": seconds,
        "uploaded_bytes": result.uploaded_bytes,
        "phases": result.seconds,
        "lag_p99_ms": busy["lag_p99_ms"],
        "idle_lag_p99_ms": idle["lag_p99_ms"],
        "growth_mb": busy["growth_mb"],
    }


def ready(client: Client, hosts: int) -> None:
    """Wait until every host has an agent."""
    import envship  # noqa: F401  # adds the methods

    deadline = time.monotonic() + READY_TIMEOUT_S
    while len(client.environment_status().hosts) < hosts + 1:  # and the scheduler's
        if time.monotonic() > deadline:
            raise TimeoutError("not every host has joined")
        time.sleep(0.5)


async def start_probe(dask_scheduler: Any) -> None:
    """In the scheduler: see every hundredth of a second how late the event loop is, and how much memory there is."""
    import asyncio
    import gc
    import time

    gc.collect()
    samples: list[float] = []
    sizes: list[float] = []
    dask_scheduler.spread_probe = (samples, sizes)

    def resident_mb() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    async def look() -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            samples.append(time.perf_counter() - due)
            if len(samples) % 20 == 1:
                sizes.append(resident_mb())

    dask_scheduler.spread_task = asyncio.ensure_future(look())


async def read_probe(dask_scheduler: Any) -> dict[str, float]:
    """What `start_probe` has seen since the last reading."""
    samples, sizes = dask_scheduler.spread_probe
    late = sorted(samples)
    seen = {
        "lag_p99_ms": 1000 * late[int(len(late) * 0.99)] if late else 0.0,
        "growth_mb": max(sizes) - sizes[0] if sizes else 0.0,
    }
    samples.clear()
    del sizes[1:]
    return seen


def scatter(client: Client, hosts: int, path: str) -> dict[str, Any]:
    """Dask's own broadcast."""
    blob = Path(path).read_bytes()
    began = time.time()
    future = client.scatter(blob, broadcast=True, timeout=600)
    wait(future)
    return {"seconds": time.time() - began}


def upload_file(client: Client, hosts: int, path: str) -> dict[str, Any]:
    """Dask's own distribution of files."""
    began = time.time()
    client.upload_file(path, load=False)
    return {"seconds": time.time() - began}


def upload_directory(client: Client, hosts: int, path: str) -> dict[str, Any]:
    """Dask's own distribution of folders: the plugin for nannies, with a folder that holds the file."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        plugin = UploadDirectory(folder)  # compresses everything, which is not held against it
        began = time.time()
        client.register_plugin(plugin)
        return {"seconds": time.time() - began}


def tasks(client: Client, hosts: int, environment_id: str, rate_limit: str) -> dict[str, Any]:
    """A stream of small tasks, and an exchange of all workers with all: alone, and while an environment spreads."""
    ready(client, hosts)
    throughput(client, 2.0)
    alone = throughput(client, 24.0)
    # It is not waited for: at such a rate it takes long, and ends with this process.
    dask.config.set({"envship.rate-limit": rate_limit})
    bring = functools.partial(client.stage_environment, environment_id, build=False, progress=False)
    staging = threading.Thread(target=bring, daemon=True)
    staging.start()
    time.sleep(5)
    beside = throughput(client, 24.0)
    if not staging.is_alive():
        raise RuntimeError("the environment was there before the tasks were done")
    return {"alone": alone, "beside": beside}


def throughput(client: Client, seconds: float) -> dict[str, float]:
    """Small tasks, and bytes exchanged, per second."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds / 2:
        wait(client.map(abs, range(200), pure=False))
        count += 200
    small = count / (time.perf_counter() - began)
    began, moved = time.perf_counter(), 0
    names = list(client.sync(client.scheduler.identity, n_workers=-1)["workers"])
    while time.perf_counter() - began < seconds / 2:
        parts = [client.submit(bytes, PART_BYTES, workers=[name], pure=False) for name in names for _ in range(4)]
        sums = [client.submit(lengths, parts, workers=[name], pure=False) for name in names]
        client.gather(sums)
        moved += (len(names) - 1) * len(parts) * PART_BYTES
    return {"tasks_per_s": small, "exchanged_mb_per_s": moved / 1e6 / (time.perf_counter() - began)}


def lengths(parts: Any) -> int:
    """What a task of the exchange makes of the parts that it fetched."""
    return sum(map(len, parts))


METHODS = {
    "stage": stage,
    "scatter": scatter,
    "upload_file": upload_file,
    "upload_directory": upload_directory,
    "tasks": tasks,
}


def main() -> None:
    """Connect, wait for the workers, run one method."""
    method, address, hosts, *arguments = sys.argv[1:]
    with Client(address, timeout="60s") as client:
        client.wait_for_workers(int(hosts), timeout=READY_TIMEOUT_S)
        print(json.dumps(METHODS[method](client, int(hosts), *arguments)), flush=True)
        if method == "tasks":
            os._exit(0)


if __name__ == "__main__":
    main()
