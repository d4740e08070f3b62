"""Files that name their prefix: text, binary, scripts; built at paths of every length, they name the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from envship.environment import Environment
from envship.pack import pack
from worker_bootstrap.errors import PrefixTooLong
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import console_script_wheel, said, small_venv

LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
PLACEHOLDER_BYTES = 255
"""Length of the placeholder that rattler-build and conda-build give to a package."""


def built_below(folder: Path, environment: Environment) -> Path:
    """The environment, built in a store of its own at *folder*."""
    return materialise(Store(folder, [environment.store.layout.root]), environment.id)


def store_for(folder: Path, prefix_bytes: int) -> Path:
    """A path below *folder* at which a store builds its environments at prefixes of that length."""
    inside = len("/envs/") + 16
    missing = prefix_bytes - inside - len(os.fsencode(folder))
    names = []
    while missing > 0:
        length = min(missing - 1, 100)
        # No name of length 0, nor one slash too many.
        length -= missing - 1 - length == 1
        names.append("x" * length)
        missing -= length + 1
    return folder.joinpath(*names)


@pytest.fixture(scope="module")
def elsewhere(conda_environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conda environment, built at a path much longer than its own, with spaces in it."""
    folder = tmp_path_factory.mktemp("built") / "in a folder with spaces" / ("long-" * 20)
    return built_below(folder / "store", conda_environment)


def test_text_files_name_the_new_prefix(elsewhere: Path, conda_pair: tuple[Path, Path]) -> None:
    assert (elsewhere / "share/libmini/libmini.conf").read_text() == f"[libmini]\nprefix={elsewhere}\n"
    assert (elsewhere / "lib/pkgconfig/libmini.pc").read_text().startswith(f"prefix={elsewhere}\n")
    sysconfig = next((elsewhere / LIBRARY).glob("_sysconfigdata*.py")).read_text()
    assert str(elsewhere) in sysconfig
    assert str(conda_pair[0]) not in sysconfig
    code = "import libmini.config, sysconfig; print(libmini.config.PREFIX); print(sysconfig.get_config_var('LIBDIR'))"
    assert said(elsewhere / "bin/python", "-c", code).splitlines() == [f"{elsewhere}", f"{elsewhere}/lib"]


def test_binary_files_name_the_new_prefix_and_keep_their_length(elsewhere: Path, conda_pair: tuple[Path, Path]) -> None:
    """Twice in one string; at the end of the file, where no NUL follows."""
    original = (conda_pair[0] / "lib/libmini.so").read_bytes()
    moved = (elsewhere / "lib/libmini.so").read_bytes()
    assert len(moved) == len(original)
    assert f"\1{elsewhere}/share:{elsewhere}/lib\0".encode() in moved
    assert moved.endswith(b"\0tail\0")
    end = (elsewhere / "share/libmini/end.bin").read_bytes()
    assert end.rstrip(b"\0").endswith(f": {elsewhere}/end".encode())


def test_a_compiled_library_says_the_new_prefix(elsewhere: Path) -> None:
    if not (elsewhere / "lib/libplace.so").exists():
        pytest.skip("no compiler on this machine made the library")
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).place; f.restype = ctypes.c_char_p; print(f().decode())"
    place = said(elsewhere / "bin/python", "-c", code, elsewhere / "lib/libplace.so")
    assert place == f"{elsewhere}/share:{elsewhere}/lib"


def test_a_prefix_may_be_exactly_as_long_as_the_placeholder(conda_environment: Environment, tmp_path: Path) -> None:
    prefix = built_below(store_for(tmp_path, PLACEHOLDER_BYTES), conda_environment)
    assert len(os.fsencode(prefix)) == PLACEHOLDER_BYTES
    assert said(prefix / "bin/python", "-c", "import sys; print(sys.prefix)") == str(prefix)
    assert f"\1{prefix}/share:{prefix}/lib\0tail\0".encode() in (prefix / "lib/libmini.so").read_bytes()


def test_a_prefix_that_is_too_long_is_refused_before_anything_is_written(
    conda_environment: Environment, tmp_path: Path
) -> None:
    folder = store_for(tmp_path, PLACEHOLDER_BYTES + 1)
    store = Store(folder, [conda_environment.store.layout.root])
    with pytest.raises(PrefixTooLong) as caught:
        materialise(store, conda_environment.id)
    assert caught.value.room_bytes == PLACEHOLDER_BYTES
    named = all_entries(conda_environment)[caught.value.path]
    assert named.relocation is not None and named.relocation.mode == "binary"  # type: ignore[union-attr]
    assert str(caught.value.path) in str(caught.value)
    assert list(store.layout.envs.iterdir()) == list(store.layout.tmp.iterdir()) == []


def test_scripts_run_from_a_path_that_no_shebang_can_hold(elsewhere: Path) -> None:
    """Over 127 characters, with spaces: conda's own, with arguments, and a noarch package's entry point."""
    assert len(str(elsewhere)) > 127 and " " in str(elsewhere)
    assert said(elsewhere / "bin/mini-prefix") == str(elsewhere)
    assert said(elsewhere / "bin/mini-isolated") == f"{elsewhere} 1"
    assert said(elsewhere / "bin/mininoarch") == f"mininoarch {elsewhere}"
    # A script of another interpreter finds that on PATH, which activation sets; its argument is still there.
    first = (elsewhere / "bin/mini-other").read_bytes().splitlines()[0]
    assert first == b"#!/usr/bin/env -S mini-prefix -x"
    assert said(elsewhere / "bin/mini-other", PATH=f"{elsewhere}/bin:/usr/bin:/bin") == f"{elsewhere} -x"


def test_scripts_run_from_a_short_path(conda_environment: Environment, tmp_path: Path) -> None:
    prefix = built_below(tmp_path / "s", conda_environment)
    for script, expected in (("mini-prefix", f"{prefix}"), ("mininoarch", f"mininoarch {prefix}")):
        assert (prefix / "bin" / script).read_bytes().startswith(f"#!{prefix}/bin/python".encode())
        assert said(prefix / "bin" / script) == expected


@pytest.mark.heavy
def test_an_environment_at_a_long_path_is_the_same_environment(store: Store, tmp_path: Path) -> None:
    """Installers give scripts another first line there: pip's form is undone, and packed scripts run anywhere."""
    ids = []
    for folder in (tmp_path / "short", tmp_path / ("long-" * 25) / "with a space"):
        prefix = small_venv(folder / "env", [console_script_wheel(tmp_path)])
        environment = pack(prefix, store=store)
        ids.append(environment.id)
    first = (folder / "env/bin/where").read_bytes()
    assert first.startswith(b"#!/bin/sh\n")
    assert ids[0] == ids[1]
    built = materialise(store, ids[0])
    assert said(built / "bin/where") == str(built)


def test_what_came_with_the_machine_runs_no_script_of_ours(elsewhere: Path) -> None:
    """The scripts run with a clean environment: it is their first lines that find the interpreter, not a variable."""
    done = subprocess.run([elsewhere / "bin/mini-prefix"], env={}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(elsewhere)
