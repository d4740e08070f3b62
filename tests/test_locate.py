"""Where environments are looked for by name, without a conda executable."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

import pytest

from envship.errors import NotAnEnvironment, SourceNotFound
from envship.sources.locate import find_prefix, is_conda, is_exported


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it, and no conda around."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("CONDA_PREFIX", "CONDA_EXE", "MAMBA_EXE", "MAMBA_ROOT_PREFIX", "CONDA_ROOT", "CONDARC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONDA_ENVS_PATH", "CONDA_ENVS_DIRS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(home)
    return home


def environment(path: Path) -> Path:
    (path / "conda-meta").mkdir(parents=True)
    (path / "conda-meta" / "history").touch()
    return path


def with_interpreter(path: Path) -> Path:
    (path / "bin").mkdir(parents=True, exist_ok=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    return path


def test_nothing_means_the_running_environment() -> None:
    assert find_prefix(None) == Path(sys.prefix)


def test_beside_the_active_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_PREFIX", str(environment(home / "conda" / "envs" / "active")))
    mine = environment(home / "conda" / "envs" / "mine")
    assert find_prefix("mine") == mine
    assert find_prefix("active").name == "active"


def test_under_the_active_base(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_PREFIX", str(environment(home / "conda")))
    mine = environment(home / "conda" / "envs" / "mine")
    assert find_prefix("mine") == mine
    assert find_prefix("base") == home / "conda"


def test_in_the_folders_that_variables_and_settings_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = environment(home / "a" / "one"), environment(home / "b" / "two")
    monkeypatch.setenv("CONDA_ENVS_PATH", str(home / "a"))
    (home / ".condarc").write_text("envs_dirs:\n  - ~/b\n")
    assert find_prefix("one") == one
    assert find_prefix("two") == two


def test_in_the_list_that_conda_keeps(home: Path) -> None:
    mine = environment(home / "anywhere" / "mine")
    (home / ".conda").mkdir()
    (home / ".conda" / "environments.txt").write_text(f"/gone/mine\n{mine}\n")
    assert find_prefix("mine") == mine


def test_a_path_is_a_path(home: Path) -> None:
    mine = environment(home / "mine")
    assert find_prefix("./mine") == find_prefix("mine") == find_prefix(mine) == find_prefix("~/mine") == mine
    assert is_conda(mine)
    (home / "folder").mkdir()
    (home / "file").touch()
    for name in ("./folder", "folder", "file", "./file"):
        with pytest.raises(NotAnEnvironment):
            find_prefix(name)


def test_the_error_says_where_was_looked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_ENVS_PATH", str(home / "a"))
    (home / ".condarc").write_text(": not yaml : [")
    with pytest.raises(SourceNotFound) as caught:
        find_prefix("mine")
    assert str(home / "a" / "mine") in caught.value.looked_in


def test_a_history_of_conda_makes_no_conda_environment_of_an_interpreter_that_conda_does_not_know(home: Path) -> None:
    mine = environment(home / "mine")
    assert is_conda(mine) and not is_exported(mine)
    with_interpreter(mine)
    assert is_exported(mine) and not is_conda(mine)
    (mine / "pyvenv.cfg").touch()
    assert not is_exported(mine) and not is_conda(mine)
    (mine / "conda-meta" / "python-3.11.7-0.json").touch()
    assert is_conda(mine) and not is_exported(mine)


def test_a_user_whose_home_nobody_knows_finds_what_lies_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under any user id, which has no account."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("CONDA_ENVS_PATH", os.pathsep.join(["~/envs", str(home / "a")]))
    one = environment(home / "a" / "one")
    assert find_prefix("one") == one
    for name in ("nosuch", "~/nosuch", "~nobody-of-that-name/nosuch"):
        with pytest.raises(SourceNotFound, match="nosuch"):
            find_prefix(name)
