"""Archives that conda-pack made, and hostile ones."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import conda_pack
import pytest
import zstandard

from envship.pack import pack
from envship.sources import archive as archives
from envship.sources.archive import is_archive, unpacked
from worker_bootstrap.errors import ArchiveInvalid, NotAnEnvironment, SourceProblems
from worker_bootstrap.store import Store

from .contents import all_entries


def packed_by_conda_pack(prefix: Path, output: Path, **options: object) -> Path:
    """What conda-pack makes of a conda environment."""
    conda_pack.pack(prefix=str(prefix), output=str(output), compress_level=1, **options)
    return output


@pytest.fixture(scope="module")
def archive(conda_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_by_conda_pack(conda_pair[0], tmp_path_factory.mktemp("archive") / "env.tar.gz")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("env.tar.gz", {}),
        pytest.param("env.tar.bz2", {}, marks=pytest.mark.heavy),
        pytest.param("env.tar.zst", {"arcroot": "inside"}, marks=pytest.mark.heavy),
        pytest.param("env.zip", {"zip_symlinks": True}, marks=pytest.mark.heavy),
        ("env.no-archive", {}),
    ],
)
def test_an_archive_is_the_environment_that_it_was_made_of(
    conda_pair: tuple[Path, Path],
    shared_store: Store,
    store: Store,
    tmp_path: Path,
    name: str,
    options: dict[str, object],
) -> None:
    expected = pack(conda_pair[1], store=shared_store)
    made = packed_by_conda_pack(conda_pair[0], tmp_path / name, **options)
    before = sorted(path for path in tmp_path.rglob("*") if store.layout.root not in path.parents)
    environment = pack(made, store=store)
    assert all_entries(environment) == all_entries(expected)
    assert environment.id == expected.id
    assert sorted(path for path in tmp_path.rglob("*") if store.layout.root not in path.parents) == before
    assert list(store.layout.tmp.iterdir()) == []


def test_an_archive_that_was_unpacked_and_moved_by_conda_unpack_is_the_same_environment(
    conda_pair: tuple[Path, Path], archive: Path, shared_store: Store, store: Store, tmp_path: Path
) -> None:
    expected = pack(conda_pair[1], store=shared_store)
    prefix = tmp_path / "somewhere" / "else"
    prefix.mkdir(parents=True)
    subprocess.run(["tar", "-xf", archive, "-C", prefix], check=True)
    assert pack(prefix, store=store).id == expected.id
    environ = {"PATH": f"{prefix}/bin:/usr/bin:/bin"}
    subprocess.run([prefix / "bin" / "conda-unpack"], env=environ, check=True)
    assert pack(prefix, store=store).id == expected.id


def test_an_archive_packed_before_is_not_opened_again(archive: Path, store: Store) -> None:
    stages: list[str] = []
    first = pack(archive, store=store, report=lambda stage, done_bytes, total_bytes: stages.append(stage))
    assert "pack" in stages
    stages.clear()
    assert pack(archive, store=store, report=lambda stage, *_: stages.append(stage)).id == first.id
    assert stages == []


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst", "tar.bz2", "tar", "zip"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, store: Store, kind: str, share: float) -> None:
    whole = tmp_path / f"env.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(whole, "w") as zipped:
            for number in range(20):
                zipped.writestr(f"lib/file{number}", os.urandom(3000))
    else:
        write_tar(whole, {f"lib/file{number}": os.urandom(3000) for number in range(20)})
    with pytest.raises(NotAnEnvironment):  # it is sound: only the interpreter does not run
        pack(whole, store=store)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * share) or 300])
    assert is_archive(whole)
    with pytest.raises(ArchiveInvalid, match=r"env\."):
        pack(whole, store=store)
    assert list(store.layout.tmp.iterdir()) == []


EVIL: dict[str, list[tuple[str, bytes, bytes | str]]] = {
    "leads out of the environment": [
        ("../evil", tarfile.REGTYPE, b"x"),
        ("lib/../../evil", tarfile.REGTYPE, b"x"),
        ("{outside}/evil", tarfile.REGTYPE, b"x"),
        ("../evil", tarfile.DIRTYPE, b""),
    ],
    "outside of the environment": [
        ("link", tarfile.SYMTYPE, "{outside}"),
        ("lib/link", tarfile.SYMTYPE, "../../evil"),
        ("link/evil", tarfile.SYMTYPE, "../../../evil"),
    ],
    "is a hard link to": [
        ("evil", tarfile.LNKTYPE, "{outside}/secret"),
        ("evil", tarfile.LNKTYPE, "../secret"),
        ("evil", tarfile.LNKTYPE, "bin/not-there"),
    ],
    "neither a file, a folder nor a link": [
        ("pipe", tarfile.FIFOTYPE, b""),
        ("null", tarfile.CHRTYPE, b""),
        ("disk", tarfile.BLKTYPE, b""),
    ],
    "there twice": [("bin/python", tarfile.REGTYPE, b"other"), ("./bin//python", tarfile.SYMTYPE, "sh")],
    "at once": [
        ("bin/python/x", tarfile.REGTYPE, b"x"),
        ("bin", tarfile.REGTYPE, b"x"),
        ("bin", tarfile.SYMTYPE, "lib"),
    ],
}


@pytest.mark.parametrize(("reason", "entry"), [(reason, entry) for reason, some in EVIL.items() for entry in some])
def test_what_leads_out_of_an_archive_is_refused_and_touches_nothing(
    tmp_path: Path, store: Store, reason: str, entry: tuple[str, bytes, bytes | str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    name, kind, content = entry
    path = tmp_path / "env.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "bin/python", tarfile.REGTYPE, b"#!/bin/sh\n")
        add(
            tar,
            name.format(outside=outside),
            kind,
            content.format(outside=outside) if isinstance(content, str) else content,
        )
        add(tar, "lib/fine", tarfile.REGTYPE, b"fine")
    with pytest.raises(SourceProblems, match=reason) as caught:
        pack(path, store=store)
    assert len(caught.value.problems) == 1
    assert caught.value.source == str(path)
    assert [item.name for item in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["env.tar", "outside", "store"]
    assert list(store.layout.tmp.iterdir()) == []


def test_nothing_is_written_through_a_link(tmp_path: Path, store: Store) -> None:
    """Links inside the environment, one through another, to a place above it: files never follow them."""
    path = tmp_path / "env.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "bin/python", tarfile.REGTYPE, b"#!/bin/sh\n")
        add(tar, "a/b/top", tarfile.SYMTYPE, "../..")
        add(tar, "up", tarfile.SYMTYPE, "a/b/top/../..")
        add(tar, "up/evil", tarfile.REGTYPE, b"x")
        add(tar, "a/b/top/bin/python", tarfile.REGTYPE, b"x")
    with pytest.raises(SourceProblems) as caught:
        pack(path, store=store)
    assert len(caught.value.problems) == 2
    assert not list(tmp_path.rglob("evil"))


def test_modes_are_no_more_than_executable(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "env.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("bin/python")
        info.mode, info.size, info.uid = 0o6777, 1, 12345
        tar.addfile(info, io.BytesIO(b"x"))
    with unpacked(path, store.layout.tmp) as prefix:
        node = (prefix / "bin" / "python").stat()
        assert stat.S_IMODE(node.st_mode) & ~0o022 == 0o755
        assert node.st_uid == os.getuid()
        assert stat.S_IMODE(prefix.parent.stat().st_mode) == 0o700


def test_bombs_are_refused_before_they_fill_the_disk(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALLOWANCE_BYTES", 1 << 20)
    tarred, zipped, header = tmp_path / "env.tar.zst", tmp_path / "env.zip", tmp_path / "header.tar.zst"
    write_tar(tarred, {"bin/python": bytes(64 << 20)})
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as bomb:
        for number in range(8):
            bomb.writestr(f"bin/python{number}", bytes(32 << 20))
    info = tarfile.TarInfo("x" * 20)
    info.pax_headers = {"comment": "y" * (20 << 20)}
    header.write_bytes(zstandard.compress(info.tobuf(tarfile.PAX_FORMAT)))
    for path in (tarred, zipped, header):
        assert path.stat().st_size < 1 << 20
        # Not by `pack`, which does this in a process of its own, with the allowance that real archives need.
        with pytest.raises(ArchiveInvalid, match=r"times its size|header"), unpacked(path, store.layout.tmp):
            pass
    assert list(store.layout.tmp.iterdir()) == []


def test_what_is_no_environment_is_said(tmp_path: Path, store: Store) -> None:
    write_tar(tmp_path / "env.tar.gz", {"readme": b"nothing here"})
    with pytest.raises(NotAnEnvironment, match="bin/python"):
        pack(tmp_path / "env.tar.gz", store=store)
    (tmp_path / "env.txt").write_text("no archive")
    with pytest.raises(NotAnEnvironment):
        pack(tmp_path / "env.txt", store=store)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A tar, compressed as its name says."""
    raw = io.BytesIO()
    kind = path.suffix[1:] if path.suffix in (".gz", ".bz2") else ""
    with tarfile.open(fileobj=raw, mode=f"w:{kind}") as tar:
        for name, data in files.items():
            add(tar, name, tarfile.REGTYPE, data)
    data = raw.getvalue()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


def add(tar: tarfile.TarFile, name: str, kind: bytes, content: bytes | str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755
    if isinstance(content, str):
        info.linkname = content
        tar.addfile(info)
    else:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
