"""Prefixes and archives whose metadata names what lies outside of them: nothing of it is read, written or packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envship.environment import Environment
from envship.errors import NotAnEnvironment, SourceProblems
from envship.options import NO_OPTIONS, PackOptions
from envship.pack import pack
from envship.sources import venv as venvs
from envship.sources.draft import FileItem
from envship.sources.interpreter import Interpreter, ask
from envship.sources.plan import plan
from envship.sources.tree import Trees
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .contents import all_entries, contents
from .hostile import SECRET, surrounded

SHORT = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{SHORT}/site-packages"


@pytest.fixture
def outside(tmp_path: Path, store: Store) -> Iterator[Path]:
    """A folder with a secret; the test fails if anything changes but the prefix, and what is added to the store."""
    (tmp_path / "private/evil").mkdir(parents=True)
    (tmp_path / "private/evil/__init__.py").write_bytes(b'KEY = "' + SECRET + b'"\n')
    with surrounded(tmp_path, store, without=["prefix", "env.tar"]) as folder:
        yield folder


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """What passes for a conda environment: a few files, and the interpreter that runs the tests behind a script."""
    made = tmp_path / "prefix" / "env"
    for folder in ("bin", "conda-meta", "share", SITE):
        (made / folder).mkdir(parents=True)
    (made / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (made / "bin/python").chmod(0o755)
    (made / "share/ours").write_bytes(b"ours")
    record(made, "python", [{"_path": "bin/python"}])
    return made


def record(prefix: Path, name: str, paths: list[Any] | None, **more: object) -> None:
    """Write the record of a conda package."""
    data = {"name": name, "version": "3.11.7", "build": "0", "paths_data": {"paths": paths}, **more}
    (prefix / f"conda-meta/{name}-3.11.7-0.json").write_text(json.dumps(data))


def distribution(prefix: Path, rows: list[str], name: str = "evil", **files: str) -> None:
    """Write the ``dist-info`` folder of a wheel whose RECORD has *rows*."""
    info = prefix / SITE / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{row},,\n" for row in [*rows, "evil-1.0.dist-info/METADATA"]))
    for file, text in files.items():
        (info / file.replace("__", ".")).write_text(text)


def check_nothing_of_outside(environment: Environment, store: Store) -> None:
    """It has no path that leads out and nothing of the secret, and can be built."""
    for path in all_entries(environment):
        assert not path.startswith("/") and not {"", ".", ".."} & set(path.split("/"))
    for each in environment.packages:
        assert all(SECRET not in data for data in contents(environment, each).values())
    prefix = materialise(store, environment.id)
    assert (prefix / "share/ours").read_bytes() == b"ours"


PATHS = [
    *("../../outside/secret", "../../outside/new", "../env/share/ours", "share/../../../outside/secret", "..", "."),
    *("", "/", "/etc/passwd", "{outside}/secret", "conda-meta/../../../outside/secret", "share//ours", "share/ours/x"),
    *("bin/../share/ours", "share/ours\0", "\ud800", "share"),
]
"""``_path`` of a file in ``conda-meta``, seen from the prefix."""

KINDS: list[dict[str, Any]] = [
    {},
    {"path_type": "unix_python_entry_point"},
    {"path_type": "softlink"},
    {"path_type": "hardlink", "sha256": "0" * 64, "prefix_placeholder": "/old", "file_mode": "text"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.get("path_type", "plain"))
def test_a_conda_package_that_records_what_lies_outside(
    prefix: Path, store: Store, outside: Path, kind: dict[str, Any]
) -> None:
    """Such files are missing, by whatever spelling: none is looked for outside of what the walk found."""
    paths = [path.format(outside=outside) for path in PATHS]
    noarch = "python" if kind.get("path_type") == "unix_python_entry_point" else None
    record(prefix, "evil", [{"_path": path, **kind} for path in paths], noarch=noarch, files=paths)
    with pytest.raises(SourceProblems, match=r"evil 3\.11\.7 .*missing"):
        pack(prefix, store=store)
    check_nothing_of_outside(pack(prefix, store=store, options=PackOptions(ignore_missing=True)), store)


def test_an_old_conda_package_that_lists_what_lies_outside(prefix: Path, store: Store, outside: Path) -> None:
    record(prefix, "evil", None, files=[path.format(outside=outside) for path in PATHS])
    with pytest.raises(SourceProblems, match=r"evil 3\.11\.7 .*missing"):
        pack(prefix, store=store)
    check_nothing_of_outside(pack(prefix, store=store, options=PackOptions(ignore_missing=True)), store)


@pytest.mark.parametrize(
    "paths", [[{"_path": None}], [{"_path": ["a"]}], [{"_path": 3}], ["a"], [{}], {"a": 1}, 3], ids=json.dumps
)
def test_a_conda_package_that_records_what_is_no_path(prefix: Path, outside: Path, paths: Any) -> None:
    record(prefix, "evil", paths)
    with pytest.raises(SourceProblems, match=r"evil-3.11.7-0.json cannot be read"):
        plan(prefix, Trees(), NO_OPTIONS)


ROWS = [
    *("../../../../../outside/secret", "../../../../env/share/ours", "../../../..", "../../..", "../../../share"),
    *("../../../x", "../../../../x", "{outside}/secret", "/etc/passwd", "/", "a/../../../../../../outside/secret"),
    *("../../../share/../../../outside/secret", "evil/../../../../../../outside/new", ".", ".."),
]
"""In a RECORD, seen from ``site-packages``: three levels up is the prefix, five the folder beside the store."""


def test_a_wheel_that_records_what_lies_outside(prefix: Path, store: Store, outside: Path) -> None:
    """What leads out is nobody's; what is inside and not there is missing."""
    distribution(prefix, [row.format(outside=outside) for row in ROWS])
    with pytest.raises(SourceProblems, match=r"evil 1\.0 .*missing") as caught:
        pack(prefix, store=store)
    assert not any(".." in problem or "outside" in problem for problem in caught.value.problems)
    check_nothing_of_outside(pack(prefix, store=store, options=PackOptions(ignore_missing=True)), store)


def test_a_wheel_of_the_interpreter_that_records_what_lies_outside(
    prefix: Path, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where the packages of the interpreter count: files that they record elsewhere are looked for."""
    base = prefix
    venv = tmp_path / "prefix" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(venv)], check=True)
    rows = [row.format(outside=outside) for row in ROWS]
    distribution(base, [*rows, "../../../share/ours"])

    def answer(executable: str, prefix: str, *, libraries: bool = False) -> Interpreter:
        return ask(executable, prefix)._replace(base_prefix=str(base), site=[str(base / SITE)])

    monkeypatch.setattr(venvs, "ask", answer)
    trees = Trees()
    made = venvs.plan_venv(venv, trees, PackOptions(ignore_missing=True))
    (evil,) = (draft for draft in made.drafts if draft.name == "evil")
    assert {item.path for item in evil.items} - {SITE} == {
        f"{SITE}/evil-1.0.dist-info/METADATA",
        f"{SITE}/evil-1.0.dist-info/RECORD",
        "share/ours",
    }
    assert all(item.origin.startswith(f"{base}/") for item in evil.items if isinstance(item, FileItem))
    assert not any(str(outside) in root.path or root.path in (str(base), str(base.parent)) for root in trees.roots)


@pytest.mark.parametrize("kind", ["prefix", "archive"])
@pytest.mark.parametrize("what", ["a field without end", "a folder", "no digest"])
def test_a_wheel_whose_record_cannot_be_read(
    prefix: Path, tmp_path: Path, store: Store, outside: Path, what: str, kind: str
) -> None:
    """Also where conda-pack's script makes it be read early; a digest that is none counts for nothing."""
    row = {"a field without end": "../../../bin/" + "x" * 200_000, "no digest": "../../../bin/tool,sha256=abcde"}
    distribution(prefix, [row.get(what, "share")])
    (prefix / "bin/tool").write_bytes(b"tool")
    (prefix / "bin/conda-unpack").write_text("_prefix_records = [\n]\n")
    if what == "a folder":
        file = prefix / SITE / "evil-1.0.dist-info/RECORD"
        file.unlink()
        file.mkdir()
    source = archived(prefix, tmp_path / "env.tar") if kind == "archive" else prefix
    if what == "no digest":
        check_nothing_of_outside(pack(source, store=store), store)
        return
    with pytest.raises(SourceProblems, match=r"evil-1\.0\.dist-info cannot be read"):
        pack(source, store=store)


@pytest.mark.parametrize("name", ["...pth", "....pth", ".pth", "a b.pth"])
def test_a_path_file_whose_name_is_a_path(prefix: Path, store: Store, outside: Path, name: str) -> None:
    """The folder that it names comes along, as the user's own project, to a place among projects."""
    project = prefix.parent / "project"
    project.mkdir()
    (project / "module.py").write_text("VALUE = 1\n")
    (prefix / SITE / name).write_text(f"{project}\n")
    environment = pack(prefix, store=store)
    check_nothing_of_outside(environment, store)
    (module,) = (path for path in all_entries(environment) if path.endswith("/module.py"))
    assert module.startswith("share/envship/projects/") and module.count("/") == 4


# -- archives: what lies on the machine that unpacks them is none of theirs


def archived(prefix: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w") as tar:
        tar.add(prefix, ".")
    return archive


@pytest.fixture
def private(outside: Path) -> Path:
    """A folder of the user's with a package that holds the secret."""
    return outside.parent / "private"


@pytest.mark.parametrize("kind", ["path file", "path file of a wheel", "egg link"])
def test_a_path_file_in_an_archive_brings_nothing(
    prefix: Path, tmp_path: Path, store: Store, private: Path, kind: str
) -> None:
    """It stays as it is: the folder that it names is one of another machine, even if there is one here."""
    names = {"path file": "evil.pth", "path file of a wheel": "wheel.pth", "egg link": "easy-install.pth"}
    path = f"{SITE}/{names[kind]}"
    (prefix / path).write_text(f"{private}\n/etc\n~\n")
    if kind == "egg link":
        (prefix / SITE / "evil.egg-link").write_text(f"{private}\n.")
    if kind == "path file of a wheel":
        distribution(prefix, [names[kind]])
    environment = pack(archived(prefix, tmp_path / "env.tar"), store=store)
    check_nothing_of_outside(environment, store)
    assert path in all_entries(environment)
    assert not any(path.startswith("share/envship") for path in all_entries(environment))


def test_a_project_in_editable_mode_in_an_archive_is_refused_or_left_out(
    prefix: Path, tmp_path: Path, store: Store, private: Path
) -> None:
    """Whether or not its folder is there on this machine."""
    for number, folder in enumerate((private, tmp_path / "nowhere")):
        (prefix / SITE / f"_editable_{number}.pth").write_text(f"{folder}\n")
        (prefix / SITE / f"_evil_{number}.py").write_text(f"MAPPING = {{'evil': '{folder}/evil'}}\n")
        url = json.dumps({"url": f"file://{folder}", "dir_info": {"editable": True}})
        distribution(prefix, [f"_editable_{number}.pth", f"_evil_{number}.py"], direct_url__json=url)
        path = archived(prefix, tmp_path / "env.tar")
        with pytest.raises(SourceProblems, match=f"in editable mode from file://{folder}") as caught:
            pack(path, store=store)
        assert caught.value.source == str(path)
        environment = pack(path, store=store, options=PackOptions(ignore_editable=True))
        check_nothing_of_outside(environment, store)
        for file in (prefix / SITE / "evil-1.0.dist-info").iterdir():
            file.unlink()
        (prefix / SITE / "evil-1.0.dist-info").rmdir()


def test_an_archive_whose_interpreter_lies_elsewhere_is_refused(
    tmp_path: Path, prefix: Path, store: Store, private: Path
) -> None:
    """A venv in which the interpreter is a copy: its library, and what is installed beside that, is this machine's."""
    venv = tmp_path / "prefix" / "venv"
    options = ("--without-pip", "--system-site-packages", "--copies")
    subprocess.run([sys.executable, "-m", "venv", *options, str(venv)], check=True)
    if (venv / "lib64").is_symlink():
        os.unlink(venv / "lib64")
    with pytest.raises(NotAnEnvironment, match="not in it"):
        pack(archived(venv, tmp_path / "env.tar"), store=store, options=NO_OPTIONS)
