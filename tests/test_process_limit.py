"""Users who may not start as many processes as a pack wants: on a login node, in a container."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from worker_bootstrap import process_limit
from worker_bootstrap.build import STUB
from worker_bootstrap.errors import ProcessLimitReached
from worker_bootstrap.materialise import read_error
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .environments import tiny_environment

CODE = str(Path(process_limit.__file__).parents[1])
USER = 54321
"""Somebody who has no other process."""
PACK = """
import sys
from pathlib import Path
from envship.pack import pack
from worker_bootstrap.errors import ProcessLimitReached
from worker_bootstrap.store import Store
try:
    pack(sys.argv[1], store=Store(Path(sys.argv[2])))
    print("packed")
except ProcessLimitReached as error:
    print(error)
"""
CAPABILITIES = "+dac_override,+dac_read_search"
"""The code that is tested may lie where only root reads; that is not what this is about."""


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder of that user's, where she can reach it."""
    with tempfile.TemporaryDirectory(prefix="envship-test-limit-") as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "own"
        folder.mkdir()
        os.chown(folder, USER, USER)
        yield folder


needs_another_user = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None or shutil.which("prlimit") is None,
    reason="only root can act as a user who has no process; needs util-linux",
)


def as_user(home: Path, limit: int, program: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """Run *program* as a user who may have *limit* processes and threads."""
    command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    command += [f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}"]
    command += ["prlimit", f"--nproc={limit}:{limit}", *program]
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environ, **how
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        out, errors = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@needs_another_user
@pytest.mark.heavy
def test_a_pack_that_may_start_few_processes_says_so_or_works(venv: Path, own: Path) -> None:
    outcomes = []
    for limit in (1, 4, 5, 6, 7, 8, 64):
        store = own / f"store-{limit}"
        done = as_user(own, limit, [sys.executable, "-c", PACK, str(venv), str(store)])
        assert done.returncode == 0, (limit, done.stderr)
        assert "Traceback" not in done.stderr, (limit, done.stderr)
        assert bool(Store(store).environments()) == (done.stdout == "packed\n"), (limit, done.stdout)
        outcomes.append(done.stdout)
    assert outcomes[-1] == "packed\n"
    refused = [text for text in outcomes if text != "packed\n"]
    assert len(refused) >= 3
    for text in refused:
        assert text.startswith("no further process or thread can be started on ")
        assert "ulimit -u" in text


@needs_another_user
def test_a_build_that_may_start_few_processes_works_with_fewer(own: Path) -> None:
    store = Store(own / "store")
    files = {f"lib/{i:04}": b"%d" % i * 50 for i in range(300)}
    environment_id = tiny_environment(store, {**files, "bin/tool*": b"#!/bin/sh\necho it runs\n"}, 1000)
    for path in (own / "store", *(own / "store").rglob("*")):
        os.chown(path, USER, USER)
    said = []
    for limit in (1, 2, 3, 64):
        program = [sys.executable, "-B", "-c", STUB, CODE, str(own / "store"), environment_id]
        done = as_user(own, limit, program, stdin=subprocess.PIPE)
        said.append(json.loads(done.stdout.splitlines()[-1]))
        if "prefix" in said[-1]:
            prefix = Path(said[-1]["prefix"])
            assert list(damaged_files(store, environment_id)) == []
            store.layout.ready(environment_id).unlink()
            shutil.rmtree(prefix)
    assert read_error(said[0]["error"]).values[1] == "can't start new thread"
    assert all("prefix" in each for each in said[1:]), said


def test_other_errors_are_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), process_limit.named():
        raise RuntimeError("something else")
    with pytest.raises(ProcessLimitReached, match="can't start new thread"), process_limit.named():
        raise RuntimeError("can't start new thread")
