"""What `benchmarks.spread` measured, as tables on the terminal and as a drawing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AIMS = {
    "p50_over_limit_16": "≤ 1.2",
    "max_over_limit_16": "≤ 1.4",
    "growth_4_to_16": "≤ 1.10",
    "client_bytes_over_F": "≤ 1.02",
    "one_changed_client_bytes_over_chunks": "≤ 1.1",
    "one_changed_wall_s_beyond_limit": "≤ 2",
    "scheduler_lag_p99_ms": "< 50",
    "scheduler_growth_mb": "< 50",
    "task_throughput_kept": "> 0.85",
}
WIDTH, HEIGHT, MARGIN = 720, 420, 60
COLOURS = {"2": "#888888", "4": "#1b9e77", "8": "#d95f02", "16": "#7570b3"}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import distributed

    import envship

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "processor": names[0].partition(": ")[2] if names else platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "distributed": distributed.__version__,
        "envship": envship.__version__,
    }


def print_tables(report: Mapping[str, Any]) -> None:
    """Runs, then metrics with what is aimed at."""
    from envship.cli.tables import console, table

    out = console()
    samples = report["samples"]
    rows = []
    for count, run in samples.get("spread", {}).items():
        over = run["hosts_over_limit"]
        cells = (run["limit_s"], over[len(over) // 2], over[-1], run["load"], run["link_bytes"] / samples["bytes"]["F"])
        rows.append((count, *(f"{cell:.3f}" for cell in cells)))
    heads = ("hosts", "F/b, s", "median over F/b", "slowest over F/b", "load", "client's link over F")
    if rows:
        out.print(table(heads, rows, right=heads))
    if "rivals" in samples:
        unfinished = samples.get("unfinished", ())
        rivals = [
            (name, f"not done after {seconds:.0f}" if name in unfinished else f"{seconds:.1f}")
            for name, seconds in samples["rivals"].items()
        ]
        out.print(table(("4 hosts", "seconds"), rivals, right=("seconds",)))
    for row in samples.get("simulation", ()):
        out.print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    metrics = [
        (name, f"{value:.3f}", AIMS.get(name, "> 1" if name.startswith("ahead_of") else ""))
        for name, value in report["metrics"].items()
    ]
    out.print(table(("metric", "value", "aim"), metrics, right=("value", "aim")))
    out.print(", ".join(f"{name} {value}" for name, value in {**samples["bytes"], **report["machine"]}.items()))


def curves(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Hosts complete over time, in units of F/b, as SVG."""
    last = max(run["hosts_over_limit"][-1] for run in runs.values())
    right = max(1.5, last * 1.05)

    def at(time: float, share: float) -> str:
        x = MARGIN + time / right * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" ',
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<polyline points="{at(0, 1)} {at(0, 0)} {at(right, 0)}" fill="none" stroke="black"/>',
        f'<polyline points="{at(1, 0)} {at(1, 1)}" fill="none" stroke="#cc0000" stroke-dasharray="5 4"/>',
    ]

    def write(time: float, share: float, text: str, anchor: str = "middle", dx: int = 0, dy: int = 0) -> None:
        x, y = (float(number) for number in at(time, share).split(","))
        parts.append(f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{text}</text>')

    for tenth in range(0, int(right * 10) + 1, 2):
        write(tenth / 10, 0, f"{tenth / 10:g}", dy=18)
    for share in (0, 0.25, 0.5, 0.75, 1):
        write(0, share, f"{share:.0%}", "end", dx=-6, dy=4)
    write(1, 1, "F/b: the bytes over one link", dy=-8)
    write(right / 2, 0, "time since the call, in units of F/b", dy=42)
    write(0, 1, "hosts that have every chunk", "start", dx=-40, dy=-28)
    for row, (count, run) in enumerate(runs.items()):
        times = run["hosts_over_limit"]
        points, done = [at(0, 0)], 0.0
        for number, time in enumerate(times, 1):
            points += [at(time, done), at(time, number / len(times))]
            done = number / len(times)
        points.append(at(right, 1))
        colour = COLOURS.get(count, "#333333")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{MARGIN + 24}" y="{MARGIN + 24 + 22 * row}" width="22" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{MARGIN + 54}" y="{MARGIN + 31 + 22 * row}">{count} hosts</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
