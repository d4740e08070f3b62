"""Archives that conda-pack made, and hostile ones."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import conda_pack
import pytest
import zstandard

from envship.errors import ArchiveInvalid, NotAnEnvironment, SourceProblems
from envship.pack import pack
from envship.sources import archive as archives
from envship.sources.archive import is_archive, unpacked
from worker_bootstrap.manifest import File
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import clone_of, said
from .projects import git, install_editable, project
from .snapshots import untouched


def packed_by_conda_pack(prefix: Path, output: Path, **options: object) -> Path:
    """What conda-pack makes of a conda environment."""
    conda_pack.pack(prefix=str(prefix), output=str(output), compress_level=1, **options)
    return output


def untar(archive: Path, prefix: Path) -> Path:
    prefix.mkdir(parents=True)
    subprocess.run(["tar", "-xf", archive, "-C", prefix], check=True)
    return prefix


def conda_unpack(prefix: Path) -> Path:
    """Let the unpacked environment's own script move it to where it lies."""
    environ = {"PATH": f"{prefix}/bin:/usr/bin:/bin"}
    subprocess.run([prefix / "bin" / "conda-unpack"], env=environ, check=True)
    return prefix


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


@pytest.mark.heavy
def test_a_zip_with_copies_in_the_place_of_links_is_packed_and_runs(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """As conda-pack makes it by default; links to folders, too."""
    made = packed_by_conda_pack(conda_pair[0], tmp_path / "env.zip")
    environment = pack(made, store=store)
    files = all_entries(environment)
    assert isinstance(files["lib/libmini.so"], File) and isinstance(files["lib/minidata/deep/table.txt"], File)
    built = materialise(store, environment.id)
    assert (built / "lib" / "libmini.so").read_bytes() == (built / "lib" / "libmini.so.1.0.0").read_bytes()
    assert said(built / "bin" / "mini-prefix") == said(built / "bin" / "mini-alias") == str(built)
    assert said(built / "bin" / "mininoarch") == f"mininoarch {built}"
    assert said(built / "bin" / "python", "-c", "import libmini; print(libmini.VERSION)") == "1.0"


def test_an_archive_that_was_unpacked_and_moved_by_conda_unpack_is_the_same_environment(
    conda_pair: tuple[Path, Path], archive: Path, shared_store: Store, store: Store, tmp_path: Path
) -> None:
    expected = pack(conda_pair[1], store=shared_store)
    prefix = tmp_path / "somewhere" / "else"
    untar(archive, prefix)
    assert pack(prefix, store=store).id == expected.id
    conda_unpack(prefix)
    assert pack(prefix, store=store).id == expected.id


# What conda-unpack has moved knows nothing of its package cache any more.
@pytest.mark.filterwarnings(r"ignore:\s*Conda-managed packages were found without entries:UserWarning")
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("again.tar", {}),
        pytest.param("again.zip", {"zip_symlinks": True, "arcroot": "inside"}, marks=pytest.mark.heavy),
    ],
)
def test_an_archive_of_what_conda_unpack_moved_is_the_same_environment(
    conda_pair: tuple[Path, Path],
    archive: Path,
    shared_store: Store,
    store: Store,
    tmp_path: Path,
    name: str,
    options: dict[str, object],
) -> None:
    """conda-pack writes the names of its own scripts twice then."""
    expected = pack(conda_pair[1], store=shared_store)
    again = packed_by_conda_pack(conda_unpack(untar(archive, tmp_path / "moved")), tmp_path / name, **options)
    assert pack(again, store=store).id == expected.id


@pytest.mark.heavy
def test_an_archive_for_another_place_is_the_same_environment_and_runs(
    conda_pair: tuple[Path, Path], shared_store: Store, store: Store, tmp_path: Path
) -> None:
    """conda-pack puts the prefix of that place into all files, and no conda-unpack beside them."""
    expected = pack(conda_pair[1], store=shared_store)
    made = packed_by_conda_pack(conda_pair[0], tmp_path / "env.tar", dest_prefix="/opt/app/env")
    environment = pack(made, store=store)
    assert all_entries(environment) == all_entries(expected)
    assert environment.id == expected.id
    built = materialise(store, environment.id)
    assert said(built / "bin" / "mini-prefix") == str(built)
    assert said(built / "bin" / "mininoarch") == f"mininoarch {built}"


def test_of_two_scripts_of_conda_packs_the_later_one_counts(tmp_path: Path, store: Store) -> None:
    """Also where the earlier one has a second name, which keeps its content."""
    members: list[Entry] = [("bin/conda-unpack", tarfile.REGTYPE, b"earlier")]
    members += [("bin/other", tarfile.LNKTYPE, "bin/conda-unpack"), ("bin/conda-unpack", tarfile.REGTYPE, b"later")]
    write_members(tmp_path / "env.tar", members)
    with unpacked(tmp_path / "env.tar", store.layout.tmp) as prefix:
        assert (prefix / "bin" / "conda-unpack").read_bytes() == b"later"
        assert (prefix / "bin" / "other").read_bytes() == b"earlier"


@pytest.mark.parametrize(
    "kinds",
    [(tarfile.REGTYPE, tarfile.SYMTYPE), (tarfile.SYMTYPE, tarfile.REGTYPE), (tarfile.REGTYPE, tarfile.LNKTYPE)],
)
def test_a_script_of_conda_packs_that_is_a_link_once_is_refused(
    tmp_path: Path, store: Store, kinds: Sequence[bytes]
) -> None:
    content: dict[bytes, bytes | str] = {
        tarfile.REGTYPE: b"x",
        tarfile.SYMTYPE: "python",
        tarfile.LNKTYPE: "bin/python",
    }
    write_members(tmp_path / "env.tar", [("bin/conda-unpack", kind, content[kind]) for kind in kinds])
    with pytest.raises(SourceProblems, match="bin/conda-unpack is there twice"):
        pack(tmp_path / "env.tar", store=store)


@pytest.mark.heavy
def test_a_checkout_in_an_archive_goes_along_without_what_git_left(
    conda_pair: tuple[Path, Path], shared_store: Store, tmp_path: Path
) -> None:
    """As it does from the environment that the archive was made of; conda-pack takes all of it."""
    checkout = project(tmp_path, "cloned", "flit")
    (checkout / ".gitignore").write_text("*.csv\n")
    git(checkout, "init")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "first")
    prefix = clone_of(conda_pair[0], tmp_path / "env")
    install_editable(prefix, more=["-e", f"git+file://{checkout}#egg=cloned", "--src", str(prefix / "src")])
    (prefix / "src" / "cloned" / "rows.csv").write_text("1")
    archive = tmp_path / "env.tar.gz"
    packed_by_conda_pack(prefix, archive, ignore_editable_packages=True)
    with tarfile.open(archive) as tar:
        assert {"src/cloned/.git/HEAD", "src/cloned/rows.csv"} <= set(tar.getnames())
    expected = pack(prefix, store=shared_store)
    shutil.rmtree(prefix)
    environment = pack(archive, store=shared_store)
    paths = all_entries(environment)
    assert "src/cloned/cloned/__init__.py" in paths
    assert not any("/.git/" in path or path.endswith(".csv") for path in paths)
    assert environment.id == expected.id
    built = materialise(shared_store, environment.id)
    code = "import cloned; print(cloned.__file__)"
    assert said(built / "bin/python", "-c", code) == f"{built}/src/cloned/cloned/__init__.py"
    shutil.rmtree(built)


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


Entry = tuple[str, bytes, "bytes | str"]
"""A member: its name, its kind, and its content or where it leads."""

EVIL: dict[str, list[Entry]] = {
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
    "there twice": [
        ("bin/python", tarfile.REGTYPE, b"other"),
        ("./bin//python", tarfile.SYMTYPE, "sh"),
        ("lib/bin/activate", tarfile.REGTYPE, b"other"),
    ],
    "at once": [
        ("bin/python/x", tarfile.REGTYPE, b"x"),
        ("bin", tarfile.REGTYPE, b"x"),
        ("bin", tarfile.SYMTYPE, "lib"),
    ],
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the store with a file worth having."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    return folder


@pytest.mark.parametrize(("reason", "entry"), [(reason, entry) for reason, some in EVIL.items() for entry in some])
def test_what_leads_out_of_an_archive_is_refused_and_touches_nothing(
    tmp_path: Path, store: Store, outside: Path, reason: str, entry: Entry
) -> None:
    name, kind, content = entry
    content = content.format(outside=outside) if isinstance(content, str) else content
    path = tmp_path / "env.tar"
    write_members(path, [("lib/bin/activate", tarfile.REGTYPE, b"x"), (name.format(outside=outside), kind, content)])
    with untouched(tmp_path, store.layout.root), pytest.raises(SourceProblems, match=reason) as caught:
        pack(path, store=store)
    assert len(caught.value.problems) == 1
    assert caught.value.source == str(path)
    assert list(store.layout.tmp.iterdir()) == []


UP = [("a/b/c/d/top", tarfile.SYMTYPE, "../../../.."), ("up", tarfile.SYMTYPE, "a/b/c/d/top/../../../..")]
"""Two links: the first leads to the top of the environment, the second from there to the folder beside the store."""

THROUGH_LINKS: dict[str, list[Entry]] = {
    "a file": [*UP, ("up/outside/evil", tarfile.REGTYPE, b"x")],
    "a folder": [*UP, ("up/outside/evil", tarfile.DIRTYPE, b"")],
    "a link": [*UP, ("up/outside/evil", tarfile.SYMTYPE, "x")],
    "a link in a new folder": [*UP, ("up/outside/newdir/evil2", tarfile.SYMTYPE, "x")],
    "both": [*UP, ("up/outside/evil", tarfile.SYMTYPE, "x"), ("up/outside/newdir/evil2", tarfile.SYMTYPE, "x")],
    "the other way round": [("up/outside/evil", tarfile.SYMTYPE, "x"), *reversed(UP)],
    "a hard link": [*UP, ("x", tarfile.REGTYPE, b"x"), ("up/outside/evil", tarfile.LNKTYPE, "x")],
    "a hard link to what is there": [*UP, ("evil", tarfile.LNKTYPE, "up/outside/secret")],
    "nothing but the links": UP,
    "a link to the links": [*UP, ("lib/over", tarfile.SYMTYPE, "../up/outside")],
    "links below links": [
        *(("a", tarfile.SYMTYPE, "x/y/z"), ("x/y/z/w", tarfile.DIRTYPE, b"")),
        *(("a/up", tarfile.SYMTYPE, ".."), ("a/up/../../../evil", tarfile.SYMTYPE, "x")),
    ],
    "a link in the place of a folder of links": [
        *(("d", tarfile.SYMTYPE, "x/y"), ("d/e", tarfile.SYMTYPE, "../../outside"), ("d/e/evil", tarfile.SYMTYPE, "x")),
    ],
    "a harmless link": [("share", tarfile.SYMTYPE, "lib"), ("share/evil", tarfile.SYMTYPE, "x")],
    "a file of the environment": [("a/b/top", tarfile.SYMTYPE, "../.."), ("a/b/top/bin/python", tarfile.REGTYPE, b"x")],
}


IN_BOTH = [name for name, members in THROUGH_LINKS.items() if tarfile.LNKTYPE not in {kind for _, kind, _ in members}]
"""Those that a zip can hold as well, which has no hard links."""


@pytest.mark.parametrize(
    ("kind", "name"), [*(("tar", name) for name in THROUGH_LINKS), *(("zip", name) for name in IN_BOTH)]
)
def test_nothing_is_made_through_a_link(tmp_path: Path, store: Store, outside: Path, kind: str, name: str) -> None:
    """Each link by itself stays inside; one through another leads out, and neither files nor links nor folders follow.

    Looked at is the moment before the archive's folder is removed: what was made in it must not lie elsewhere.
    """
    path = tmp_path / f"env.{kind}"
    write_members(path, THROUGH_LINKS[name])
    with untouched(tmp_path, store.layout.root), pytest.raises(SourceProblems) as caught:
        pack(path, store=store)
    assert caught.value.source == str(path)
    assert list(store.layout.tmp.iterdir()) == []


def test_a_link_is_made_in_real_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: Path) -> None:
    """Were all that is said of links before they are made mistaken, none would be made through another one."""
    monkeypatch.setattr(archives._Extraction, "_link_problem", lambda *_: "")
    for number, members in enumerate(THROUGH_LINKS.values()):
        store = Store(tmp_path / f"store{number}")
        path = tmp_path / f"env{number}.tar"
        write_members(path, members)
        with untouched(tmp_path, store.layout.root):
            try:
                with unpacked(path, store.layout.tmp):
                    pass
            except (ArchiveInvalid, SourceProblems, NotAnEnvironment):
                pass


def test_links_of_real_environments_are_kept(tmp_path: Path, store: Store) -> None:
    """To folders, to files, through another folder, up and down again, and to what is not there."""
    links = {"lib64": "lib", "bin/sh": "../lib/sh", "lib/deep/er/up": "../../../bin", "lib/a.so": "a.so.1"}
    members: list[Entry] = [(name, tarfile.SYMTYPE, target) for name, target in links.items()]
    members += [("lib/a.so.1", tarfile.SYMTYPE, "a.so.1.2"), ("lib/through", tarfile.SYMTYPE, "../lib64/sh")]
    members += [("lib/sh", tarfile.REGTYPE, b"x"), ("lib/deep/er", tarfile.DIRTYPE, b"")]
    for name in ("env.tar", "env.zip"):
        write_members(tmp_path / name, members)
        with unpacked(tmp_path / name, store.layout.tmp) as prefix:
            assert {path: os.readlink(prefix / path) for path in links} == links
            assert os.path.realpath(prefix / "lib/through") == str(prefix / "lib/sh")


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


def write_members(path: Path, members: Sequence[Entry]) -> None:
    """An archive, tar or zip as its name says, with an interpreter and *members*."""
    everything: list[Entry] = [("bin/python", tarfile.REGTYPE, b"#!/bin/sh\n"), *members]
    if path.suffix == ".zip":
        kinds = {tarfile.REGTYPE: stat.S_IFREG, tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK}
        with zipfile.ZipFile(path, "w") as zipped:
            for name, kind, content in everything:
                info = zipfile.ZipInfo(name + ("/" if kind == tarfile.DIRTYPE else ""))
                info.external_attr = (kinds[kind] | 0o755) << 16
                zipped.writestr(info, content)
        return
    with tarfile.open(path, "w") as tar:
        for name, kind, content in everything:
            add(tar, name, kind, content)


def add(tar: tarfile.TarFile, name: str, kind: bytes, content: bytes | str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755
    if isinstance(content, str):
        info.linkname = content
        tar.addfile(info)
    else:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
