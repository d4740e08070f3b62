"""Older ways to link to a project: what ``setup.py develop`` leaves, and a file in the place of a folder."""

from __future__ import annotations

import ensurepip
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from envship.pack import pack
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import said, small_venv

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
