"""History of repositories, which is in no environment, wherever it lies: that of packages excepted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from envship.options import PackOptions
from envship.pack import pack
from envship.sources.distributions import Distribution
from envship.sources.tree import Found
from envship.sources.version_control import without_version_control
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import small_venv
from .projects import git, install_editable, project

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.mark.parametrize("how", ["path file", pytest.param("editable", marks=pytest.mark.heavy)])
def test_a_venv_in_the_folder_of_a_repository_is_the_same_before_and_after_a_commit(
    shared_store: Store, tmp_path: Path, how: str
) -> None:
    root = project(tmp_path, "mine", "flit")
    git(root, "init")
    small_venv(root, [])
    if how == "path file":
        (root / SITE / "mine.pth").write_text(f"{root}\n")
    else:
        install_editable(root, root)
    (root / ".gitattributes").write_text("")
    before = pack(root, store=shared_store)
    paths = all_entries(before)
    assert {"mine/__init__.py", ".gitattributes"} <= paths.keys()
    assert not any(path.startswith(".git/") for path in paths)
    git(root, "add", "mine")
    git(root, "commit", "-m", "first")
    assert pack(root, store=shared_store).id == before.id


def test_a_copy_of_what_a_link_points_to_has_none(shared_store: Store, tmp_path: Path) -> None:
    root = project(tmp_path, "mine")
    git(root, "init")
    prefix = small_venv(tmp_path / "env", [])
    (prefix / "share").mkdir()
    (prefix / "share" / "linked").symlink_to(root)
    paths = all_entries(pack(prefix, store=shared_store, options=PackOptions(copy_outside_links=True)))
    assert "share/linked/mine/__init__.py" in paths
    assert not any("/.git" in path for path in paths)


def test_what_a_package_owns_stays(tmp_path: Path) -> None:
    (tmp_path / "conda-meta").mkdir()
    records = {
        "new": {"paths_data": {"paths": [{"_path": "share/new/.git/HEAD"}, {}, None]}},
        "old": {"files": ["share/old/.svn/entries", 3]},
        "odd": [],
    }
    for name, record in records.items():
        (tmp_path / "conda-meta" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "conda-meta" / "broken.json").write_text("{")
    owned = ["share/new/.git/HEAD", "share/old/.svn/entries", "share/pip/.hg/store"]
    plain = ["bin/python", "share/.gitignore", "share/x.git/HEAD"]
    nobodys = [".git/HEAD", "src/x/.git/HEAD", "src/y/.git", "src/y/.hg", "share/new/.git/index"]
    found = Found(str(tmp_path), tmp_path.stat())
    by_pip = Distribution("pip", "1", f"{SITE}/pip-1.dist-info", ("share/pip/.hg/store",), None)
    files = dict.fromkeys([*owned, *plain, *nobodys], found)
    assert set(without_version_control(files, [by_pip], str(tmp_path))) == {*owned, *plain}
