"""Conda environments as people have them: with pip's packages in them, broken, activated, cloned, moved, of pixi."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envship.cli.machines import write_wheel
from envship.environment import Environment
from envship.errors import SourceProblems
from envship.options import PackOptions
from envship.pack import pack
from worker_bootstrap.activation import activated
from worker_bootstrap.manifest import File, Link
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER
from worker_bootstrap.store import Store

from .byte_code import compiled, unlike_its_source
from .contents import all_entries, contents, entries, package
from .prefixes import ONLYHERE, clone_of, console_script_wheel, install, onlyhere_wheel, rename_module, said
from .projects import git, install_editable, project
from .read_only import pack_read_only

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.fixture(scope="module")
def lived_in(conda_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a wheel, a git checkout, an editable project, activation scripts and variables of the user."""
    folder = tmp_path_factory.mktemp("lived-in")
    prefix = clone_of(conda_pair[0], folder / "env")
    install(prefix, str(console_script_wheel(folder)))
    checkout = project(folder, "fromgit", "flit")
    git(checkout, "init")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "first")
    install_editable(prefix, project(folder, "linked", "hatchling"), more=[f"git+file://{checkout}"])
    (prefix / SITE / "conda.pth").write_text(f"{project(folder, 'developed')}\n")
    scripts = prefix / "etc" / "conda" / "activate.d"
    (scripts / "mine.sh").write_text(f'export MINE_DATA="{prefix}/share/mine"\nexport MINE_TOO="$CONDA_PREFIX/too"\n')
    variables = {"FROM_STATE": f"{prefix}/share/state", "PLAIN": "1", "GONE": "***unset***"}
    (prefix / "conda-meta" / "state").write_text(json.dumps({"env_vars": variables}))
    of_packages = prefix / "etc" / "conda" / "env_vars.d"
    of_packages.mkdir()
    (of_packages / "libmini.json").write_text(json.dumps({"OF_PACKAGE": f"{prefix}/share/libmini"}))
    return prefix


@pytest.fixture(scope="module")
def environment(lived_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return pack(lived_in, store=Store(tmp_path_factory.mktemp("a-longer-name-for-the-store") / "store"))


@pytest.fixture(scope="module")
def built(environment: Environment) -> Path:
    return materialise(environment.store, environment.id)


def test_packages_of_pip_work_beside_those_of_conda(environment: Environment, built: Path) -> None:
    kinds = {p.name: p.kind for p in environment.packages}
    assert kinds["onlyhere"] == kinds["fromgit"] == "pypi"
    assert kinds["linked"] == kinds["conda"] == "project"
    assert kinds["libmini"] == "conda"
    assert said(built / "bin" / "where") == str(built)
    code = "import fromgit, linked, developed, libmini; print(fromgit.__file__, linked.VALUE, developed.VALUE)"
    assert said(built / "bin" / "python", "-c", code) == f"{built}/{SITE}/fromgit/__init__.py 1 1"


def test_a_checkout_is_named_by_its_commit_and_not_by_its_folder(environment: Environment, lived_in: Path) -> None:
    record = contents(environment, package(environment, "fromgit"))[f"{SITE}/fromgit-1.0.dist-info/direct_url.json"]
    head = subprocess.run(
        ["git", "-C", str(lived_in.parent / "fromgit"), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert json.loads(record) == {
        "url": "file:///",
        "vcs_info": {"vcs": "git", "commit_id": head.stdout.strip()},
    }


# -- activation


def test_activation_sets_what_the_environment_defines_and_nothing_of_the_base(
    environment: Environment, built: Path, conda_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What of the user's home conda itself lets in is in, here and there."""
    base = conda_pair[1]
    user_site = tmp_path / ".local" / SITE
    user_site.mkdir(parents=True)
    before = {
        "PATH": f"{base}/bin:/opt/conda/condabin:/usr/bin:/bin",
        "CONDA_PREFIX": str(base),
        "CONDA_DEFAULT_ENV": "base",
        "CONDA_SHLVL": "1",
        "LIBMINI_DATA": f"{base}/share/libmini",
        "LD_LIBRARY_PATH": f"{base}/lib:/opt/lib",
        "VIRTUAL_ENV": "/home/me/venv",
        "MY_OWN": "stays",
        "HOME": str(tmp_path),
        "SSL_CERT_FILE": f"{base}/ssl/cacert.pem",
        "QT_PLUGIN_PATH": f"{base}/plugins:/opt/plugins",
        "LD_PRELOAD": f"{base}/lib/libmini.so",
        "CONDA_EXE": f"{base}/bin/conda",
        "CONDA_PYTHON_EXE": f"{base}/bin/python",
    }
    assert environment.manifest.environ["FROM_STATE"] == f"{PLACEHOLDER}/share/state"
    variables = activated(before, str(built), environment.manifest.environ, base_prefixes=[str(base)])
    code = "import json, os, sys; print(json.dumps({**os.environ, 'seen': sys.path}))"
    done = subprocess.run(
        [built / "bin" / "python", "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    expected = {
        "PATH": f"{built}/bin:/opt/conda/condabin:/usr/bin:/bin",
        "CONDA_PREFIX": str(built),
        "LIBMINI_DATA": f"{built}/share/libmini",
        "MINE_DATA": f"{built}/share/mine",
        "MINE_TOO": f"{built}/too",
        "FROM_STATE": f"{built}/share/state",
        "OF_PACKAGE": f"{built}/share/libmini",
        "PLAIN": "1",
        "LD_LIBRARY_PATH": "/opt/lib",
        "QT_PLUGIN_PATH": "/opt/plugins",
        "MY_OWN": "stays",
    }
    assert str(user_site) in seen.pop("seen")
    assert {name: seen.get(name) for name in expected} == expected
    assert not {"VIRTUAL_ENV", "GONE", "SSL_CERT_FILE", "LD_PRELOAD", "CONDA_EXE", "CONDA_PYTHON_EXE"} & seen.keys()
    assert not [name for name, value in seen.items() if str(base) in value]


# -- broken


def test_everything_that_is_wrong_is_in_one_report_with_a_remedy_for_each_package(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    prefix = clone_of(conda_pair[0], tmp_path / "env")
    install(prefix, str(onlyhere_wheel(tmp_path)))
    for path in ("share/libmini/libmini.conf", "share/libmini/end.bin", "bin/mini-other", "lib/pkgconfig/libmini.pc"):
        (prefix / path).unlink()
    (prefix / SITE / "onlyhere.py").unlink()
    # pip puts a package of its own in the place of conda's.
    wheel = write_wheel(tmp_path, "mininoarch", "2.0", ONLYHERE)
    rename_module(wheel, "mininoarch.py", "mininoarch/__init__.py")
    install(prefix, "--ignore-installed", str(wheel))
    with pytest.raises(SourceProblems) as caught:
        pack(prefix, store=store)
    assert caught.value.problems == [
        "libmini 1.0 (conda): missing: bin/mini-other, lib/pkgconfig/libmini.pc, share/libmini/end.bin, "
        "share/libmini/libmini.conf. "
        "Mend it: conda install --force-reinstall libmini=1.0",
        f"mininoarch 1.0 (conda): overwritten by mininoarch 2.0 (pip): {SITE}/mininoarch/__init__.py. "
        "Mend it: pip uninstall mininoarch; conda install --force-reinstall mininoarch=1.0",
        f"onlyhere 1.0 (pip): missing: {SITE}/onlyhere.py. "
        "Mend it: pip install --force-reinstall --no-deps onlyhere==1.0",
    ]
    assert "lib/pkgconfig/libmini.pc, share/libmini/end.bin and 1 more. Mend it: " in str(caught.value)
    assert "--ignore-missing" in caught.value.remedy
    environment = pack(prefix, store=store, options=PackOptions(ignore_missing=True))
    here = materialise(store, environment.id)
    assert said(here / "bin" / "python", "-c", "import mininoarch; print(mininoarch.f(1))") == "42"


# -- what happened to it before


def test_a_clone_without_package_cache_is_the_same_environment(
    conda_pair: tuple[Path, Path], conda_environment: Environment, store: Store, tmp_path: Path
) -> None:
    """Its files are hard links to those of another environment; what the records say of a cache leads nowhere."""
    prefix = clone_of(conda_pair[0], tmp_path / "clone")
    assert (prefix / "lib" / "libmini.so.1.0.0").read_bytes() != (conda_pair[0] / "lib/libmini.so.1.0.0").read_bytes()
    for path in (prefix / "conda-meta").glob("*.json"):
        record = json.loads(path.read_bytes())
        record["extracted_package_dir"] = record["link"]["source"] = f"/gone/pkgs/{path.stem}"
        path.unlink()
        path.write_text(json.dumps(record))
    assert pack(prefix, store=store).id == conda_environment.id


def test_an_environment_that_was_renamed_is_the_same_environment_and_runs(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """Its files name the folder that it was in: those of conda's packages, of pip's, and of nobody."""
    prefix = clone_of(conda_pair[0], tmp_path / "env")
    install(prefix, str(console_script_wheel(tmp_path)))
    (prefix / "share" / "note.txt").write_text(f"in {prefix}/share")
    (prefix / "conda-meta" / "state").write_text(json.dumps({"env_vars": {"MINE": f"{prefix}/share"}}))
    expected = pack(prefix, store=store)
    moved = prefix.rename(tmp_path / "moved")
    environment = pack(moved, store=store)
    assert all_entries(environment) == all_entries(expected)
    assert environment.id == expected.id
    built = materialise(store, environment.id)
    assert said(built / "bin" / "mini-prefix") == said(built / "bin" / "where") == str(built)
    assert said(built / "bin" / "mininoarch") == f"mininoarch {built}"


def test_an_environment_of_pixi_is_the_same_environment(
    conda_pair: tuple[Path, Path], conda_environment: Environment, store: Store, tmp_path: Path
) -> None:
    """Its records lack what conda adds, there are files of pixi's beside them, no history, and tabs in scripts."""
    prefix = clone_of(conda_pair[0], tmp_path / "project" / ".pixi" / "envs" / "default")
    for path in (prefix / "conda-meta").iterdir():
        if path.suffix != ".json":
            path.unlink()
            continue
        record = json.loads(path.read_bytes())
        for key in ("link", "extracted_package_dir", "package_tarball_full_path", "requested_spec", "requested_specs"):
            record.pop(key, None)
        path.unlink()
        path.write_text(json.dumps(record))
    (prefix / "conda-meta" / "pixi").write_text(
        json.dumps({"manifest_path": str(tmp_path), "environment_name": "default"})
    )
    (prefix / "conda-meta" / "pixi_env_prefix").write_text(str(prefix))
    (prefix / "conda-meta" / ".pixi-environment-fingerprint").write_text("1")
    assert pack(prefix, store=store).id == conda_environment.id
    scripts = [path for path in (prefix / "bin").iterdir() if b"\tsys.exit(" in path.read_bytes()]
    assert scripts, "an installer that is pixi's wrote them"
    for path in scripts:
        text = path.read_text().replace("\t", "    ")
        path.unlink()  # it may be a link to that of another environment
        path.write_text(text)
        path.chmod(0o755)
    assert pack(prefix, store=store).id == conda_environment.id, "as conda writes them"


# -- byte code


def test_nothing_is_compiled_not_even_what_names_its_prefix(built: Path) -> None:
    sysconfig = next((built / SITE).parent.glob("_sysconfigdata*.py"))
    modules = ("libmini.config", "onlyhere", "linked", "fromgit", "developed", "asyncio", "sqlite3", sysconfig.stem)
    assert compiled(built / "bin" / "python", *modules) == []
    assert unlike_its_source(built) == []


@pytest.mark.parametrize("kind", ["missing", "stale", "edited", "of another source"])
def test_the_account_of_what_is_compiled_is_true(built: Path, tmp_path: Path, kind: str) -> None:
    """Break it once: a module without byte code, or with that of something else, is in the account."""
    shutil.copytree(built, tmp_path / "copy", symlinks=True)
    python, module = tmp_path / "copy" / "bin" / "python", tmp_path / "copy" / SITE / "libmini" / "config.py"
    cached = Path(importlib.util.cache_from_source(str(module)))
    if kind == "missing":
        shutil.rmtree(module.parent / "__pycache__")
    elif kind == "stale":
        py_compile.compile(str(module), doraise=True)
        os.utime(module, (1, 1))
    elif kind == "edited":
        module.write_text("PREFIX = 'edited'\n")
    else:
        other = tmp_path / "other.py"
        other.write_text("PREFIX = 'another'\n")
        py_compile.compile(str(other), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    unlike = unlike_its_source(tmp_path / "copy")
    told = compiled(python, "libmini.config")
    if kind == "missing":
        assert len([line for line in told if line.startswith("# created ")]) == 2
    else:
        assert unlike == [cached]
    if kind in ("missing", "stale"):
        assert len([line for line in told if line.startswith("# code object from /")]) == 1 + (kind == "missing")
    else:
        # What an interpreter uses without a look at the source is not in its own account.
        assert told == []


def test_byte_code_of_every_kind_becomes_that_of_its_source(
    environment: Environment, lived_in: Path, tmp_path: Path
) -> None:
    """Stale, hash-based, checked or not, of another source, none at all; and nothing can be written to any of it."""
    prefix = clone_of(lived_in, tmp_path / "env")
    (prefix / SITE / "mine.py").write_text("VALUE = 2\n")
    modes = list(py_compile.PycInvalidationMode)
    for number, path in enumerate(sorted((prefix / SITE).rglob("*.py"))):
        cached = Path(importlib.util.cache_from_source(str(path)))
        cached.unlink(missing_ok=True)
        if number % 5 < 3:
            py_compile.compile(str(path), doraise=True, invalidation_mode=modes[number % 5])
        elif number % 5 == 3:
            py_compile.compile(str(path), doraise=True)
            os.utime(path, (1, 1))
    other = tmp_path / "other.py"
    other.write_text("VALUE = 1\n")
    cached = importlib.util.cache_from_source(str(prefix / SITE / "mine.py"))
    py_compile.compile(str(other), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    store = Store(tmp_path / "store")
    packed = pack_read_only(prefix, store)
    assert unlike_its_source(prefix) != [], "nothing is written into the environment that is packed"

    built = materialise(store, packed.id)
    before = snapshot(built)
    modules = ("mine", "libmini.config", "onlyhere", "linked", "fromgit", "developed")
    assert compiled(built / "bin" / "python", *modules) == []
    assert snapshot(built) == before
    assert unlike_its_source(built) == []
    assert said(built / "bin" / "python", "-B", "-c", "import mine; print(mine.VALUE)") == "2"
    assert environment.manifest.python == packed.manifest.python
    assert {p for p in environment.packages if p.kind != "files"} == {p for p in packed.packages if p.kind != "files"}


def snapshot(prefix: Path) -> dict[str, tuple[int, int]]:
    """What an interpreter that writes byte code changes."""
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in (prefix, *prefix.rglob("*"))}


def test_nothing_that_conda_recorded_is_missing_or_changed(environment: Environment, lived_in: Path) -> None:
    for path in (lived_in / "conda-meta").glob("*.json"):
        record = json.loads(path.read_bytes())
        found = entries(environment, package(environment, record["name"], "conda"))
        assert f"conda-meta/{path.name}" in found
        recorded = {each["_path"]: each for each in record["paths_data"]["paths"] if not each["_path"].endswith(".pyc")}
        assert recorded.keys() - found.keys() == set()
        for name, each in recorded.items():
            entry = found[name]
            if each["path_type"] == "hardlink":
                assert isinstance(entry, File) and entry.digest == each["sha256"], name
            else:
                assert isinstance(entry, Link if each["path_type"] == "softlink" else File), name
