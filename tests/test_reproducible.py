"""The same packages have the same id: whoever installed them where and when, and whatever surrounds the pack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import envship
from envship.pack import pack
from worker_bootstrap.store import Store

from .contents import contents, package
from .prefixes import clone_of, console_script_wheel, install

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
NOBODY = 65534

PACK = """
import os, sys
from pathlib import Path
uid = int(sys.argv[3])
real_scandir = os.scandir
class Backwards:
    # The same entries in another order, as another file system has them.
    def __init__(self, path):
        with real_scandir(path) as entries:
            self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __iter__(self): return self.entries
    def __next__(self): return next(self.entries)
os.scandir = Backwards
from envship.pack import pack
from envship.scan_index import rules
from worker_bootstrap.store import Store
rules()
# No process of our own interpreter: it may lie where the other user cannot run it.
sys.executable = ""
os.umask(0o077)
if uid >= 0:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
os.environ["HOME"] = os.path.dirname(sys.argv[2])
if __name__ == "__main__":
    print(pack(sys.argv[1], store=Store(Path(sys.argv[2]))).id)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="envship-test-users-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def other_user() -> int:
    """The id of another user, where we may become one and the code can be read by one; else -1."""
    code = Path(envship.__file__)
    is_open = all(parent.stat().st_mode & 0o005 == 0o005 for parent in code.parents)
    return NOBODY if os.getuid() == 0 and is_open else -1


def furnish(prefix: Path, folder: Path, python: str = "python") -> Path:
    """What pip, run in *python*, and the user add to the conda packages at *prefix*."""
    install(prefix, str(console_script_wheel(folder)), python=python)
    notes = prefix / "share" / "naïve notes.txt"
    notes.write_text(f"kept in {prefix}\n", encoding="utf-8")
    (prefix / "share" / "ünlink").symlink_to(notes)
    (prefix / SITE / "ümod.py").write_text("VALUE = 'ü'\n", encoding="utf-8")
    return prefix


def test_two_users_on_two_days_at_two_prefixes_pack_one_environment(
    conda_pair: tuple[Path, Path], home: Path, store: Store
) -> None:
    """Conda and pip mixed; another user, umask, locale, hash seed, order of folders; other times, no byte code.

    One calls pip as ``bin/pip``, the other as ``python -m pip``, at a path too long for the first line of a script.
    """
    mine = furnish(clone_of(conda_pair[0], home / "me" / "env"), home / "me")
    before = os.umask(0o077)
    try:
        there = home / "another-user" / "envs" / ("of-a-long-name-" * 7) / "analysis"
        theirs = furnish(clone_of(conda_pair[1], there), home / "another-user", f"python3.{sys.version_info.minor}")
    finally:
        os.umask(before)
    user = other_user()
    their_store = home / "another-user" / "store"
    their_store.mkdir(mode=0o700)
    for path in (home / "another-user", *(home / "another-user").rglob("*")):
        if not path.is_symlink():
            # Not through hard links into the first environment.
            if path.is_file() and path.stat().st_nlink > 1:
                data, mode = path.read_bytes(), path.stat().st_mode
                path.unlink()
                path.write_bytes(data)
                path.chmod(mode & 0o700)
            os.utime(path, (1_000_000_000, 1_000_000_000))
        if user >= 0:
            os.chown(path, user, user, follow_symlinks=False)
    # Byte code that an installer made, as it does or does not; not that which is part of a package.
    for path in theirs.rglob("*.pyc"):
        if path.name.startswith("onlyhere.") or "mininoarch" in path.parts:
            path.unlink()
    packed = printed_oddly("-c", PACK, theirs, their_store, user)
    environment = pack(mine, store=store)
    assert packed == environment.id
    cached = f"{SITE}/__pycache__/ümod.{sys.implementation.cache_tag}.pyc"
    assert b"VALUE" in contents(environment, package(environment, "", "files"))[cached]
    # By several processes, as users do.
    told = printed_oddly("-m", "envship.cli", "pack", mine, "--store", home / "me" / "other-store", "--json")
    assert json.loads(told)["id"] == environment.id


def printed_oddly(*arguments: object) -> str:
    """What our interpreter prints where language, hash seed and the like are not those of most users."""
    odd = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.defpath}
    odd["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**odd, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
