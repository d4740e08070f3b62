"""How fast an environment reaches every machine of a cluster, against the time of its bytes over one link.

    python benchmarks/spread.py [--hosts 2,4,8,16] [--json FILE] [--svg FILE] …

Makes a laboratory of network namespaces, one for each host, for the scheduler and for the client, each behind a link of
its own whose rate ``tc tbf`` limits in both directions, and measures that rate with ``iperf3`` (b). There it starts a
real ``dask scheduler`` and real ``dask worker`` processes, and spreads the chunks of a real environment (F bytes on the
wire). Nothing is built: all hosts share the processors and the disk of this machine. For the same reason, links must
be slow enough for the processors not to be the limit; the load is measured and printed.

Needs Linux, root, ``ip`` and ``tc`` (package iproute2) and ``iperf3``; for the comparisons also ``ssh``, ``scp``,
``sshd`` (openssh-client, openssh-server) and ``aria2c`` (aria2), each of which is left out where it is missing.
Nothing outside of the namespaces is changed, and all that was made is removed at the end, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from benchmarks import spread_report, spread_rivals  # noqa: E402  # a script has no package
from benchmarks.lab import Lab, LabError, LabTimeout, obstacle  # noqa: E402
from benchmarks.lab_cluster import LabCluster, host_names  # noqa: E402

PARTS = ("spread", "change", "tasks", "rivals", "simulation")
PACKAGES = ["numpy", "scipy", "pandas", "matplotlib", "sympy", "pyarrow"]
CHANGED = ("scikit-learn==1.7.1", "scikit-learn==1.7.2")
SETTLE_S = 1.0
LIMIT_SHARE = 1 / 16
"""Of a link, for chunks, while tasks run: what the rate limit of the measurement leaves is what tasks can keep."""


def main() -> None:
    """Measure, print, and write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,4,8,16", help="numbers of hosts (default: 2,4,8,16)")
    parser.add_argument("--rate", type=float, default=10.0, help="of links, in Mbit/s (default: 10)")
    parser.add_argument(
        "--fast-rate", type=float, default=60.0, help="with 4 hosts, for what is compared (default: 60)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to measure (default: {','.join(PARTS)})")
    parser.add_argument("--environments", nargs=2, type=Path, metavar="PREFIX", help="two, which differ in one package")
    parser.add_argument("--base", type=Path, metavar="PREFIX", help="environment of the cluster")
    parser.add_argument("--folder", type=Path, help="where to work; environments made there are kept for the next time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics and samples there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw hosts complete over time there")
    options = parser.parse_args()
    if (reason := obstacle()) is not None:
        print(f"skipped: {reason}")
        return
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="envship-spread-") as scratch:
        bench = Bench(options.folder or Path(scratch), Path(scratch), options)
        for part in PARTS:
            if part in options.parts.split(","):
                getattr(bench, part)()
    report = {"metrics": bench.metrics, "samples": bench.samples, "machine": spread_report.machine()}
    spread_report.print_tables(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.svg is not None and bench.samples.get("spread"):
        options.svg.write_text(spread_report.curves(bench.samples["spread"]))


class Bench:
    """The measurements, and what they need."""

    def __init__(self, folder: Path, scratch: Path, options: argparse.Namespace) -> None:
        self.metrics: dict[str, float] = {}
        self.samples: dict[str, Any] = {}
        self._options = options
        self._scratch = scratch
        self._folder = folder
        self._store = folder / "client-store"
        folder.mkdir(exist_ok=True)
        os.environ["ENVSHIP_STORE"] = str(self._store)
        import envship
        from envship.cli.machines import make_venv

        if options.base is None or options.environments is None:
            say("making the environments")
            import distributed

            dask = f"distributed=={distributed.__version__}"
            if not (folder / "base").exists():
                make_venv(folder / "base", [dask, "zstandard"])
            for name, changed in zip("ab", CHANGED, strict=True):
                if not (folder / name).exists():
                    make_venv(folder / name, [dask, "zstandard", *PACKAGES, changed])
        self._python = (options.base or folder / "base") / "bin" / "python"
        say("packing")
        first, second = (envship.pack(prefix) for prefix in options.environments or (folder / "a", folder / "b"))
        self._first, self._second = first.id, second.id
        sizes = [wire_sizes(environment) for environment in (first, second)]
        self._wire_bytes = sum(sizes[0].values())
        self._changed_bytes = sum(size for digest, size in sizes[1].items() if digest not in sizes[0])
        self._bundle = folder / "environment.envship"
        if not self._bundle.exists():
            first.save(self._bundle)
        self.samples["bytes"] = {
            "F": self._wire_bytes,
            "uncompressed": first.nbytes,
            "chunks": len(sizes[0]),
            "changed": self._changed_bytes,
            "bundle": self._bundle.stat().st_size,
        }

    def spread(self) -> None:
        """The whole environment, to more and more hosts."""
        runs = self.samples["spread"] = {}
        for count in map(int, self._options.hosts.split(",")):
            with self._cluster(count, self._options.rate) as (cluster, rate):
                runs[str(count)] = self._stage(cluster, rate)
        for count, run in runs.items():
            self.metrics[f"p50_over_limit_{count}"] = statistics.median(run["hosts_over_limit"])
            self.metrics[f"max_over_limit_{count}"] = max(run["hosts_over_limit"])
        if {"4", "16"} <= set(runs):
            self.metrics["growth_4_to_16"] = self.metrics["max_over_limit_16"] / self.metrics["max_over_limit_4"]
        last = runs[max(runs, key=int)]
        self.metrics["client_bytes_over_F"] = max(run["uploaded_bytes"] for run in runs.values()) / self._wire_bytes
        self.metrics["scheduler_lag_p99_ms"] = last["lag_p99_ms"]
        self.metrics["scheduler_growth_mb"] = last["growth_mb"]

    def change(self) -> None:
        """One package changed."""
        with self._cluster(4, self._options.fast_rate) as (cluster, rate):
            self.samples["ours at 4 hosts"] = self._stage(cluster, rate)
            sent, _ = cluster.lab.carried_bytes("client")
            run = cluster.client("stage", self._second)
            run["link_bytes"] = cluster.lab.carried_bytes("client")[0] - sent
        self.samples["change"] = run
        self.metrics["one_changed_client_bytes_over_chunks"] = run["link_bytes"] / self._changed_bytes
        self.metrics["one_changed_uploaded_over_chunks"] = run["uploaded_bytes"] / self._changed_bytes
        self.metrics["one_changed_wall_s_beyond_limit"] = run["seconds"] - self._changed_bytes / rate

    def tasks(self) -> None:
        """Tasks beside an environment that spreads, with the rate limit on."""
        with self._cluster(4, self._options.fast_rate) as (cluster, rate):
            limit = f"{rate * LIMIT_SHARE / 1e6:.3f} MB"
            run = cluster.client("tasks", self._first, limit)
        self.samples["tasks"] = {**run, "rate_limit": limit, "rate": rate}
        for name in ("tasks_per_s", "exchanged_mb_per_s"):
            self.metrics[f"task_throughput_kept_{name}"] = run["beside"][name] / run["alone"][name]
        kept = [value for name, value in self.metrics.items() if name.startswith("task_throughput_kept_")]
        self.metrics["task_throughput_kept"] = min(kept)

    def rivals(self) -> None:
        """What people would do instead, with the same bytes in one file."""
        seconds = self.samples["rivals"] = {}
        if "ours at 4 hosts" not in self.samples:
            with self._cluster(4, self._options.fast_rate) as (cluster, rate):
                self.samples["ours at 4 hosts"] = self._stage(cluster, rate)
        seconds["envship"] = self.samples["ours at 4 hosts"]["seconds"]
        for name in ("scatter", "upload_file", "upload_directory"):
            with self._cluster(4, self._options.fast_rate) as (cluster, _), self._limited(name):
                limit_s = spread_rivals.TIMEOUT_S
                seconds[name] = cluster.client(name, str(self._bundle), timeout_s=limit_s)["seconds"]
        hosts = host_names(4)
        for name, rival, programs in (
            ("scp", spread_rivals.copy_to_each, ("ssh", "scp", "sshd", "ssh-keygen")),
            ("bittorrent", spread_rivals.torrent, ("aria2c",)),
        ):
            missing = [program for program in programs if shutil.which(program) is None]
            if missing:
                say(f"{name} is left out: {', '.join(missing)} not installed")
                continue
            with self._lab(["client", *hosts], self._options.fast_rate) as lab, self._limited(name):
                seconds[name] = rival(lab, hosts, self._bundle)
        if (python := self._ray()) is not None:
            with self._lab(["client", *hosts], self._options.fast_rate) as lab, self._limited("ray"):
                seconds["ray"] = spread_rivals.ray_tree(lab, hosts, self._bundle, python)
        for name, value in seconds.items():
            if name != "envship":
                self.metrics[f"ahead_of_{name}"] = value / seconds["envship"]

    @contextlib.contextmanager
    def _limited(self, name: str) -> Iterator[None]:
        """A rival that takes too long is not waited for: what it took is at least that. One that fails is left out."""
        say(name)
        try:
            yield
        except LabTimeout:
            say(f"{name} was ended after {spread_rivals.TIMEOUT_S:.0f} s")
            self.samples["rivals"][name] = spread_rivals.TIMEOUT_S
            self.samples.setdefault("unfinished", []).append(name)
        except LabError as error:
            say(f"{name} is left out: it failed: {error}")

    def _ray(self) -> Path | None:
        """The interpreter of an environment that holds Ray, or None where it cannot be installed."""
        from envship.cli.machines import MachinesError, make_venv

        prefix = self._folder / "ray"
        if not prefix.exists():
            try:
                make_venv(prefix, ["ray"])
            except MachinesError as error:
                shutil.rmtree(prefix, ignore_errors=True)
                say(f"ray is left out: it cannot be installed: {error}")
                return None
        return prefix / "bin" / "python"

    def simulation(self) -> None:
        """The same tracker with more hosts than fit here."""
        from benchmarks.swarm_sizes import simulate

        self.samples["simulation"] = simulate(self.samples.get("spread", {}))

    def _stage(self, cluster: LabCluster, rate: float) -> dict[str, Any]:
        sent, _ = cluster.lab.carried_bytes("client")
        with Load() as load:
            run = cluster.client("stage", self._first)
        limit_s = self._wire_bytes / rate
        fetched = cluster.fetched_s(run["began"])
        of_hosts = [fetched[name] for name in cluster.hosts]
        return {
            **run,
            "rate": rate,
            "limit_s": limit_s,
            "hosts_s": sorted(of_hosts),
            "hosts_over_limit": sorted(seconds / limit_s for seconds in of_hosts),
            "scheduler_s": fetched.get("scheduler"),
            "link_bytes": cluster.lab.carried_bytes("client")[0] - sent,
            "load": load.busy,
        }

    def _lab(self, names: Sequence[str], rate_mbit: float) -> Lab:
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        return Lab(names, rate_mbit, folder)

    def _cluster(self, count: int, rate_mbit: float) -> RunningCluster:
        hosts = host_names(count)
        say(f"{count} hosts, links of {rate_mbit:g} Mbit/s")
        return RunningCluster(self._lab(["client", "scheduler", *hosts], rate_mbit), hosts, self._python, self._store)


class RunningCluster:
    """A laboratory with a cluster in it, and the rate that was measured there; for use as ``with``."""

    def __init__(self, lab: Lab, hosts: Sequence[str], python: Path, store: Path) -> None:
        self._lab = lab
        self._made = (hosts, python, store)

    def __enter__(self) -> tuple[LabCluster, float]:
        self._lab.__enter__()
        try:
            rate = self._lab.measure_rate("client", self._made[0][0])
            return LabCluster(self._lab, *self._made), rate
        except BaseException:
            self._lab.close()
            raise

    def __exit__(self, *error: object) -> None:
        self._lab.close()
        shutil.rmtree(self._lab.folder, ignore_errors=True)


class Load:
    """How busy the processors of this machine were in the block: 1.0 is all of them, all the time."""

    busy = 0.0

    def __enter__(self) -> Load:
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        total, idle = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.busy = 1 - idle / total if total else 0.0

    @staticmethod
    def _read() -> tuple[int, int]:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]


def wire_sizes(environment: Any) -> dict[str, int]:
    """Of each chunk, as it lies in the client's store and so travels."""
    sizes = {}
    for digest in environment.manifest.chunks:
        _, payload = environment.store.read_encoded(digest, ("zstd", "zlib", "raw"))
        sizes[digest] = len(payload)
    return sizes


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
