"""Links, odd names, modes and sizes: what the files of a prefix are besides their bytes."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from envship.environment import Environment
from envship.errors import SourceProblems
from envship.options import PackOptions
from envship.pack import pack
from worker_bootstrap.manifest import Directory, File, HardLink, Link
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .contents import entries, package
from .prefixes import onlyhere_wheel, said, small_venv
from .read_only import pack_read_only

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
LONG_NAME = "n" * 255
LONG_MODULE = "m" * 252 + ".py"
"""The name of its byte code would be longer than any file's."""
ODD_NAMES = ("two words", "naïve ünïcode", "new\nline", "tab\tand'quote\"", "-option", "*?[x]", LONG_NAME, "日本語.txt")
NO_UTF8 = b"latin-\xe9"


def furnish(prefix: Path) -> None:
    """Put one of every kind below ``share/kinds``."""
    folder = prefix / "share" / "kinds"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text("content")
    links = {
        "relative": "file",
        "up": "../../bin/tool",
        "absolute": str(folder / "file"),
        "to-folder": "inner",
        "absolute-folder": str(prefix / "share"),
        "chain": "relative",
        "dangling": "nothing/there",
        "inner/out-and-in": f"../../../../{prefix.name}/share/kinds/file",
        # Climbs after having gone through a link: from where that leads, not from where it stands.
        "late-climb": "to-deep/../file",
    }
    (folder / "inner" / "deep").mkdir()
    (folder / "inner" / "file").write_text("the one beside deep")
    (folder / "to-deep").symlink_to("inner/deep")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "inner" / "module.py").write_text("VALUE = 1\n")
    os.link(folder / "file", folder / "inner" / "twin")
    os.link(folder / "file", folder / "zz-twin")
    (folder / "nothing-inside" / "nor-here").mkdir(parents=True)
    for name in ODD_NAMES:
        (folder / "inner" / name).write_text(f"{prefix}\n")
    Path(os.fsdecode(os.fsencode(folder) + b"/" + NO_UTF8)).write_text("bytes")
    (prefix / SITE / LONG_MODULE).write_text("x = 1\n")
    tool = prefix / "bin" / "tool"
    tool.write_text(f"#!{prefix}/bin/python\nimport sys; print(sys.argv[0], sys.prefix)\n")
    tool.chmod(0o750)
    (folder / "private").write_text("x")
    (folder / "private").chmod(0o400)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    folder = tmp_path_factory.mktemp("links")
    prefix = small_venv(folder / "env", [onlyhere_wheel(folder)])
    furnish(prefix)
    return prefix, Store(folder / "a" / "longer" / "path" / "to" / "store")


@pytest.fixture(scope="module")
def environment(source: tuple[Path, Store]) -> Environment:
    return pack(source[0], store=source[1])


@pytest.fixture(scope="module")
def kinds(environment: Environment) -> Path:
    """``share/kinds`` of the built prefix."""
    return materialise(environment.store, environment.id) / "share" / "kinds"


def test_links_lead_to_the_same_content(kinds: Path) -> None:
    prefix = kinds.parent.parent
    assert {os.readlink(kinds / name) for name in ("relative", "absolute", "dangling")} == {"file", "nothing/there"}
    assert os.readlink(kinds / "absolute-folder") == ".."
    assert (kinds / "chain").read_text() == "content"
    assert (kinds / "inner" / "out-and-in").read_text() == "content"
    assert (kinds / "late-climb").read_text() == "the one beside deep"
    assert (kinds / "to-folder").resolve() == kinds / "inner"
    assert said(kinds / "up") == f"{kinds}/up {prefix}"
    for path in kinds.rglob("*"):
        if path.is_symlink():
            assert path.name == "dangling" or path.resolve().is_relative_to(prefix)


def test_hard_links_stay_hard_links(environment: Environment, kinds: Path) -> None:
    found = entries(environment, package(environment, "", "files"))
    assert found["share/kinds/inner/twin"] == HardLink("share/kinds/inner/twin", "share/kinds/file")
    assert (kinds / "file").samefile(kinds / "inner" / "twin")
    assert (kinds / "file").samefile(kinds / "zz-twin")
    assert (kinds / "file").stat().st_nlink >= 3


def test_empty_folders_modes_and_odd_names_arrive(environment: Environment, kinds: Path) -> None:
    found = entries(environment, package(environment, "", "files"))
    assert found["share/kinds/nothing-inside/nor-here"] == Directory("share/kinds/nothing-inside/nor-here")
    assert list((kinds / "nothing-inside" / "nor-here").iterdir()) == []
    prefix = kinds.parent.parent
    for name in ODD_NAMES:
        assert (kinds / "inner" / name).read_text() == f"{prefix}\n"
    assert (prefix / SITE / LONG_MODULE).read_text() == "x = 1\n"
    assert NO_UTF8 in os.listdir(os.fsencode(kinds))
    assert (prefix / "bin" / "tool").stat().st_mode & stat.S_IXUSR
    assert not (kinds / "private").stat().st_mode & stat.S_IXUSR
    assert (kinds / "private").read_text() == "x"


# -- what leads outside, and what is no file


@pytest.fixture
def outside(source: tuple[Path, Store], tmp_path: Path) -> Iterator[Path]:
    """Links out of the prefix: to a file, to a folder with links of its own, and to nothing."""
    there = tmp_path / "there"
    (there / "data" / "more").mkdir(parents=True)
    (there / "data" / "table.csv").write_text("1,2\n")
    (there / "data" / "more" / "again.csv").symlink_to("../table.csv")
    (there / "data" / "one.csv").symlink_to(there / "one.csv")
    (there / "one.csv").write_text("1\n")
    folder = source[0] / "share" / "outside"
    folder.mkdir()
    (folder / "data").symlink_to(there / "data")
    (folder / "one").symlink_to(there / "one.csv")
    yield folder
    shutil.rmtree(folder)


def test_links_that_lead_outside_are_all_named_with_the_flag_that_helps(
    source: tuple[Path, Store], outside: Path
) -> None:
    (outside / "gone").symlink_to("/no/such/place")
    (outside / "above").symlink_to("../../../elsewhere")
    with pytest.raises(SourceProblems) as caught:
        pack(source[0], store=source[1])
    named = {problem.split(" is a symbolic link to ")[0] for problem in caught.value.problems}
    assert named == {f"share/outside/{name}" for name in ("above", "data", "gone", "one")}
    assert "--copy-outside-links" in caught.value.remedy
    without = PackOptions((("exclude", "share/outside/*"),))
    assert pack(source[0], store=source[1], options=without).id


def test_what_links_outside_point_to_is_copied_on_demand(source: tuple[Path, Store], outside: Path) -> None:
    environment = pack(source[0], store=source[1], options=PackOptions(copy_outside_links=True))
    found = entries(environment, package(environment, "", "files"))
    assert isinstance(found["share/outside/one"], File)
    again = "share/outside/data/more/again.csv"
    assert found[again] == Link(again, "../table.csv")
    built = materialise(source[1], environment.id) / "share" / "outside"
    assert (built / "data" / "more" / "again.csv").read_text() == "1,2\n"
    assert (built / "data" / "one.csv").read_text() == (built / "one").read_text() == "1\n"
    assert not any(path.is_symlink() for path in (built / "one", built / "data", built / "data" / "one.csv"))


def test_a_link_that_leads_nowhere_or_into_itself_cannot_be_copied(
    source: tuple[Path, Store], outside: Path, tmp_path: Path
) -> None:
    (outside / "gone").symlink_to("/no/such/place")
    (tmp_path / "there" / "data" / "round").symlink_to(tmp_path / "there")
    with pytest.raises(SourceProblems) as caught:
        pack(source[0], store=source[1], options=PackOptions(copy_outside_links=True))
    assert len(caught.value.problems) == 2
    assert "where nothing is" in str(caught.value)
    assert "which holds the link itself" in str(caught.value)


def test_special_files_are_refused_with_the_list(source: tuple[Path, Store]) -> None:
    folder = source[0] / "share" / "special"
    folder.mkdir()
    try:
        os.mkfifo(folder / "fifo")
        expected = ["share/special/fifo is a FIFO", "share/special/socket is a socket"]
        with socket.socket(socket.AF_UNIX) as listening:
            here = os.open(folder, os.O_RDONLY)
            listening.bind(f"/proc/self/fd/{here}/socket")
            os.close(here)
            if os.getuid() == 0:
                os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
                expected.insert(1, "share/special/null is a character device")
            with pytest.raises(SourceProblems) as caught:
                pack(source[0], store=source[1])
        assert sorted(caught.value.problems) == expected
        without = PackOptions((("exclude", "share/special/*"),))
        assert pack(source[0], store=source[1], options=without).id
    finally:
        shutil.rmtree(folder)


def test_a_read_only_prefix_is_packed_all_the_same(
    source: tuple[Path, Store], environment: Environment, tmp_path: Path
) -> None:
    assert pack_read_only(source[0], Store(tmp_path / "store")).id == environment.id


@pytest.mark.heavy
def test_a_file_over_2_gib_arrives(source: tuple[Path, Store], tmp_path: Path) -> None:
    large = source[0] / "share" / "large.bin"
    size_bytes = (2 << 30) + 4097
    with open(large, "wb") as file:
        file.truncate(size_bytes)
        file.seek(size_bytes - 3)
        file.write(b"end")
    try:
        environment = pack(source[0], store=source[1])
        built = materialise(source[1], environment.id) / "share" / "large.bin"
        assert built.stat().st_size == size_bytes
        with open(built, "rb") as file:
            file.seek(-5, os.SEEK_END)
            assert file.read() == b"\0\0end"
    finally:
        large.unlink()
        shutil.rmtree(source[1].layout.envs)
        source[1].layout.envs.mkdir()
