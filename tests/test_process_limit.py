"""Users who may not start as many processes as a pack wants: on a login node, in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from envship import process_limit
from worker_bootstrap.errors import ProcessLimitReached
from worker_bootstrap.store import Store

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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as a user who has no process")
@pytest.mark.skipif(shutil.which("setpriv") is None or shutil.which("prlimit") is None, reason="needs util-linux")
def test_a_pack_that_may_start_few_processes_says_so_or_works(venv: Path, own: Path) -> None:
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    user += [f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}"]
    outcomes = []
    for limit in (1, 4, 5, 6, 7, 8, 64):
        store = own / f"store-{limit}"
        command = [*user, "prlimit", f"--nproc={limit}:{limit}", sys.executable, "-c", PACK, str(venv), str(store)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "HOME": str(own), "OPENBLAS_NUM_THREADS": "1"},
        )
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


def test_other_errors_are_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), process_limit.named():
        raise RuntimeError("something else")
    with pytest.raises(ProcessLimitReached, match="can't start new thread"), process_limit.named():
        raise RuntimeError("can't start new thread")
