"""The benchmarks run, and write the metrics that they are asked for. What these are is not asserted: times vary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import swap

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_swap_benchmark(tmp_path: Path) -> None:
    command = [
        sys.executable,
        CHECKOUT / "benchmarks" / "swap.py",
        "--repetitions",
        "1",
        "--json",
        tmp_path / "figures",
    ]
    environ = {**os.environ, "ENVSHIP_BENCHMARK_VENV": sys.executable}
    printed = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    report = json.loads((tmp_path / "figures").read_text())
    assert set(report["metrics"]) == set(swap.AIMS)
    assert report["metrics"]["noop_bytes"] == 0
    assert all(len(values) == 1 for name, values in report["samples"].items() if "first call" not in name)
    assert "from exec to registered" in printed


@pytest.mark.parametrize("name", ["spread", "pipeline"])
def test_a_benchmark_that_cannot_run_here_says_why(name: str, tmp_path: Path) -> None:
    """Where a program is missing, or the user may not make namespaces."""
    command = [sys.executable, CHECKOUT / "benchmarks" / f"{name}.py"]
    ran = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("skipped: ")
    assert any(reason in ran.stdout for reason in ("root", "not installed: ip", "Linux"))
