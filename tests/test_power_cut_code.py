"""What a power cut leaves of the byte code of ours that the first interpreter to start from a store makes there."""

from __future__ import annotations

import marshal
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker_bootstrap import quick_import

from .filesystems import in_memory
from .replay import KEEPS, REPLAY_MARKS, SYNCS, Call, Disk, record, without

pytestmark = REPLAY_MARKS

SOURCES = Path(quick_import.__file__).parent
PROGRAM = f"""
import sys
sys.dont_write_bytecode = True
sys.path.insert(0, {str(SOURCES.parent)!r})
from worker_bootstrap.quick_import import compile_ours
compile_ours(sys.argv[1])
"""
CUTS = 150


class Run:
    """A recorded run of `PROGRAM` on the code in *root*, which was as in *start*."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, folder / "start"
        root = folder / "root"
        package = root / "worker_bootstrap"
        package.mkdir(parents=True)
        for name in ("__init__.py", "digest.py", "sizes.py", "store.py"):
            shutil.copy(SOURCES / name, package)
        subprocess.run(["cp", "-a", root, self.start], check=True)
        self.calls = record(PROGRAM, str(root), trace=folder / "trace")
        self.written = {path.name: path.read_bytes() for path in package.glob("__pycache__/*.pyc")}

    def damaged(self, calls: list[Call], seed: int) -> Iterator[str]:
        """What is there after a power cut somewhere in *calls*, or after them, and is not what had been written."""
        chance = random.Random(seed)
        for number in range(CUTS):
            disk = Disk(self.folder / "root", self.start)
            disk.replay(calls[: chance.randrange(len(calls) + 1)] if number % 4 else calls)
            after = self.folder / "after"
            disk.crash(after, chance, chance.choice(KEEPS))
            for path in after.rglob("*.pyc"):
                if path.read_bytes() != self.written[path.name]:
                    yield path.name
            shutil.rmtree(after)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with in_memory(tmp_path_factory.mktemp("recorded")) as folder:
        yield Run(folder)


def test_a_power_cut_leaves_byte_code_whole_or_none(run: Run) -> None:
    assert len(run.written) == 4
    for content in run.written.values():
        marshal.loads(content[quick_import.HEADER_BYTES :])
    assert list(run.damaged(run.calls, seed=1)) == []


def test_without_the_fsyncs_byte_code_of_ours_is_torn(run: Run) -> None:
    calls = without(run.calls, lambda call: call.name in SYNCS)
    assert len(calls) < len(run.calls)
    assert next(run.damaged(calls, seed=2), None) is not None
