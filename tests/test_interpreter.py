"""Which environment this process is in, and what it was first started with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.interpreter import (
    BASE_VARIABLE,
    FAILED_VARIABLE,
    Interpreter,
    base_interpreter,
    own_environment_id,
    platform_name,
    with_base,
)

NAME = EnvironmentId(digest_of(b"environment"))
BASE = Interpreter(None, "/base", "/base/bin/python", {"PATH": "/base/bin", "naïve": "a=b\nc"})


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Has this process run in environment `NAME`, for all that it can know."""
    monkeypatch.setenv("ENVSHIP_ENVIRONMENT", NAME)
    monkeypatch.setenv("ENVSHIP_PREFIX", sys.prefix)
    return monkeypatch


def test_a_process_outside_any_environment_is_in_the_base() -> None:
    assert own_environment_id() is None
    assert base_interpreter()[:3] == (None, sys.prefix, sys.executable)


def test_the_variables_of_the_environment_name_it(inside: pytest.MonkeyPatch) -> None:
    assert own_environment_id() == NAME


def test_another_way_to_the_prefix_counts(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sys.prefix)
    inside.setenv("ENVSHIP_PREFIX", str(tmp_path / "link"))
    assert own_environment_id() == NAME


def test_inherited_variables_do_not_count(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A task may start another interpreter, with the worker's variables."""
    inside.setenv("ENVSHIP_PREFIX", str(tmp_path))
    assert own_environment_id() is None


@pytest.mark.parametrize("name", ["", "../../etc", NAME[:16], NAME.upper()])
def test_what_is_no_id_does_not_count(inside: pytest.MonkeyPatch, name: str) -> None:
    inside.setenv("ENVSHIP_ENVIRONMENT", name)
    assert own_environment_id() is None


def test_the_way_back_is_remembered_across_environments(inside: pytest.MonkeyPatch) -> None:
    """From one environment to the next, too, the base stays the one of the beginning."""
    there = with_base(Interpreter(NAME, "/e", "/e/bin/python", {"PATH": "/e/bin"}), BASE)
    assert there.environ["PATH"] == "/e/bin"
    inside.setenv(BASE_VARIABLE, there.environ[BASE_VARIABLE])
    assert base_interpreter() == BASE


def test_the_base_itself_remembers_nothing() -> None:
    """Or it would grow with every way back."""
    assert with_base(BASE, BASE) == BASE


def test_what_another_process_remembers_is_not_this_ones_base(monkeypatch: pytest.MonkeyPatch) -> None:
    there = with_base(Interpreter(NAME, "/e", "/e/bin/python", {}), BASE)
    of_whoever_tests = set(os.environ)
    for name, value in there.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(FAILED_VARIABLE, NAME)
    own = base_interpreter()
    assert own.prefix == sys.prefix
    assert not [name for name in own.environ if name.startswith("ENVSHIP_") and name not in of_whoever_tests]
    assert set(own.environ) <= set(os.environ)


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("Linux", "x86_64", "linux-64"),
        ("Linux", "aarch64", "linux-aarch64"),
        ("Linux", "ppc64le", "linux-ppc64le"),
        ("Linux", "i686", "linux-32"),
        ("Darwin", "arm64", "osx-arm64"),
        ("Darwin", "x86_64", "osx-64"),
    ],
)
def test_platforms_have_the_names_that_conda_gives_them(system: str, machine: str, name: str) -> None:
    assert platform_name(system, machine) == name
