"""Other ways to link to a project: what ``setup.py develop`` and flit leave, and a file in the place of a folder."""

from __future__ import annotations

import ensurepip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from envship.errors import SourceProblems
from envship.pack import pack
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .byte_code import compiled
from .contents import all_entries
from .prefixes import said, small_venv
from .projects import git, project

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
PLACE = "share/envship/projects"
BUNDLED = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("setuptools-*.whl"))
SETUP_PY = """
from setuptools import setup
setup(name="viasetup", version="1.0", package_dir={"": "src"}, packages=["viasetup"], scripts=["viatool.py"],
      entry_points={"console_scripts": ["viamain = viasetup:main"]})
"""


@pytest.mark.skipif(not BUNDLED, reason="setuptools that develops comes with Python up to 3.11")
@pytest.mark.filterwarnings("ignore")
def test_what_setup_py_develop_leaves_works_elsewhere(shared_store: Store, tmp_path: Path) -> None:
    """Its line, its egg-link to a folder of sources, its scripts: one calls an entry point, one runs where it lies."""
    root = tmp_path / "project"
    (root / "src" / "viasetup").mkdir(parents=True)
    (root / "src" / "viasetup" / "__init__.py").write_text("def main():\n    print('main', __file__)\n")
    (root / "setup.py").write_text(SETUP_PY)
    (root / "viatool.py").write_text("#!/usr/bin/env python\nimport viasetup\nprint('tool', viasetup.__file__)\n")
    (root / "unrelated.txt").write_text("no part of it")
    prefix = small_venv(tmp_path / "env", BUNDLED)
    subprocess.run(
        [prefix / "bin" / "python", "-W", "ignore", "setup.py", "-q", "develop", "--no-deps"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    assert (prefix / SITE / "viasetup.egg-link").read_text() == f"{root}/src\n../"
    environment = pack(prefix, store=shared_store)
    shutil.rmtree(root)
    shutil.rmtree(prefix)
    built = materialise(shared_store, environment.id)
    where = f"{built}/{PLACE}/easy-install/viasetup/__init__.py"
    assert said(built / "bin/viamain") == f"main {where}"
    assert said(built / "bin/viatool.py") == f"tool {where}"
    assert not any(path.endswith("unrelated.txt") for path in all_entries(environment))


def test_a_path_file_may_name_a_file(shared_store: Store, tmp_path: Path) -> None:
    """A zip of modules, outside of the environment."""
    prefix = small_venv(tmp_path / "env", [])
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        archive.writestr("zipped.py", "VALUE = 1\n")
    (prefix / SITE / "zip.pth").write_text(f"{tmp_path}/modules.zip\n")
    environment = pack(prefix, store=shared_store)
    (tmp_path / "modules.zip").unlink()
    built = materialise(shared_store, environment.id)
    code = "import zipped; print(zipped.VALUE, zipped.__file__)"
    assert said(built / "bin/python", "-c", code) == f"1 {built}/{PLACE}/zip/zipped.py"


def flit_install_symlink(prefix: Path, root: Path, name: str, *parts: str) -> None:
    """What ``flit install --symlink`` leaves of *parts* of the project at *root*, which it installs as *name* 1.0."""
    site = prefix / SITE
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n",
        "INSTALLER": "flit",
        "REQUESTED": "",
        "direct_url.json": json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}}),
    }
    for file, text in files.items():
        (info / file).write_text(text)
    rows = [f"{info.name}/{file},sha256=x,1" for file in files]
    for part in parts:
        target = prefix / "share" / "doc" / name if part == "data" else site / part.removeprefix("src/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(root / part)
        # Absolute, outside of the site folder.
        rows.append(f"{target.relative_to(site) if target.is_relative_to(site) else target},,")
    (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/RECORD,,"]) + "\n")


def test_what_flit_links_to_comes_along_as_it_is_now(shared_store: Store, tmp_path: Path) -> None:
    """A package, one of a namespace, a module, data: in two places, they are one environment."""
    ids = set()
    for place in ("one", "another"):
        root = project(tmp_path / place, "viaflit", "flit", package="src/viaflit")
        (root / "src" / "space" / "viaspace").mkdir(parents=True)
        (root / "src" / "space" / "viaspace" / "__init__.py").write_text("VALUE = 1\n")
        (root / "viasingle.py").write_text("VALUE = 1\n")
        (root / "data").mkdir()
        (root / "data" / "manual.txt").write_text("text")
        git(root, "init")
        (root / ".gitignore").write_text("*.csv\n")
        (root / "src" / "viaflit" / "rows.csv").write_text(place)
        prefix = small_venv(tmp_path / place / "env", [])
        flit_install_symlink(prefix, root, "viaflit", "src/viaflit", "data")
        flit_install_symlink(prefix, root, "viaspace", "src/space/viaspace")
        flit_install_symlink(prefix, root, "viasingle", "viasingle.py")
        (root / "src" / "viaflit" / "late.py").write_text("VALUE = 2\n")
        environment = pack(prefix, store=shared_store)
        ids.add(environment.id)
        shutil.rmtree(tmp_path / place)
    assert len(ids) == 1
    assert {package.kind for package in environment.packages if package.name.startswith("via")} == {"project"}
    assert not any(path.endswith((".csv", "unrelated.txt")) for path in all_entries(environment))
    built = materialise(shared_store, environment.id)
    modules = ("viaflit", "viaflit.inner", "viaflit.late", "space.viaspace", "viasingle")
    assert compiled(built / "bin/python", *modules) == []
    code = f"import {', '.join(modules)}; print(viaflit.__file__, viaflit.late.VALUE, viasingle.__file__)"
    assert said(built / "bin/python", "-c", code) == f"{built}/{SITE}/viaflit/__init__.py 2 {built}/{SITE}/viasingle.py"
    assert os.path.realpath(built / SITE / "viaflit") == f"{built}/{PLACE}/viaflit/src/viaflit"
    assert (built / "share" / "doc" / "viaflit" / "manual.txt").read_text() == "text"


def test_a_link_of_flit_that_leads_nowhere_is_refused(shared_store: Store, tmp_path: Path) -> None:
    prefix = small_venv(tmp_path / "env", [])
    flit_install_symlink(prefix, tmp_path / "gone", "viaflit", "viaflit")
    with pytest.raises(SourceProblems, match="in a way that cannot be followed"):
        pack(prefix, store=shared_store)
