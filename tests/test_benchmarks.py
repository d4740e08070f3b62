"""The benchmarks run, and write the metrics that they are asked for. What these are is not asserted: times vary."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import environments, held_memory, swap

from .cluster import Prefixes
from .prefixes import clone_of, install, onlyhere_wheel

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


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_first_swap_benchmark(tmp_path: Path, prefixes: Prefixes) -> None:
    arguments = [
        prefixes.base,
        prefixes.mine,
        "--module",
        "onlyhere",
        "--repetitions",
        "1",
        "--json",
        tmp_path / "figures",
    ]
    command = [sys.executable, CHECKOUT / "benchmarks" / "first_swap.py", *arguments]
    environ = {**os.environ, "ENVSHIP_BENCHMARK_VENV": sys.executable}
    printed = subprocess.run([*map(str, command)], env=environ, check=True, capture_output=True, text=True).stdout
    metrics = json.loads((tmp_path / "figures").read_text())["metrics"]
    assert metrics["first_bytes"] > 0
    assert metrics["noop_bytes"] == metrics["back_bytes"] == metrics["again_bytes"] == 0
    assert "unknown to the cluster" in printed


@pytest.fixture(scope="module")
def changed_pair(conda_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small conda environment, and a clone of it with one package more."""
    folder = tmp_path_factory.mktemp("changed")
    clone = clone_of(conda_pair[0], folder / "env")
    install(clone, str(onlyhere_wheel(folder)))
    return conda_pair[0], clone


def metrics_of(tmp_path: Path, script: str, *arguments: object) -> dict[str, float]:
    """What a benchmark writes as metrics; it prints a table of them, too."""
    command = [sys.executable, CHECKOUT / "benchmarks" / script, *arguments, "--json", tmp_path / "figures"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics: dict[str, float] = json.loads((tmp_path / "figures").read_text())["metrics"]
    assert all(name in done.stdout for name in metrics)
    return metrics


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_benchmark_of_building(changed_pair: tuple[Path, Path], tmp_path: Path) -> None:
    measured = metrics_of(tmp_path, "materialise.py", *changed_pair, "--repetitions", 1, "--hold", 0)
    by_rivals = {"cold_over_tar", "shared_over_rattler", "shared_over_uv"}  # what is not installed is left out
    assert set(measured) - by_rivals == {"cold_over_floor", "shared_over_floor", "found_ms", "peak_mb"}
    assert all(value > 0 for value in measured.values())


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_benchmark_of_packing(changed_pair: tuple[Path, Path], tmp_path: Path) -> None:
    measured = metrics_of(tmp_path, "pack.py", changed_pair[0], "--repetitions", 1)
    assert set(measured) == {
        "cold_over_conda_pack",
        "cold_over_floor",
        "unchanged_over_walk",
        "one_changed_over_unchanged",
        "one_changed_bytes_over_package",
        "peak_mb",
        "store_over_tar_zst",
    }
    assert all(value > 0 for value in measured.values())


def test_what_is_measured_where_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSHIP_CONDA_LAB", str(tmp_path))
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    for script in ("pack", "materialise"):
        ran = subprocess.run([sys.executable, CHECKOUT / "benchmarks" / f"{script}.py"], capture_output=True, text=True)
        assert ran.returncode == 1 and ran.stderr.startswith("name a conda environment")
    monkeypatch.setenv("CONDA_PREFIX", "/active")
    assert environments.prefixes(None, None) == (Path("/active"), None)
    (tmp_path / "envs" / "big311" / "conda-meta").mkdir(parents=True)
    assert environments.prefixes(None, None) == (tmp_path / "envs" / "big311", None)
    (tmp_path / "envs" / "big311b" / "conda-meta").mkdir(parents=True)
    assert environments.prefixes(None, None) == (tmp_path / "envs" / "big311", tmp_path / "envs" / "big311b")
    assert environments.prefixes(tmp_path, None) == (tmp_path, None)


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="a matter of Linux")
def test_memory_is_held_page_by_page(tmp_path: Path) -> None:
    features = tmp_path / "virtio0" / "features"
    features.parent.mkdir()
    for bits, expected in (("0110010100", True), ("0110000100", False), ("", False)):
        features.write_text(bits)
        assert held_memory.gives_back(tmp_path) is expected
    before = psutil.Process().memory_info().rss
    with held_memory.held(64 << 20) as held_bytes:
        assert held_bytes == 64 << 20
        assert psutil.Process().memory_info().rss - before < 16 << 20, "nearly all of it is free again"


@pytest.mark.parametrize("name", ["spread", "pipeline"])
def test_a_benchmark_that_cannot_run_here_says_why(name: str, tmp_path: Path) -> None:
    """Where a program is missing, or the user may not make namespaces."""
    command = [sys.executable, CHECKOUT / "benchmarks" / f"{name}.py"]
    ran = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("skipped: ")
    assert any(reason in ran.stdout for reason in ("root", "not installed: ip", "Linux"))
