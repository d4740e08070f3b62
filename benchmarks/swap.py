"""Swaps against what Dask itself needs to start a worker; prints a table of medians and ratios.

    python benchmarks/swap.py [--repetitions N] [--json FILE]

Makes what it needs: a ``.venv`` in the checkout where envship is not installed, small environments, and clusters of two
workers each, whose processes are real and which have a store per machine. The measurements take turns, so that a noisy
moment of the machine hits all of them. Every environment is built on every host before anything is measured: times are
those of swaps that move no bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent

try:
    import distributed
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    import envship  # adds the methods to the client
    from envship.cli.machines import POLL_S, LittleCluster, make_venv, write_wheel
    from envship.cli.tables import console, table
except ImportError:
    python = CHECKOUT / ".venv" / "bin" / "python"
    if os.environ.get("ENVSHIP_BENCHMARK_VENV"):
        raise
    subprocess.run(["make", "-C", str(CHECKOUT), "install", f"PYTHON={sys.executable}"], check=True)
    os.environ["ENVSHIP_BENCHMARK_VENV"] = str(python)
    os.execv(python, [str(python), *sys.argv])

WORKERS = 2
SETTLE_TIMEOUT_S = 60.0
STREAM_INTERVAL_S = 0.01
AIMS = {
    "call_over_restart": 0.8,
    "downtime_over_restart": 0.3,
    "call_with_scheduler_over_restart": 1.3,
    "back_over_restart": 0.35,
    "noop_s": 0.5,
    "noop_bytes": 0.0,
}


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="of each measurement (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics, medians and samples there")
    options = parser.parse_args()
    # What this process has installed besides does not matter here, and Dask would say so at every connection.
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)
    with tempfile.TemporaryDirectory(prefix="envship-swap-") as folder:
        samples = measure(Path(folder), options.repetitions)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    metrics = metrics_of(medians)
    print_tables(samples, medians, metrics)
    if options.json is not None:
        report = {"metrics": metrics, "medians": medians, "samples": samples, "machine": machine()}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds (and bytes) of every measurement, in the order in which they were taken."""
    os.environ["ENVSHIP_STORE"] = str(folder / "client-store")
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    say("making a base environment, and three to move into")
    dask_version = f"distributed=={distributed.__version__}"
    base = make_venv(folder / "base", [dask_version])
    prefixes = []
    for name in "abc":
        wheel = write_wheel(folder / name / "wheel", "only_here", f"{ord(name)}", f"NAME = {name!r}\n")
        prefixes.append(make_venv(folder / name / "prefix", [dask_version, wheel]))
    with ExitStack() as stack:
        say("starting three clusters, and moving two of them through all environments once")
        plain, kept, whole = (
            stack.enter_context(connected_cluster(base, folder / name)) for name in ("plain", "kept", "whole")
        )
        a, b, c = prefixes
        # The order leaves that environment parked which is not moved to first.
        for measured, scheduler, order in ((kept, False, (c, b, a)), (whole, None, (b, c, a))):
            for prefix in order:
                call = functools.partial(measured.client.use_environment, prefix, scheduler=scheduler)
                result, seconds = timed(call)
                note("first call", seconds)
                note("uploaded bytes of a first call", result.uploaded_bytes)
                measured.settle(result.previous_id)
        for repetition in range(repetitions):
            say(f"repetition {repetition + 1} of {repetitions}")
            measure_dask(plain, note)
            measure_swaps(kept, prefixes, note)
            measure_with_scheduler(whole, prefixes, repetition, note)
    return samples


class Measured:
    """A cluster and a client that is connected to it."""

    def __init__(self, cluster: LittleCluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client

    def registered(self) -> set[str]:
        """Names of the workers that the scheduler knows."""
        workers = self.client.sync(self.client.scheduler.identity)["workers"]
        return {str(worker["name"]) for worker in workers.values()}

    def settle(self, previous_id: str | None) -> None:
        """Wait until the standby of the environment left behind is parked on every host, and everybody is there."""

        def parked() -> bool:
            status = self.client.environment_status()
            with_workers = {worker.host_id for worker in status.workers.values()}
            warm = [status.hosts[host_id].warm for host_id in with_workers]
            return len(status.workers) == WORKERS and all(ids == (previous_id or "base",) for ids in warm)

        until(parked, "the standby was not parked")


@contextmanager
def connected_cluster(base: Path, folder: Path) -> Iterator[Measured]:
    """A cluster started from *base*, with all workers there."""
    folder.mkdir()
    with LittleCluster(base, folder, WORKERS) as cluster, Client(cluster.address, set_as_default=False) as client:
        client.wait_for_workers(WORKERS)
        yield Measured(cluster, client)


def measure_dask(plain: Measured, note: Callable[[str, float], None]) -> None:
    """What Dask needs by itself, on a cluster that has never seen envship."""
    note("restart", timed(plain.client.restart)[1])
    began = time.perf_counter()
    name = plain.cluster.start_worker(WORKERS)
    until(lambda: name in plain.registered(), f"{name} did not register", interval_s=0.005)
    note("bare worker", time.perf_counter() - began)
    plain.cluster.stop_worker(WORKERS)
    until(lambda: name not in plain.registered(), f"{name} did not leave")


def measure_swaps(kept: Measured, prefixes: list[Path], note: Callable[[str, float], None]) -> None:
    """Swaps where the scheduler stays. Begins and ends in the first environment, with the second one parked."""
    a, b, c = prefixes
    client = kept.client
    at_a = client.use_environment(a, scheduler=False).environment_id
    # The one parked environment is b, so that c, built on every host as all are, must be started.
    result, seconds = timed(lambda: client.use_environment(c, scheduler=False))
    note("call", seconds)
    kept.settle(at_a)
    note("back", timed(lambda: client.use_environment(a, scheduler=False))[1])
    kept.settle(result.environment_id)
    with Stream(kept.cluster.address, kept.cluster.folder / f"journal-{time.monotonic_ns()}") as stream:
        result = client.use_environment(b, scheduler=False)
        stream.until_served()
    downtime_s, silence_s = stream.gaps_s()
    note("downtime", downtime_s)
    note("silence", silence_s)
    kept.settle(at_a)
    client.use_environment(a, scheduler=False)
    kept.settle(result.environment_id)
    result, seconds = timed(lambda: client.use_environment(a, scheduler=False))
    note("noop", seconds)
    note("noop bytes", result.uploaded_bytes)


def measure_with_scheduler(
    whole: Measured, prefixes: list[Path], repetition: int, note: Callable[[str, float], None]
) -> None:
    """A swap of scheduler and workers, on to the next environment: never the one that is parked."""
    target = prefixes[(repetition + 1) % len(prefixes)]
    result, seconds = timed(lambda: whole.client.use_environment(target))
    assert result.scheduler_swapped
    note("call with scheduler", seconds)
    note("downtime with scheduler", result.downtime_s)
    whole.settle(result.previous_id)


class Stream:
    """Tiny tasks, one every `STREAM_INTERVAL_S`: the cluster as its user sees it.

    A task counts as completed when this client hears of it. Where it ran it has written to *journal* by then, because
    its result may be lost, and computed again elsewhere, when its worker leaves. Results are let go of at once: those
    that are held are computed again after a swap, before anything new.
    """

    def __init__(self, address: str, journal: Path) -> None:
        self._address = address
        self._journal = journal
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._submit, name="stream")
        self._heard: dict[int, float] = {}
        self._submitted = 0
        self._pending: dict[int, Any] = {}

    def __enter__(self) -> Stream:
        self._client = Client(self._address, set_as_default=False)
        self._thread.start()
        until(lambda: len(self._heard) > 10, "no task of the stream was computed")
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def until_served(self) -> None:
        """Wait until a task submitted from now on is computed."""
        number = self._submitted
        until(lambda: number in self._heard, "no task was computed after the swap")

    def gaps_s(self) -> tuple[float, float]:
        """Seconds from the last task completed in the old environment to the first in the new; longest silence."""
        completed = self._completed()
        old = completed[0][1]
        first_new = next(at for at, environment in completed if environment != old)
        last_old = max(at for at, environment in completed if environment == old and at < first_new)
        times = [at for at, _ in completed]
        return first_new - last_old, max(later - earlier for earlier, later in zip(times, times[1:], strict=False))

    def _completed(self) -> list[tuple[float, str]]:
        """(when, in which environment) of each task, in the order in which this client heard of them."""
        ran: dict[int, list[tuple[float, str]]] = {}
        for line in self._journal.read_text().splitlines():
            number, at, environment = line.split()
            ran.setdefault(int(number), []).append((float(at), environment))
        return sorted((at, max(run for run in ran[number] if run[0] <= at)[1]) for number, at in self._heard.items())

    def _submit(self) -> None:
        while not self._over.wait(STREAM_INTERVAL_S):
            number = self._submitted
            future = self._client.submit(report, number, str(self._journal), pure=False)
            self._pending[number] = future
            self._submitted += 1
            future.add_done_callback(functools.partial(self._hear, number))

    def _hear(self, number: int, future: Any) -> None:
        if future.status == "finished":
            self._heard[number] = time.time()
            self._pending.pop(number, None)


def report(number: int, journal: str) -> None:
    """The task of the stream. Cluster and client share a clock and a disk: they are on one machine."""
    import os
    import time

    with open(journal, "a") as file:
        file.write(f"{number} {time.time()} {os.environ.get('ENVSHIP_ENVIRONMENT', 'base')}\n")


def metrics_of(medians: dict[str, float]) -> dict[str, float]:
    """The figures by which envship is judged."""
    restart = medians["restart"]
    return {
        "call_over_restart": medians["call"] / restart,
        "downtime_over_restart": medians["downtime"] / restart,
        "call_with_scheduler_over_restart": medians["call with scheduler"] / restart,
        "back_over_restart": medians["back"] / restart,
        "noop_s": medians["noop"],
        "noop_bytes": medians["noop bytes"],
    }


def print_tables(samples: dict[str, list[float]], medians: dict[str, float], metrics: dict[str, float]) -> None:
    """Medians with their spread, then the metrics with what is aimed at."""
    out = console()
    explained = {
        "restart": "client.restart()",
        "bare worker": "dask worker, from exec to registered",
        "call": "use_environment, scheduler stays",
        "downtime": "… from the last task in the old environment to the first in the new",
        "silence": "… the longest time in which no task was completed",
        "call with scheduler": "use_environment, scheduler moves as well",
        "downtime with scheduler": "… from the commit to the last worker's report",
        "back": "use_environment, back to the one left a moment ago",
        "noop": "use_environment, there already",
        "first call": "use_environment, environment unknown to the cluster",
    }
    rows = []
    for name, text in explained.items():
        figures = (medians[name], min(samples[name]), max(samples[name]))
        over_restart = f"{medians[name] / medians['restart']:.2f}"
        rows.append((text, *(f"{figure:.3f}" for figure in figures), str(len(samples[name])), over_restart))
    heads = ("seconds", "median", "min", "max", "n", "over restart")
    out.print(table(heads, rows, right=heads[1:]))
    aims = [(name, f"{value:.3f}", f"≤ {AIMS[name]:g}") for name, value in metrics.items()]
    out.print(table(("metric", "value", "aim"), aims, right=("value", "aim")))
    out.print(", ".join(f"{name} {value}" for name, value in machine().items()))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "distributed": distributed.__version__,
        "envship": envship.__version__,
        "workers": WORKERS,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What *work* returns, and the seconds that it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def until(condition: Callable[[], bool], problem: str, interval_s: float = POLL_S) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} within {SETTLE_TIMEOUT_S:.0f} s")
        time.sleep(interval_s)


def say(text: str) -> None:
    """Tell what is being done, on standard error."""
    sys.stderr.write(f"{text} …\n")


if __name__ == "__main__":
    main()
