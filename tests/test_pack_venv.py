"""Packing venvs: identity, the interpreter inside, pip's packages."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envship.errors import NotAnEnvironment, SourceProblems
from envship.options import PackOptions
from envship.pack import pack
from worker_bootstrap.manifest import File, Link
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER
from worker_bootstrap.store import Store

from .contents import all_entries, contents, entries, package
from .elf_files import elf_file
from .prefixes import install, onlyhere_wheel, small_venv

SHORT = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{SHORT}/site-packages"


@pytest.mark.heavy
def test_the_same_packages_in_two_venvs_are_the_same_environment(
    venv: Path, shared_store: Store, store: Store, tmp_path: Path
) -> None:
    """At another path, at another time, without byte code on disk, in a store that knows nothing."""
    other = small_venv(tmp_path / "a-much-longer-path" / "to" / "env", [onlyhere_wheel(tmp_path)], "--no-compile")
    for path in other.rglob("*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert not list(other.rglob("*.pyc"))
    assert pack(venv, store=shared_store).id == pack(other, store=store).id


@pytest.mark.heavy
def test_another_version_is_another_environment(venv: Path, shared_store: Store, tmp_path: Path) -> None:
    other = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path, "1.1")])
    one, two = pack(venv, store=shared_store), pack(other, store=shared_store)
    assert one.id != two.id
    assert package(one, "python") == package(two, "python")


def test_the_built_prefix_needs_no_other_interpreter(venv: Path, shared_store: Store) -> None:
    """What the process has mapped and would import from lies in the prefix, or belongs to the system."""
    environment = pack(venv, store=shared_store)
    prefix = materialise(shared_store, environment.id)
    script = (
        "import sys, ssl, ctypes, onlyhere; print(sys.prefix, sys.base_prefix, onlyhere.f(1)); print(*sys.path[1:]);"
        "print(*{l.split()[-1] for l in open('/proc/self/maps') if '/' in l})"
    )
    said = subprocess.run(
        [prefix / "bin" / "python", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    first, path, mapped = said.stdout.decode().splitlines()
    assert first == f"{prefix} {prefix} 42"
    assert all(entry.startswith(f"{prefix}/") for entry in path.split())
    outside = [name for name in mapped.split() if not name.startswith((f"{prefix}/", "/usr/lib", "/lib", "/dev/"))]
    assert outside == []
    assert not (prefix / "pyvenv.cfg").exists()


def test_scripts_run_from_the_built_prefix(venv: Path, shared_store: Store, tmp_path: Path) -> None:
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    script = mine / "bin" / "where"
    script.write_text(f"#!{mine}/bin/python\nimport sys; print(sys.executable)\n")
    script.chmod(0o755)
    environment = pack(mine, store=shared_store)
    entry = entries(environment, package(environment, "", "files"))["bin/where"]
    assert isinstance(entry, File)
    assert (entry.executable, entry.relocation) == (True, ("text", PLACEHOLDER))
    prefix = materialise(shared_store, environment.id)
    said = subprocess.run([prefix / "bin" / "where"], env={"PATH": "/bin"}, capture_output=True, check=True)
    assert said.stdout.decode().strip() == f"{prefix}/bin/python"


def test_importing_from_the_built_prefix_writes_no_byte_code(venv: Path, shared_store: Store) -> None:
    prefix = materialise(shared_store, pack(venv, store=shared_store).id)
    before = set(prefix.rglob("*.pyc"))
    modules = "onlyhere, asyncio, json, http.client, email, xml.dom.minidom, multiprocessing.pool, unittest"
    subprocess.run([prefix / "bin" / "python", "-c", f"import {modules}"], env={"PATH": "/bin"}, check=True)
    assert set(prefix.rglob("*.pyc")) == before


def test_what_makes_a_folder_a_venv_is_left_out(venv: Path, shared_store: Store) -> None:
    paths = all_entries(pack(venv, store=shared_store))
    assert isinstance(paths["bin/python"], Link)
    assert isinstance(paths[f"bin/python{SHORT}"], File)
    assert not paths.keys() & {"pyvenv.cfg", "bin/activate", "bin/Activate.ps1", "lib64"}
    assert not any(path.endswith(".a") or path.startswith(f"lib/python{SHORT}/test/") for path in paths)


def test_records_of_pip_say_nothing_of_machine_and_prefix(venv: Path, shared_store: Store) -> None:
    environment = pack(venv, store=shared_store)
    files = contents(environment, package(environment, "onlyhere"))
    info = f"{SITE}/onlyhere-1.0.dist-info"
    assert f"{info}/REQUESTED" not in files
    assert b"pyc" not in files[f"{info}/RECORD"]
    assert f"{info}/RECORD,," in f"{SITE}/" + files[f"{info}/RECORD"].decode().replace("\n", f"\n{SITE}/")
    assert json.loads((venv / info / "direct_url.json").read_bytes())["url"].startswith(venv.parent.as_uri())
    assert json.loads(files[f"{info}/direct_url.json"]) == {"url": "file:///", "archive_info": {}}
    assert f"{SITE}/__pycache__/onlyhere.{sys.implementation.cache_tag}.pyc" in files


def test_a_missing_file_of_a_package_is_named(store: Store, tmp_path: Path) -> None:
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    (mine / SITE / "onlyhere.py").unlink()
    with pytest.raises(SourceProblems) as caught:
        pack(mine, store=store)
    mend = "pip install --force-reinstall --no-deps onlyhere==1.0"
    assert caught.value.problems == [f"onlyhere 1.0 (pip): missing: {SITE}/onlyhere.py. Mend it: {mend}"]
    assert pack(mine, store=store, options=PackOptions(ignore_missing=True)).versions["dask"] is None


def test_an_editable_installation_that_cannot_be_followed_is_named(store: Store, tmp_path: Path) -> None:
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    info = mine / SITE / "onlyhere-1.0.dist-info"
    (info / "direct_url.json").write_text('{"url": "file:///home/me/onlyhere", "dir_info": {"editable": true}}')
    with pytest.raises(SourceProblems, match="editable mode from file:///home/me/onlyhere"):
        pack(mine, store=store)


def test_a_plain_interpreter_can_be_packed(store: Store, tmp_path: Path) -> None:
    """One that lies in a folder of its own, as pyenv and uv install it, with a package in its own site-packages."""
    if Path(sys.base_prefix) in (Path("/usr"), Path("/usr/local")):
        pytest.skip("the interpreter that runs the tests belongs to the system")
    built = materialise(store, pack(small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)]), store=store).id)
    shutil.copytree(built, tmp_path / "plain", symlinks=True)
    environment = pack(tmp_path / "plain", store=store)
    assert [(p.name, p.kind) for p in environment.packages] == [("onlyhere", "pypi"), ("python", "python")]
    again = materialise(store, environment.id)
    said = subprocess.run(
        [again / "bin" / "python", "-c", "import sys, onlyhere; print(sys.prefix, onlyhere.f(1))"],
        env={"PATH": "/bin"},
        capture_output=True,
        check=True,
    )
    assert said.stdout.decode().split() == [str(again), "42"]


def test_a_venv_with_the_packages_of_its_interpreter_has_them(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its user, which it sees as well, it is said not to have."""
    users = tmp_path / "home" / ".local" / SITE
    users.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    built = materialise(store, pack(small_venv(tmp_path / "a", [onlyhere_wheel(tmp_path)]), store=store).id)
    shutil.copytree(built, tmp_path / "plain", symlinks=True)
    mine = tmp_path / "mine"
    # As Debian's packages have it: that they lack something is not for the user of a venv to mend.
    with open(tmp_path / "plain" / SITE / "onlyhere-1.0.dist-info" / "RECORD", "a") as record:
        record.write("../../scripts/onlyhere,,\n")
    options = ["--without-pip", "--system-site-packages"]
    subprocess.run([tmp_path / "plain" / "bin" / "python", "-m", "venv", *options, mine], check=True)
    with caplog.at_level(logging.WARNING, "envship"):
        assert package(pack(mine, store=store), "onlyhere").version == "1.0"
    (said_so,) = (record.getMessage() for record in caplog.records)
    assert said_so.endswith("1 of them: onlyhere 1.0")
    install(mine, "--ignore-installed", str(onlyhere_wheel(tmp_path, "2.0")))
    (users / "theirs.py").write_text("")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "envship"):
        pack(mine, store=store)
    (said_so,) = (record.getMessage() for record in caplog.records)
    assert f"no packages of its user ({users})" in said_so
    assert package(pack(mine, store=store), "onlyhere").version == "2.0"


@pytest.mark.parametrize("above", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_venv_that_is_reached_by_a_link_is_the_same(store: Store, tmp_path: Path, above: bool) -> None:
    """Be the link the prefix itself or a folder above; where it leads elsewhere later on, that is noticed."""
    mine = small_venv(tmp_path / "real" / "env", [onlyhere_wheel(tmp_path)])
    link = tmp_path / "link"
    link.symlink_to(mine.parent if above else mine)
    through = link / "env" if above else link
    assert pack(through, store=store).id == pack(mine, store=store).id
    other = tmp_path / "elsewhere" / "env"
    shutil.copytree(mine, other, symlinks=True)
    (other / SITE / "more.py").write_text("")
    link.unlink()
    link.symlink_to(other.parent if above else other)
    assert f"{SITE}/more.py" in all_entries(pack(through, store=store))


def test_a_venv_whose_interpreter_is_gone_is_refused(store: Store, tmp_path: Path) -> None:
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    for name in ("python", "python3"):
        (mine / "bin" / name).unlink()
        (mine / "bin" / name).symlink_to("/nowhere/python3")
    with pytest.raises(NotAnEnvironment):
        pack(mine, store=store)


def test_an_interpreter_that_does_not_start_is_reported(store: Store, tmp_path: Path) -> None:
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    python = mine / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(NotAnEnvironment, match="broken"):
        pack(mine, store=store)


@pytest.mark.heavy
def test_what_lies_beside_byte_code_is_not_missed(store: Store, tmp_path: Path) -> None:
    """As a wheel built where numba ran has it; whether it is there or not."""
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    with open(mine / SITE / "onlyhere-1.0.dist-info" / "RECORD", "a") as record:
        record.write("__pycache__/cache.nbi,,\n")
    without = pack(mine, store=store).id
    (mine / SITE / "__pycache__").mkdir(exist_ok=True)
    (mine / SITE / "__pycache__" / "cache.nbi").write_text("x")
    assert pack(mine, store=store).id == without


def test_a_free_threaded_interpreter_is_refused(store: Store, tmp_path: Path) -> None:
    """Its library and its packages lie elsewhere; here, an interpreter that says that it is one."""
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    python = mine / "bin" / "python"
    python.unlink()
    pretend = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1; "
    python.write_text(
        f'#!/bin/sh\nfor code; do shift; [ "$code" = -c ] && break; done\ncode=$1; shift\n'
        f'exec \'{sys.executable}\' -I -S -B -c "{pretend}$code" "$@"\n'
    )
    python.chmod(0o755)
    with pytest.raises(NotAnEnvironment, match="free-threaded"):
        pack(mine, store=store)


def test_unreadable_files_are_all_named(store: Store, tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    (mine / "secret").write_text("x")
    (mine / "secret").chmod(0)
    with pytest.raises(SourceProblems, match="secret cannot be read"):
        pack(mine, store=store)


def test_a_library_that_cannot_find_others_elsewhere_is_named(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its search path names the environment, and has no room for another: it is packed, and that is said."""
    mine = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    folder = mine / "lib" / Path("d/" * 100)
    folder.mkdir(parents=True)
    (folder / "x.so").write_bytes(elf_file(f"{mine}/lib"))
    (mine / "lib" / "fine.so").write_bytes(elf_file(f"{mine}/lib"))
    with caplog.at_level(logging.WARNING, "envship"):
        pack(mine, store=store)
    (said,) = (record.getMessage() for record in caplog.records if "RPATH" in record.getMessage())
    assert f"/d/x.so looks for shared libraries in {mine}/lib" in said
