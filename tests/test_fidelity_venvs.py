"""Venvs of every maker, on every interpreter that this machine has: packed with it, they run without it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from envship.canonical import Own
from envship.pack import pack
from envship.sources.projects import Moved, Tree
from worker_bootstrap.activation import activated
from worker_bootstrap.manifest import File
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER
from worker_bootstrap.store import Store

from .byte_code import compiled, unlike_its_source
from .contents import entries, package
from .interpreters import interpreters, makes_venvs
from .prefixes import clone_of, console_script_wheel, install, onlyhere_wheel, said, small_venv

VERSIONED = f"python{sys.version_info.major}.{sys.version_info.minor}"
SCRIPTS = Path(sysconfig.get_path("scripts"))
LOOK = (
    "import sys, ssl, sqlite3, ctypes, zlib, bz2, lzma, hashlib, onlyhere, sysconfig;"
    "print(sys.prefix, sys.base_prefix, onlyhere.f(1), sep='\\n');"
    "print(*[p for p in sys.path if p and not p.startswith(sys.prefix)])"
)


def by_venv(python: str, prefix: Path) -> None:
    subprocess.run([python, "-m", "venv", "--without-pip", str(prefix)], check=True)


def by_virtualenv(python: str, prefix: Path) -> None:
    options = ["--no-seed", "--no-periodic-update", "--no-vcs-ignore", "-q", "-p", python]
    subprocess.run([SCRIPTS / "virtualenv", *options, str(prefix)], check=True)


def by_uv(python: str, prefix: Path, *options: str) -> None:
    subprocess.run([SCRIPTS / "uv", "venv", "--offline", "-q", *options, "-p", python, str(prefix)], check=True)


MAKERS: dict[str, Callable[[str, Path], None]] = {"venv": by_venv, "virtualenv": by_virtualenv, "uv": by_uv}


def check(prefix: Path, store: Store) -> None:
    """Pack *prefix*, build it, and run it without the interpreter's own folder in sight."""
    environment = pack(prefix, store=store)
    assert package(environment, "python").kind == "python"
    built = materialise(store, environment.id)
    at, base, answer, *outside = said(built / "bin" / "python", "-c", LOOK).splitlines()
    assert at == base == str(built)
    assert answer == "42"
    assert outside in ([], [""])


def test_the_maker_of_a_venv_makes_no_difference(store: Store, tmp_path: Path) -> None:
    ids = {}
    for name, make in MAKERS.items():
        prefix = tmp_path / name / "env"
        make(sys.executable, prefix)
        install(prefix, str(onlyhere_wheel(tmp_path)))
        ids[name] = pack(prefix, store=store).id
    assert len(set(ids.values())) == 1, ids
    check(tmp_path / "uv" / "env", store)


def by_uv_pip(prefix: Path, wheel: Path) -> None:
    options = ["--offline", "-q", "--no-deps", "--cache-dir", str(wheel.parent / "cache"), "-p", str(prefix)]
    subprocess.run([SCRIPTS / "uv", "pip", "install", *options, str(wheel)], check=True)


@pytest.mark.heavy
def test_the_installer_makes_no_difference(store: Store, tmp_path: Path) -> None:
    """uv hard-links from its cache, writes another INSTALLER, another RECORD and other scripts; so does a long path."""
    wheel = console_script_wheel(tmp_path)
    far = tmp_path / ("long-" * 20) / "with a space"
    prefixes = {"pip": tmp_path / "pip", "python -m pip": far / "pip", "uv": far / "uv"}
    for name, prefix in prefixes.items():
        by_uv(sys.executable, prefix)
        if name.startswith("uv"):
            by_uv_pip(prefix, wheel)
        else:
            install(prefix, str(wheel), python=VERSIONED if name == "pip" else "python")
    scripts = [(prefix / "bin" / "where").read_text().replace(str(prefix), "") for prefix in prefixes.values()]
    assert len(set(scripts)) == len(prefixes), "each writes its own"
    ids = {name: pack(prefix, store=store).id for name, prefix in prefixes.items()}
    assert len(set(ids.values())) == 1, ids
    built = materialise(Store(far / "store", [store.layout.root]), ids["uv"])
    assert len(str(built)) > 127
    assert said(built / "bin" / "where") == str(built)


def test_packages_of_the_users_home_do_not_come_before_those_of_a_venv(
    venv: Path, shared_store: Store, tmp_path: Path
) -> None:
    user_site = tmp_path / ".local" / "lib" / VERSIONED / "site-packages"
    user_site.mkdir(parents=True)
    (user_site / "onlyhere.py").write_text("def f(x):\n    return 'of the user'\n")
    environment = pack(venv, store=shared_store)
    built = materialise(shared_store, environment.id)
    before = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    variables = activated(before, str(built), environment.manifest.environ, base_prefixes=[sys.prefix])
    code = "import onlyhere; print(onlyhere.f(1))"
    # Without the variable, the environment, which has no pyvenv.cfg, sees what its source does not.
    assert said(built / "bin" / "python", "-c", code, **before) == "of the user"
    assert said(venv / "bin" / "python", "-c", code, **before) == "42"
    assert said(built / "bin" / "python", "-c", code, **variables) == "42"


MODULES = (
    "import importlib.util, sys; names = {*sys.stdlib_module_names, 'test', 'idlelib', 'turtledemo'};"
    "print(*sorted(name for name in names if importlib.util.find_spec(name)))"
)


def test_the_standard_library_is_that_of_the_venv_but_for_what_the_readme_says(venv: Path, shared_store: Store) -> None:
    built = materialise(shared_store, pack(venv, store=shared_store).id)
    here, there = (set(said(prefix / "bin" / "python", "-c", MODULES).split()) for prefix in (venv, built))
    assert "ensurepip" in here
    assert here - there <= {"idlelib", "turtledemo", "test"}
    assert there <= here
    modules = [name for name in ("ensurepip", "tkinter", "_tkinter") if name in here]
    said(built / "bin" / "python", "-c", f"import {', '.join(modules)}")


@pytest.mark.parametrize("of_venv", [True, False])
def test_a_project_below_the_folder_of_the_interpreter_comes_along(
    venv: Path, shared_store: Store, store: Store, tmp_path: Path, of_venv: bool
) -> None:
    """As one in ``/usr/local/src`` with the system's: of the interpreter's folder, only its own parts go along."""
    base = tmp_path / "base"
    shutil.copytree(materialise(shared_store, pack(venv, store=shared_store).id), base, symlinks=True)
    package = base / "src" / "project" / "viabase"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n")
    prefix = base
    if of_venv:
        prefix = tmp_path / "env"
        by_venv(str(base / "bin" / "python"), prefix)
    path_file = prefix / "lib" / VERSIONED / "site-packages" / "mine.pth"
    path_file.write_text(f"{package.parent}\n/usr/share/else\n")
    built = materialise(store, pack(prefix, store=store).id)
    shutil.rmtree(base)
    place = f"{built}/share/envship/projects/mine"
    assert (
        said(built / "bin" / "python", "-c", "import viabase; print(viabase.__file__)")
        == f"{place}/viabase/__init__.py"
    )
    moved = built / path_file.relative_to(prefix)
    assert moved.read_text() == f"{place}\n/usr/share/else\n"


def test_a_venv_of_condas_interpreter_is_the_same_wherever_conda_put_it(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """What conda recorded of the interpreter's files holds in a venv; the certificates of its OpenSSL come along."""
    environments = {}
    for number, original in enumerate(conda_pair):
        base = clone_of(original, tmp_path / f"base-{'x' * number}")
        (base / "ssl").mkdir()
        (base / "ssl" / "cert.pem").write_text("certificates")
        by_venv(str(base / "bin" / "python"), tmp_path / "env")
        environment = pack(tmp_path / "env", store=store)
        environments[environment.id] = environment
        shutil.rmtree(base)
        shutil.rmtree(tmp_path / "env")
    (environment,) = environments.values()
    files = [each for each in entries(environment, package(environment, "python")).values() if isinstance(each, File)]
    assert any(file.relocation and len(file.relocation.placeholder) == 255 for file in files), "as conda recorded it"
    built = materialise(store, environment.id)
    assert (built / "ssl" / "cert.pem").read_text() == "certificates"
    code = "import sysconfig, sys; print(sysconfig.get_config_var('LIBDIR'), sys.prefix)"
    assert said(built / "bin" / "python", "-c", code) == f"{built}/lib {built}"


def test_of_the_systems_folder_only_what_is_in_a_project_moves() -> None:
    own = Own(("/home/me/env", "/usr"), "lib/x.pth")
    moved = Moved((Tree("/usr/src/mine", "share/mine"),), own)
    text = b"/usr/src/mine/src /usr/share/else /home/me/env/lib"
    assert moved(text).data == f"{PLACEHOLDER}/share/mine/src /usr/share/else {PLACEHOLDER}/lib".encode()


@pytest.mark.parametrize("name", [name for name in interpreters() if name.startswith("system")])
def test_packages_of_the_system_come_along_and_are_said(
    store: Store, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where distributions list files that they do not install, as Debian's do: they are not ours to mend."""
    prefix = tmp_path / "env"
    by_uv(interpreters()[name], prefix, "--system-site-packages")
    look = "from importlib.metadata import distributions as d; print(*sorted({x.metadata['Name'] for x in d()}))"
    expected = said(prefix / "bin" / "python", "-c", look)
    with caplog.at_level(logging.WARNING, "envship"):
        environment = pack(prefix, store=store)
    lines = [record.getMessage() for record in caplog.records if "packages of its interpreter" in record.getMessage()]
    assert len(lines) == (1 if any(p.kind == "pypi" for p in environment.packages) else 0)
    assert said(materialise(store, environment.id) / "bin" / "python", "-c", look) == expected


@pytest.mark.parametrize("name", interpreters())
@pytest.mark.heavy
def test_venvs_of_other_interpreters_run_where_these_are_not(store: Store, tmp_path: Path, name: str) -> None:
    python = interpreters()[name]
    makers = [make for maker, make in MAKERS.items() if maker != "venv" or makes_venvs(python)]
    for number, make in enumerate(makers):
        prefix = tmp_path / str(number)
        make(python, prefix)
        install(prefix, str(onlyhere_wheel(tmp_path)))
        check(prefix, store)
        shutil.rmtree(prefix)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_importing_what_people_import_compiles_nothing(store: Store, tmp_path: Path) -> None:
    """distributed, numpy and pandas, from the index; the interpreter's own account of what it compiles."""
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / "python"), "install", "-q"]
    subprocess.run([*pip, "distributed", "numpy", "pandas"], check=True)
    # Made again wherever they were: the times of a source that is read-only, or was copied, fit nothing.
    for path in prefix.rglob("*.py"):
        os.utime(path, (1, 1))
    built = materialise(store, pack(prefix, store=store).id)
    assert compiled(built / "bin" / "python", "distributed", "numpy", "pandas", HOME=str(tmp_path)) == []
    assert unlike_its_source(built) == []


def test_a_kernel_of_jupyter_starts_the_interpreter_of_its_environment_whatever_the_prefix_is_called(
    store: Store, tmp_path: Path
) -> None:
    """What JSON, and a URL, make of a name that is not ASCII is the name of the prefix, too."""
    place, ids = "share/jupyter/kernels/python3/kernel.json", set()
    for name in ("plain", "zoë env"):
        prefix = small_venv(tmp_path / name, [])
        (prefix / place).parent.mkdir(parents=True)
        (prefix / place).write_text(json.dumps({"argv": [str(prefix / "bin" / "python"), "-m", "ipykernel_launcher"]}))
        (prefix / "share" / "address").write_text((prefix / "it").as_uri())
        ids.add(pack(prefix, store=store).id)
    assert len(ids) == 1
    built = materialise(store, *ids)
    assert (built / "share" / "address").read_text() == (built / "it").as_uri()
    assert json.loads((built / place).read_text())["argv"][0] == str(built / "bin" / "python")


def test_a_prefix_whose_path_is_no_text_is_packed(store: Store, tmp_path: Path) -> None:
    prefix = small_venv(tmp_path / "made", []).rename(tmp_path / os.fsdecode(b"e\xff"))
    (prefix / "share").mkdir(exist_ok=True)
    (prefix / "share" / "address").write_text(prefix.as_uri())
    built = materialise(store, pack(prefix, store=store).id)
    assert (built / "share" / "address").read_text() == built.as_uri()
