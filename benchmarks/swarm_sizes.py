"""The tracker with more hosts than fit on one machine: `benchmarks.swarm` at several sizes; prints a table.

    python benchmarks/swarm_sizes.py [HOSTS,HOSTS…] [CHUNKS]

Assumptions are those of `benchmarks.swarm`. Times are in units of F/b; ``scheduler`` is the time that the real tracker
took to decide, on this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab import QUEUE_BYTES  # a script has no package
from benchmarks.swarm import CALL_S, Swarm, chunks_of, queueing_s  # a script has no package

SIZES = (2, 4, 8, 16, 64, 256, 1000, 10_000)
GIGABIT = 125e6


def simulate(
    measured: Mapping[str, Any] | None = None, sizes: Sequence[int] = SIZES, chunks: int = 1000
) -> list[dict[str, float]]:
    """One row for each size; *measured* are real runs, which those of their size are compared with."""
    rows = []
    for size in sizes:
        real = (measured or {}).get(str(size))
        if real is None:
            row = run_once(size, chunks, GIGABIT)
        else:
            row = run_once(size, chunks, real["rate"], queueing_s(real["rate"], QUEUE_BYTES))
            row["measured max"] = real["hosts_over_limit"][-1]
        rows.append(row)
    return rows


def run_once(hosts: int, chunks: int, rate: float, call_s: float = CALL_S) -> dict[str, float]:
    """So many hosts, which all want everything, from the client's first byte on."""
    swarm = Swarm(hosts, chunks_of(chunks), rate=rate, call_s=call_s)
    for host in list(swarm.hosts.values()):
        swarm.start(host)
    swarm.upload()
    swarm.run()
    times = [seconds / swarm.limit_s for seconds in swarm.completions_s()]
    return {
        "hosts": hosts,
        "complete": len(times),
        "F/b s": swarm.limit_s,
        "p50": times[len(times) // 2],
        "max": times[-1],
        "client bytes over F": swarm.uploaded_bytes / swarm.wire_bytes,
        "calls": swarm.calls,
        "scheduler s": swarm.deciding_s,
        "scheduler ms per host": 1000 * swarm.deciding_s / hosts,
        "us per call": 1e6 * swarm.deciding_s / swarm.calls,
    }


if __name__ == "__main__":
    wanted = [int(size) for size in sys.argv[1].split(",")] if len(sys.argv) > 1 else SIZES
    for size in wanted:
        row = run_once(size, int(sys.argv[2]) if len(sys.argv) > 2 else 1000, GIGABIT)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
