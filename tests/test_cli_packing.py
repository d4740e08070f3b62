"""The commands that need no cluster, on a real venv."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from envship.cli import main
from envship.errors import SourceProblems
from envship.pack import pack
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .environments import environment_of, package_of
from .prefixes import onlyhere_wheel, small_venv


@pytest.fixture(autouse=True)
def users_store(shared_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSHIP_STORE", str(shared_store.layout.root))


def envship(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def envship_json(*arguments: object) -> Any:
    return json.loads(envship(*arguments, "--json"))


def test_everything_that_is_wrong_can_be_had(tmp_path: Path, shared_store: Store) -> None:
    """The message is short, and says where the rest is."""
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    links, missing = [f"link{number:02}" for number in range(60)], [f"gone{number}.py" for number in range(10)]
    for link in links:
        (prefix / link).symlink_to("/etc/hosts")
    with open(next(prefix.rglob("onlyhere-1.0.dist-info/RECORD")), "a") as record:
        record.writelines(f"{name},,\n" for name in missing)
    with pytest.raises(SourceProblems) as caught:
        pack(prefix, store=shared_store)
    assert all(any(name in problem for problem in caught.value.problems) for name in (*links, *missing))
    assert len(caught.value.problems) == 61
    told = {}
    for options in ((), ("--all-problems",)):
        result = CliRunner().invoke(main, ["pack", str(prefix), *options])
        assert result.exit_code == 1
        told[options] = result.stderr
    assert told[()].strip() == f"Error: {caught.value}"
    assert len(told[()].splitlines()) == 54
    assert "… and 11 more" in told[()] and "--all-problems" in told[()]
    assert all(name in told["--all-problems",] for name in (*links, *missing))


def test_what_a_terminal_would_take_for_orders_is_printed_as_escapes(tmp_path: Path) -> None:
    """Names in a bundle are texts of whoever made it."""
    store = Store(tmp_path / "store")
    red = "\x1b[31mred\x1b]0;title\x07"
    packages = [package_of(store, {f"lib/{red}{size}": b"x" * size}, red, red) for size in (1, 2)]
    one, two = (environment_of(store, [package], {red: red}).id for package in packages)
    prefix = materialise(store, two)
    (prefix / "lib" / f"{red}2").write_bytes(b"edited")
    for arguments, code in (
        (["show", two], 0),
        (["diff", one, two], 0),
        (["verify"], 1),
        (["verify", "--repair"], 0),
        (["show", red], 1),
    ):
        result = CliRunner().invoke(main, [*arguments, "--store", str(store.layout.root)])
        assert result.exit_code == code, result.output
        assert "\x1b" not in result.output and "\x07" not in result.output
        assert "\\x1b[31mred" in result.output, arguments


def test_a_folder_without_a_name_is_not_the_one_that_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["gc"], ["verify"], ["show", "a" * 64], ["pack"]):
        result = CliRunner().invoke(main, [*command, "--store", ""])
        assert result.exit_code == 2
        assert "--store" in result.stderr and "empty" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_environment_is_packed_shown_compared_and_exported(venv: Path, tmp_path: Path) -> None:
    whole = envship_json("pack", venv)
    less = envship_json("pack", venv, "--exclude", "*/onlyhere.py")
    shown = envship_json("show", whole["id"])
    assert sum(part["size_bytes"] for part in shown["folders"]) == whole["size_bytes"]
    assert sum(part["size_bytes"] for part in shown["kinds"]) == whole["size_bytes"]
    text = envship("show", whole["id"])
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    assert f"{library}/ (the rest)" in text and f"{library}/__pycache__/  " in text
    assert "Python sources" in text and "often not needed" in text
    found = envship_json("diff", less["id"], whole["id"])
    (change,) = found["packages"]
    assert change["name"] == "onlyhere"
    assert {file["kind"] for file in change["files"]} == {"added"}
    assert 0 < found["ship_bytes"] < 10_000
    assert "onlyhere.py" in envship("diff", less["id"], whole["id"])
    assert "same environment" in envship("diff", whole["id"], whole["id"])
    told = envship_json("export", whole["id"], "-o", tmp_path / "mine.tar.gz")
    assert told["archive_bytes"] == (tmp_path / "mine.tar.gz").stat().st_size
    with tarfile.open(tmp_path / "mine.tar.gz") as tar:
        assert "bin/conda-unpack" in tar.getnames()


def test_of_many_files_that_differ_the_largest_are_named(venv: Path, tmp_path: Path) -> None:
    less = envship_json("pack", venv, "--exclude", "*.py")
    whole = envship_json("pack", venv)
    (python,) = (each for each in envship_json("diff", less["id"], whole["id"])["packages"] if each["name"] == "python")
    by_size = [file["path"] for file in sorted(python["files"], key=lambda file: -file["new_bytes"])]
    text = envship("diff", less["id"], whole["id"])
    lines = text.partition("python:")[2].partition("smaller ones")[0].splitlines()
    told = [line.split()[1] for line in lines if line.startswith("  + ")]
    assert 10 < len(told) < len(by_size)
    assert told == by_size[: len(told)]
    assert f"… and {len(by_size) - len(told)} smaller ones" in text
    everything = envship("diff", "--all", less["id"], whole["id"])
    assert all(path in everything for path in by_size)


@pytest.mark.parametrize(("command", "name"), [("pack", "it.envship"), ("export", "it.tar.gz")])
def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_packed(
    command: str, name: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, [command, "nosuch", "-o", str(tmp_path / "nowhere" / name)])
    assert result.exit_code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in result.stderr


def test_what_the_system_refuses_ends_as_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(main, ["pack", "nosuch"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr == "Error: No such file or directory\n"
