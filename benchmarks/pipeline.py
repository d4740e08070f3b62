"""How much of a build is hidden behind the fetch: fetch-to-built on one host, over the slower of the two alone.

    python benchmarks/pipeline.py [--environment PREFIX] [--rate MBIT] [--repetitions N] [--json FILE]

One host holds an environment, another one fetches it over a link of a known rate (network namespaces, see
`benchmarks.lab`; needs root and iproute2) and builds it: chunks only, then the build alone, then, in an empty store,
both at once. Without ``--rate``, the link is chosen so that the fetch takes about as long as the build: the hardest
case, as a perfect overlap would halve the time. What verifies and decompresses shares the processors with what
writes, so the machine's load is printed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from benchmarks.lab import Lab, obstacle  # noqa: E402
from envship.cli.tables import console, table  # noqa: E402
from envship.pack import pack  # noqa: E402
from worker_bootstrap.materialise import materialise  # noqa: E402
from worker_bootstrap.store import Store  # noqa: E402

AIM = 1.15
UNHURRIED_MBIT = 10_000
HOSTS = ("source", "target", "client")
CLIENT = """
import json, sys
from distributed import Client
import envship
with Client(sys.argv[1], timeout=60) as client:
    client.wait_for_workers(1, timeout=120)
    result = client.stage_environment(sys.argv[2], build=sys.argv[3] == "build", progress=False)
    print(json.dumps(dict(result.seconds)))
"""


class Bench:
    """One laboratory: a scheduler that holds the environment, and workers that do not yet."""

    def __init__(self, lab: Lab, folder: Path, environment_id: str) -> None:
        self.lab = lab
        self.folder = folder
        self.environment_id = environment_id
        self.address = f"tcp://{lab.address('source')}:8786"
        self._count = 0
        command = ["-m", "distributed.cli.dask_scheduler", "--host", lab.address("source"), "--port", "8786"]
        lab.start("scheduler", "source", [sys.executable, *command, "--no-dashboard"], self._variables("source"))

    def sample(self, rate_mbit: float) -> dict[str, float]:
        """Seconds of the fetch alone, of the build alone, and of both at once."""
        self.lab.set_rate("target", rate_mbit)
        host = self._new_host()
        fetch = self._stage("chunks")["fetch"]
        build = self._stage("build")["build"]
        self._end(host)
        host = self._new_host()
        both = self._stage("build")
        self._end(host)
        return {"fetch_s": fetch, "build_s": build, "both_s": max(both["fetch"], both["build"])}

    def _stage(self, how: str) -> dict[str, float]:
        self._count += 1
        command = [sys.executable, "-W", "ignore", "-c", CLIENT, self.address, self.environment_id, how]
        output = self.lab.run(f"client-{self._count}", "client", command, self._variables("client"))
        seconds: dict[str, float] = json.loads(output.splitlines()[-1])
        return {"fetch": seconds.get("fetch", 0.0), "build": seconds.get("build", 0.0)}

    def _new_host(self) -> str:
        self._count += 1
        name = f"host-{self._count}"
        options = ["--host", self.lab.address("target"), "--no-nanny", "--nthreads", "1", "--no-dashboard"]
        scratch = ["--local-directory", str(self.folder / "scratch")]
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, *options, *scratch]
        self.lab.start(name, "target", command, self._variables(name))
        return name

    def _end(self, host: str) -> None:
        self.lab.stop(host)
        subprocess.run(["rm", "-rf", str(self.folder / host)], check=True)

    def _variables(self, host: str) -> dict[str, str]:
        return {**os.environ, "ENVSHIP_STORE": str(self.folder / host), "PYTHONPATH": str(CHECKOUT)}


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path(sys.prefix), metavar="PREFIX", help="what is sent")
    parser.add_argument("--rate", type=float, metavar="MBIT", help="of the link, in Mbit/s")
    parser.add_argument("--repetitions", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics and samples there")
    options = parser.parse_args()
    reason = obstacle(["ip", "tc"])
    if reason is not None:
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory(prefix="envship-pipeline-") as folder:
        report = measure(Path(folder), options.environment, options.rate, options.repetitions)
    metrics = report["metrics"]
    rows = [(name.replace("_s", ""), f"{metrics[name]:.2f}") for name in ("fetch_s", "build_s", "both_s")]
    console().print(table(("on one host", "seconds"), rows, right=("seconds",)))
    ratio = metrics["both_over_slower"]
    print(f"both over the slower of the two: {ratio:.2f} (aim: {AIM}); {report['what']}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, prefix: Path, rate_mbit: float | None, repetitions: int) -> dict[str, Any]:
    """Medians, samples, and what they were taken of."""
    source = Store(folder / "source")
    environment = pack(prefix, store=source)
    materialise(source, environment.id)
    wire_bytes = sum(path.stat().st_size for path in (folder / "source" / "chunks").rglob("*") if path.is_file())
    with Lab(HOSTS, UNHURRIED_MBIT, folder) as lab:
        bench = Bench(lab, folder, environment.id)
        if rate_mbit is None:
            rate_mbit = 8e-6 * wire_bytes / bench.sample(UNHURRIED_MBIT)["build_s"]
        samples = [bench.sample(rate_mbit) for _ in range(repetitions)]
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    ratios = [sample["both_s"] / max(sample["fetch_s"], sample["build_s"]) for sample in samples]
    what = (
        f"{wire_bytes / 1e6:.0f} MB on the wire, {environment.nbytes / 1e6:.0f} MB built, {rate_mbit:.0f} Mbit/s, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    )
    metrics = {**medians, "both_over_slower": statistics.median(ratios)}
    return {"metrics": metrics, "samples": samples, "what": what}


if __name__ == "__main__":
    main()
