"""Large files that are kept while a pack is planned: the chunks that it needs, nothing else, and nobody left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envship.chunking import LIMIT_BYTES
from envship.head_start import HeadStart
from envship.large_files import LARGE_OVER_BYTES
from envship.pack import pack
from worker_bootstrap.store import Store

from .cluster import eventually
from .guard import marked

SLOW = """
import sys
from envship.head_start import HeadStart
from worker_bootstrap.store import Store

with HeadStart(sys.argv[1], (), Store(sys.argv[2])):
    print("started", flush=True)
    sys.stdin.read()
"""


def large(path: Path, seed: int = 0, size_bytes: int = LARGE_OVER_BYTES + 1) -> Path:
    """A file of unlike pieces, mostly holes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for start in range(0, size_bytes, LIMIT_BYTES):
            file.seek(start)
            file.write(f"{seed} {start}".encode())
        file.truncate(size_bytes)
    return path


def chunks(store: Store) -> list[str]:
    return sorted(path.name for path in (store.layout.root / "chunks").rglob("*") if path.is_file())


def at_work(store: Store) -> bool:
    return len(chunks(store)) > 0


def test_what_it_keeps_is_what_the_pack_needs(venv: Path, store: Store, tmp_path: Path) -> None:
    """And a pack that has it packs the same."""
    prefix = tmp_path / "env"
    subprocess.run(["cp", "-a", str(venv), str(prefix)], check=True)
    large(prefix / "share" / "data" / "large.bin")
    large(prefix / "large.bin", seed=1)
    (prefix / "share" / "link.bin").symlink_to("data/large.bin")
    with HeadStart(str(prefix), (), store):
        eventually(lambda: len(chunks(store)) == 18, "both files are kept")
    environment = pack(prefix, store=store)
    needed = set(environment.manifest.chunks)
    assert {name.split(".")[0] for name in chunks(store)} == needed
    assert pack(prefix, store=Store(tmp_path / "other")).id == environment.id


def test_it_passes_over_what_is_no_part_of_the_environment(store: Store, tmp_path: Path) -> None:
    """The package cache of a base environment, links, and what is small enough to be read as a whole."""
    prefix = tmp_path / "env"
    large(prefix / "pkgs" / "cached.bin")
    large(prefix / "lib" / "small.bin", seed=1, size_bytes=LARGE_OVER_BYTES)
    (prefix / "link").symlink_to(tmp_path / "elsewhere")
    large(tmp_path / "elsewhere" / "outside.bin", seed=2)
    large(prefix / "lib" / "pkgs" / "own.bin", seed=3)
    with HeadStart(str(prefix), ("pkgs",), store):
        eventually(lambda: len(chunks(store)) == 9, "one file is kept")
        time.sleep(0.3)
    assert len(chunks(store)) == 9


def test_it_ends_within_a_piece(store: Store, tmp_path: Path) -> None:
    large(tmp_path / "env" / "large.bin", size_bytes=8 << 30)
    with HeadStart(str(tmp_path / "env"), (), store):
        eventually(lambda: at_work(store), "it has begun")
    kept = len(chunks(store))
    time.sleep(0.3)
    assert kept == len(chunks(store)) < 2048
    assert list(store.layout.tmp.iterdir()) == []


@pytest.mark.parametrize("fault", ["no prefix", "no folder for chunks"])
def test_what_goes_wrong_is_for_the_pack_to_tell(
    fault: str, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "no folder for chunks":
        large(tmp_path / "env" / "large.bin")
        shutil.rmtree(store.layout.root / "chunks")
        (store.layout.root / "chunks").touch()
    with HeadStart(str(tmp_path / "env"), (), store):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_it_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    large(tmp_path / "env" / "large.bin", size_bytes=64 << 30)
    mark = f"MARK_OF_A_TEST={tmp_path}"
    command = [sys.executable, "-c", SLOW, tmp_path / "env", store.layout.root]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MARK_OF_A_TEST": str(tmp_path)},
    ) as process:
        eventually(lambda: at_work(store), "it has begun")
        assert len(marked(mark)) == 2
        os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: not marked(mark), "its fork has ended as well", timeout_s=10)
