"""Bytes that nobody wrote on purpose, given to every reader; at length under the marker ``heavy``.

Each reader runs in a process of its own that may take a gigabyte and 20 seconds for an example (`tests.fuzzed`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzzing
from tests.fuzzed import BEYOND, TARGETS, seeds

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE_S = 20
"""Each takes some milliseconds."""
LENGTHS = [60, pytest.param(2_000, marks=[pytest.mark.heavy, pytest.mark.timeout(900)])]

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


def fuzzed(folder: Path, name: str, count: int, example_s: float) -> subprocess.CompletedProcess[str]:
    """A run of `tests.fuzzed`, whose temporary files lie in *folder*."""
    command = [sys.executable, "-m", "tests.fuzzed", name, str(count), str(example_s)]
    environ = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT, env=environ)


@needs_proc
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("count", LENGTHS, ids=lambda count: f"{count} examples")
def test_any_input_is_read_or_refused_in_bounded_time_and_memory(tmp_path: Path, name: str, count: int) -> None:
    done = fuzzed(tmp_path, name, count, EXAMPLE_S)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_proc
@pytest.mark.parametrize(("name", "said"), [("greedy", "MemoryError"), ("endless", "TooLong"), ("deaf", "Timeout")])
def test_what_goes_beyond_the_limits_is_found(tmp_path: Path, name: str, said: str) -> None:
    assert name in BEYOND
    done = fuzzed(tmp_path, name, 1, 0.2)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "runs"), [("manifest", 200_000), ("listing", 200_000), ("chunk", 200_000), ("bundle", 2_000)]
)
def test_a_coverage_guided_fuzzer_finds_nothing(tmp_path: Path, name: str, runs: int) -> None:
    pytest.importorskip("atheris")
    assert name in fuzzing.TARGETS
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(data)
    limits = [f"-runs={runs}", "-rss_limit_mb=1024", f"-timeout={EXAMPLE_S}", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, CHECKOUT / "tests/fuzz/coverage_guided.py", name, corpus, *limits]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"Done {runs} runs" in done.stderr
