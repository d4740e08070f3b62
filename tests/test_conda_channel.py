"""Environments from a real conda channel, where `prefixes.CHANNEL` is one.

It has to hold ``python``, ``numpy`` and ``distributed``. Everything that these tests look at is also looked at with the
packages that `conda_packages` makes; here it is with compiled ones that others built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import conda_pack
import pytest

from envship.environment import Environment
from envship.pack import pack
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .byte_code import compiled
from .contents import all_entries
from .prefixes import CHANNEL, NEEDS_CHANNEL, clone_of, conda_environments, said

AUTHORITY = Path(__file__).parent / "tls" / "cert.pem"
SPECS = ("python 3.11.*", "numpy", "distributed", "importlib-metadata")
IMPORTS = """
import sys
sys.dont_write_bytecode = True
import numpy, sqlite3, ssl
here = sys.prefix
assert numpy.__file__.startswith(here) and ssl.__file__.startswith(here)
assert ssl.get_default_verify_paths().openssl_cafile.startswith(here), ssl.get_default_verify_paths()
print(numpy.arange(4).sum())
"""

pytestmark = [
    pytest.mark.timeout(600),
    NEEDS_CHANNEL,
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same packages at two prefixes, of unlike length."""
    pytest.importorskip("rattler")
    folder = tmp_path_factory.mktemp("channel")
    prefixes = folder / "env", folder / "at" / "a-longer-path" / "environment"
    conda_environments(folder, *prefixes, channel=CHANNEL, specs=SPECS)
    return prefixes


@pytest.fixture(scope="module")
def packed(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return pack(pair[0], store=Store(tmp_path_factory.mktemp("packed") / "store"))


@pytest.mark.heavy
def test_the_same_packages_at_two_prefixes_are_one_environment(pair: tuple[Path, Path], packed: Environment) -> None:
    assert pack(pair[1], store=packed.store).id == packed.id


@pytest.mark.heavy
def test_what_is_packed_is_what_conda_pack_would_pack(pair: tuple[Path, Path], packed: Environment) -> None:
    theirs = {file.target for file in conda_pack.CondaEnv.from_prefix(str(pair[0])).files}
    ours = set(all_entries(packed))
    traces = re.compile(r".*\.pyc|conda-meta/history|CACHEDIR\.TAG|.*\.dist-info/REQUESTED")
    assert {path for path in theirs - ours if not traces.fullmatch(path)} == set()
    assert {path for path in ours - theirs if not path.endswith(".pyc")} == set()


def test_it_runs_at_another_path(packed: Environment, tmp_path: Path) -> None:
    """Libraries find each other and their data there: binary prefixes are relocated. Nothing is compiled."""
    store = Store(tmp_path / "a-store-with-quite-a-long-name", [packed.store.layout.root])
    prefix = materialise(store, packed.id)
    assert said(prefix / "bin" / "python", "-I", "-c", IMPORTS) == "6"
    assert list(damaged_files(store, packed.id)) == []
    assert compiled(prefix / "bin" / "python", "distributed", "numpy") == []


VENV = """
import bz2, ctypes, lzma, readline, sqlite3, ssl, sys, zlib
print(ssl.create_default_context().cert_store_stats()["x509_ca"], ssl.get_default_verify_paths().openssl_cafile)
with open("/proc/self/maps") as maps:
    names = {line.split(None, 5)[5].strip() for line in maps if ".so" in line}
print(*sorted(name for name in names if name.rpartition("/")[2].startswith(LIBRARIES)))
"""


@pytest.mark.heavy
def test_a_venv_of_condas_interpreter_has_its_libraries_and_its_certificates(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every library that came with the interpreter is found where the environment is built, by the name asked for."""
    base = clone_of(pair[0], tmp_path / "base")
    shutil.copy(AUTHORITY, base / "ssl" / "cert.pem")
    subprocess.run([base / "bin" / "python", "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    store = Store(tmp_path / "a-store-with-quite-a-long-name")
    built = materialise(store, pack(tmp_path / "env", store=store).id)
    shutil.rmtree(base)
    libraries = ("libssl", "libcrypto", "libz.", "liblzma", "libbz2", "libffi", "libsqlite3", "libreadline")
    code = VENV.replace("LIBRARIES", repr(libraries))
    certificates, *names = said(built / "bin" / "python", "-I", "-c", code).splitlines()
    assert certificates == f"1 {built}/ssl/cert.pem"
    found = names[0].split()
    assert len(found) == len(libraries) and all(name.startswith(f"{built}/lib/") for name in found), found
