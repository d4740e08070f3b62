"""Prefixes that change while they are packed, and files that cannot be read: packed again, or refused; no mixture."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import envship
from envship.errors import SourceProblems
from envship.pack import pack
from worker_bootstrap.store import Store

from .contents import contents, package
from .prefixes import clone_of, onlyhere_wheel, small_venv

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
NOBODY = 65534
PAIRS = 40


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with files that belong together: all hold the same text."""
    folder = tmp_path_factory.mktemp("bad")
    made = small_venv(folder / "env", [onlyhere_wheel(folder)])
    (made / "share").mkdir()
    write(made, 0)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("bad-store") / "store")


def write(prefix: Path, number: int) -> None:
    for name in range(PAIRS):
        (prefix / "share" / f"{name:02}").write_text(str(number))


def test_a_prefix_that_changes_once_is_packed_as_it_is_afterwards(prefix: Path, store: Store) -> None:
    """Changed after the walk, before the files are read: some old, some new, if nobody looked."""
    # The second time, it is packed in this process, and told of at once.
    pack(prefix, store=store)
    write(prefix, 7)
    stages = []

    def change(stage: str, done_bytes: int, total_bytes: int) -> None:
        stages.append(stage)
        if stages.count("pack") == 1 and stage == "pack":
            write(prefix, 1)

    environment = pack(prefix, store=store, report=change)
    files = contents(environment, package(environment, "", "files"))
    assert "pack" in stages
    assert {files[f"share/{name:02}"] for name in range(PAIRS)} == {b"1"}


def test_a_prefix_that_goes_on_changing_is_refused(prefix: Path, store: Store) -> None:
    stop = threading.Event()

    def keep_writing() -> None:
        number = 2
        while not stop.is_set():
            write(prefix, number)
            number += 1

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with pytest.raises(SourceProblems) as caught:
            pack(prefix, store=store)
    finally:
        stop.set()
        writer.join()
    assert any("share/" in problem and "changed while it was packed" in problem for problem in caught.value.problems)
    environment = pack(prefix, store=store)
    files = contents(environment, package(environment, "", "files"))
    assert len({files[f"share/{name:02}"] for name in range(PAIRS)}) == 1


AS_NOBODY = """
import os, sys
from pathlib import Path
from envship.pack import pack
from envship.scan_index import rules
from envship.errors import SourceProblems
from worker_bootstrap.store import Store
rules()
# No process of our own interpreter: it may lie where the other user cannot run it.
sys.executable = ""
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    pack(sys.argv[1], store=Store(Path(sys.argv[2])))
except SourceProblems as error:
    print(*error.problems, sep="\\n")
"""


@pytest.mark.heavy
def test_unreadable_folders_and_files_are_named(conda_pair: tuple[Path, Path]) -> None:
    """Root reads everything, so root becomes nobody for this: with an environment whose interpreter nobody may run."""
    code = Path(envship.__file__)
    if os.getuid() == 0 and not all(parent.stat().st_mode & 0o005 == 0o005 for parent in code.parents):
        pytest.skip("nobody may read the code that is tested")
    with tempfile.TemporaryDirectory(prefix="envship-test-nobody-") as name:
        home = Path(name)
        home.chmod(0o755)
        prefix = clone_of(conda_pair[0], home / "env")
        for path in (prefix / "conda-meta").glob("*.json"):
            # Installers write them for their user only; a copy, since those of the clone are hard links.
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        (home / "stores").mkdir()
        if os.getuid() == 0:
            os.chown(home / "stores", NOBODY, NOBODY)
        secrets = [prefix / "share" / "secret", prefix / "share" / "libmini" / "libmini.conf"]
        secrets[0].write_text("x")
        for path in secrets:
            path.chmod(0)
        assert _problems(prefix, home / "stores" / "store") == [
            f"{path.relative_to(prefix)} cannot be read: Permission denied" for path in reversed(secrets)
        ]
        locked = [prefix / "share" / "libmini", prefix / "etc" / "conda"]
        for path in locked:
            path.chmod(0)
        told = _problems(prefix, home / "stores" / "store")
        for path in locked:
            assert f"{path} cannot be read: Permission denied" in told
            path.chmod(0o755)


def _problems(prefix: Path, store: Path) -> list[str]:
    environ = {"PATH": os.defpath, "HOME": str(store.parent)}
    environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", AS_NOBODY, str(prefix), str(store)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
