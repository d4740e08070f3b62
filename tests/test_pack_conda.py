"""Packing real conda environments: identity, relocation, what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import conda_pack
import pytest
from click.testing import CliRunner

from envship.cli import main
from envship.errors import NotAnEnvironment, SourceNotFound, SourceProblems
from envship.options import PackOptions
from envship.pack import pack
from envship.sources.conda import canonical_conda_meta
from worker_bootstrap.manifest import File, Link
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER
from worker_bootstrap.store import Store

from .contents import all_entries, contents, entries, package
from .prefixes import clone_of, copy_of, install, onlyhere_wheel, rename_module

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.fixture
def copy(conda_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A conda environment to change."""
    return copy_of(conda_pair[0], tmp_path / "env")


def test_the_same_packages_at_two_prefixes_are_the_same_environment(
    conda_pair: tuple[Path, Path], shared_store: Store, store: Store
) -> None:
    one, other = (pack(prefix, store=where) for prefix, where in zip(conda_pair, (shared_store, store), strict=True))
    assert one.id == other.id
    assert [p.name for p in one.packages] == ["", "libmini", "mininoarch", "python"]
    assert one.python == ".".join(map(str, sys.version_info[:3]))
    assert one.platform == "linux-64"


def test_an_environment_is_packed_by_its_name(
    conda_pair: tuple[Path, Path], shared_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As conda knows it; in Python and in a terminal."""
    prefix = conda_pair[1]
    expected = pack(prefix, store=shared_store).id
    with pytest.raises(SourceNotFound):
        pack(prefix.name, store=shared_store)
    monkeypatch.setenv("CONDA_ENVS_PATH", str(prefix.parent))
    assert pack(prefix.name, store=shared_store).id == expected
    done = CliRunner().invoke(main, ["pack", prefix.name, "--store", str(shared_store.layout.root), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["id"] == expected


def test_relocation_is_undone_to_what_the_package_recorded(conda_pair: tuple[Path, Path], shared_store: Store) -> None:
    environment = pack(conda_pair[0], store=shared_store)
    record = json.loads(next((conda_pair[0] / "conda-meta").glob("libmini-*.json")).read_bytes())
    packed = entries(environment, package(environment, "libmini"))
    checked = 0
    for path in record["paths_data"]["paths"]:
        if "prefix_placeholder" in path:
            entry = packed[path["_path"]]
            assert isinstance(entry, File)
            assert entry.digest == path["sha256"]
            assert entry.relocation == (path["file_mode"], path["prefix_placeholder"])
            checked += 1
    assert checked >= 10
    assert packed["lib/libmini.so"] == Link("lib/libmini.so", "libmini.so.1")


def test_what_an_old_package_recorded_without_digests_is_relocated(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """As conda records packages that have no paths.json: modes and placeholders, nothing else."""
    prefix = clone_of(conda_pair[0], tmp_path / "env")
    record = next((prefix / "conda-meta").glob("libmini-*.json"))
    content = json.loads(record.read_bytes())
    for path in content["paths_data"]["paths"]:
        for key in ("sha256", "sha256_in_prefix", "size_in_bytes"):
            path.pop(key, None)
    content["paths_data"]["paths_version"] = 0
    record.unlink()  # rather than write into a hard link
    record.write_text(json.dumps(content))
    library = prefix / "lib" / "libmini.so.1.0.0"
    built = materialise(store, pack(prefix, store=store).id)
    names = [f"{place}/share:{place}/lib\0".encode() for place in (prefix, built)]
    assert [name in library.read_bytes() for name in names] == [True, False]
    assert [name in (built / "lib" / library.name).read_bytes() for name in names] == [False, True]
    assert (built / "share" / "libmini" / "libmini.conf").read_text() == f"[libmini]\nprefix={built}\n"


def test_an_entry_point_is_the_same_from_every_prefix(conda_pair: tuple[Path, Path], shared_store: Store) -> None:
    environment = pack(conda_pair[0], store=shared_store)
    script = contents(environment, package(environment, "mininoarch"))["bin/mininoarch"]
    assert script.startswith(f"#!{PLACEHOLDER}/bin/python".encode())


def test_a_built_environment_works_and_compiles_nothing(
    conda_pair: tuple[Path, Path], shared_store: Store, tmp_path: Path
) -> None:
    environment = pack(conda_pair[1], store=shared_store)
    prefix = materialise(shared_store, environment.id)
    before = {path: path.stat().st_mtime_ns for path in prefix.rglob("*.pyc")}
    script = "import sys, libmini, json, asyncio; print(sys.prefix, libmini.__file__)"
    clean = {"PATH": "/usr/bin:/bin"}
    said = subprocess.run([prefix / "bin" / "python", "-c", script], env=clean, capture_output=True, check=True)
    assert said.stdout.decode().split() == [str(prefix), f"{prefix}/{SITE}/libmini/__init__.py"]
    for name, expected in (("mini-prefix", f"{prefix}"), ("mininoarch", f"mininoarch {prefix}")):
        said = subprocess.run([prefix / "bin" / name], env=clean, capture_output=True, check=True)
        assert said.stdout.decode().strip() == expected
    assert {path: path.stat().st_mtime_ns for path in prefix.rglob("*.pyc")} == before
    library = (prefix / "lib" / "libmini.so").read_bytes()
    assert f"{prefix}/share:{prefix}/lib\0".encode() in library
    assert library.endswith(b"tail\0")


def test_pip_packages_and_files_of_nobody_come_along(copy: Path, store: Store, tmp_path: Path) -> None:
    install(copy, str(onlyhere_wheel(tmp_path)))
    (copy / "share" / "notes.txt").write_text(f"kept in {copy}/share\n")
    (copy / "share" / "empty").mkdir()
    (copy / "share" / "absolute").symlink_to(copy / "share" / "notes.txt")
    (copy / "share" / "debug.log").write_text("left out")
    environment = pack(copy, store=store)
    mine = package(environment, "onlyhere")
    assert (mine.kind, mine.version) == ("pypi", "1.0")
    files = entries(environment, package(environment, "", "files"))
    assert files["share/absolute"] == Link("share/absolute", "notes.txt")
    assert "share/empty" in files
    assert "share/debug.log" not in files
    note = files["share/notes.txt"]
    assert isinstance(note, File)
    assert note.relocation == ("text", PLACEHOLDER)
    assert contents(environment, package(environment, "", "files"))["conda-meta/history"] == b""
    assert not any(path.endswith("CACHEDIR.TAG") for path in all_entries(environment))


def test_what_is_packed_is_what_conda_pack_would_pack(copy: Path, store: Store, tmp_path: Path) -> None:
    install(copy, onlyhere_wheel(tmp_path))
    strays = ["note", "share/doc/of nobody", "backup~", ".DS_Store", "pkgs/cached/file", "conda-recipes/meta.yaml"]
    for path in map(copy.joinpath, strays):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    theirs = {file.target for file in conda_pack.CondaEnv.from_prefix(str(copy))}
    ours = set(all_entries(pack(copy, store=store)))
    assert {"note", "share/doc/of nobody"} <= ours
    traces = re.compile(r".*\.pyc|conda-meta/history|CACHEDIR\.TAG|\.DS_Store|.*\.dist-info/REQUESTED")
    assert {path for path in theirs - ours if not traces.fullmatch(path)} == set()  # what two installations differ in
    assert {path for path in ours - theirs if not path.endswith(".pyc")} == set()


@pytest.mark.heavy
def test_missing_and_overwritten_files_are_all_listed_and_may_be_ignored(
    copy: Path, store: Store, tmp_path: Path
) -> None:
    (copy / "share" / "libmini" / "libmini.conf").unlink()
    (copy / SITE / "mininoarch" / "__init__.py").unlink()
    wheel = onlyhere_wheel(tmp_path, source="VERSION = '2'\n")
    rename_module(wheel, "onlyhere.py", "libmini/__init__.py")
    install(copy, str(wheel))
    with pytest.raises(SourceProblems) as caught:
        pack(copy, store=store)
    assert caught.value.problems == [
        f"libmini 1.0 (conda): missing: share/libmini/libmini.conf; overwritten by onlyhere 1.0 (pip): "
        f"{SITE}/libmini/__init__.py. Mend it: pip uninstall onlyhere; conda install --force-reinstall libmini=1.0",
        f"mininoarch 1.0 (conda): missing: {SITE}/mininoarch/__init__.py. "
        "Mend it: conda install --force-reinstall mininoarch=1.0",
    ]
    assert "ignore" in caught.value.remedy
    assert store.environments() == []
    environment = pack(copy, store=store, options=PackOptions(ignore_missing=True))
    assert contents(environment, package(environment, "onlyhere"))[f"{SITE}/libmini/__init__.py"] == b"VERSION = '2'\n"
    all_entries(environment)


@pytest.mark.heavy
def test_a_pack_that_knows_most_packages_ends_in_the_same_environment_as_one_that_knows_none(
    copy: Path, store: Store, tmp_path: Path
) -> None:
    """Whatever changes: a file, a package that is gone, one that pip brings, byte code, the interpreter."""
    pack(copy, store=store)

    def remove_package() -> None:
        record = next((copy / "conda-meta").glob("libmini-*.json"))
        for path in json.loads(record.read_bytes())["files"]:
            (copy / path).unlink(missing_ok=True)
        record.unlink()

    changes = [
        lambda: (copy / "share" / "libmini" / "libmini.conf").write_text("changed\n"),
        lambda: (copy / "share" / "mine.txt").write_text(f"of nobody, in {copy}\n"),
        lambda: install(copy, str(onlyhere_wheel(tmp_path))),
        lambda: shutil.rmtree(copy / SITE / "mininoarch" / "__pycache__"),
        remove_package,
        lambda: (copy / "lib" / f"python{SITE.split('/')[1][6:]}" / "this.py").write_text("X = 1\n"),
    ]
    ids = []
    for number, change in enumerate(changes):
        change()
        known = pack(copy, store=store)
        assert known.id == pack(copy, store=Store(tmp_path / f"fresh{number}")).id
        all_entries(known)
        ids.append(known.id)
    assert ids[2] == ids[3]
    assert len(set(ids)) == len(ids) - 1


def test_a_link_out_of_the_prefix_is_named(copy: Path, store: Store) -> None:
    (copy / "share" / "outside").symlink_to("/etc/passwd")
    (copy / "share" / "above").symlink_to("../../other/file")
    with pytest.raises(SourceProblems) as caught:
        pack(copy, store=store, options=PackOptions(ignore_missing=True))
    assert len(caught.value.problems) == 2
    assert all("symbolic link" in problem for problem in caught.value.problems)


def test_variables_of_the_environment_are_packed(copy: Path, store: Store) -> None:
    (copy / "conda-meta" / "state").write_text(json.dumps({"env_vars": {"MINE": "1", "GONE": "***unset***"}}))
    assert pack(copy, store=store).manifest.environ == {"MINE": "1"}


def test_packages_of_the_user_are_said_to_stay(
    copy: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conda's interpreters see them: an environment works here with what is missing there."""
    users = tmp_path / "home" / ".local" / SITE
    users.mkdir(parents=True)
    (users / "theirs.py").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with caplog.at_level(logging.WARNING, "envship"):
        plain = pack(copy, store=store)
    (said_so,) = (record.getMessage() for record in caplog.records)
    assert f"no packages of its user ({users})" in said_so
    assert not [path for path in all_entries(plain) if "theirs" in path]
    caplog.clear()
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    (copy / "more").touch()
    with caplog.at_level(logging.WARNING, "envship"):
        pack(copy, store=store)
    assert not caplog.records


def test_an_environment_without_python_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "env" / "conda-meta").mkdir(parents=True)
    (tmp_path / "env" / "conda-meta" / "history").touch()
    with pytest.raises(NotAnEnvironment, match="python"):
        pack(tmp_path / "env", store=store)


def test_a_damaged_record_is_named(copy: Path, store: Store) -> None:
    (copy / "conda-meta" / "broken-1.0-0.json").write_text("{")
    with pytest.raises(SourceProblems, match=re.escape("conda-meta/broken-1.0-0.json")):
        pack(copy, store=store)


def test_records_lose_what_is_true_of_one_machine_only() -> None:
    record = {
        "name": "x",
        "url": "https://me:secret@host/t/token-1/channel/linux-64/x.conda",
        "channel": "https://host/t/token-1/channel",
        "extracted_package_dir": "/home/me/pkgs/x",
        "link": {"source": "/home/me/pkgs/x", "type": 3},
        "requested_spec": "x",
        "paths_data": {"paths": [{"_path": "a", "sha256": "s", "sha256_in_prefix": "p", "size_in_bytes": 1}]},
    }
    text = canonical_conda_meta(json.dumps(record).encode())
    assert json.loads(text) == {
        "name": "x",
        "url": "https://host/channel/linux-64/x.conda",
        "channel": "https://host/channel",
        "link": {"source": "", "type": 1},
        "paths_data": {"paths": [{"_path": "a", "sha256": "s", "size_in_bytes": 1}]},
    }
    assert canonical_conda_meta(text) == text


def test_an_environment_that_is_reached_by_a_link_is_the_same(copy: Path, store: Store, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copy)
    environment = pack(link, store=store)
    assert environment.id == pack(copy, store=store).id
    assert pack(link, store=store).id == environment.id


@pytest.mark.heavy
def test_an_archive_that_is_reached_by_a_link_is_read_again_when_the_link_leads_elsewhere(
    copy: Path, store: Store, tmp_path: Path
) -> None:
    one, other, link = tmp_path / "one.tar", tmp_path / "other.tar", tmp_path / "link.tar"
    pack(copy, store=store).export(one)
    (copy / "share" / "more").write_text("")
    pack(copy, store=store).export(other)
    link.symlink_to(one)
    assert "share/more" not in all_entries(pack(link, store=store))
    link.unlink()
    link.symlink_to(other)
    os.utime(link, (1, 1), follow_symlinks=False)
    assert "share/more" in all_entries(pack(link, store=store))
    os.replace(one, other)
    assert "share/more" not in all_entries(pack(link, store=store))
