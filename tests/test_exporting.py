"""Environments written as conda-pack writes them: unpacked, activated, moved by conda-unpack, packed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from envship.canonical import Verbatim
from envship.environment import Environment
from envship.errors import ExportError, NotAnEnvironment
from envship.pack import pack
from envship.sources.unpacked import read_exported
from worker_bootstrap.errors import ChunkMissing
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER as OWN_PLACEHOLDER
from worker_bootstrap.store import Store

from .environments import PLACEHOLDER, tiny_environment
from .prefixes import clone_of, console_script_wheel, said, small_venv

ACTIVATE = """
set -e
. {prefix}/bin/activate
{unpack}
. {prefix}/bin/deactivate
. {prefix}/bin/activate  # again: before, scripts in activate.d could not name the prefix
echo $CONDA_PREFIX
mini-prefix
mininoarch
echo $LIBMINI_DATA
python -c 'import libmini; print(libmini.__file__)'
"""

ACTIVATE_VENV = """
set -e
. {prefix}/bin/activate
conda-unpack
echo $CONDA_PREFIX
command -v where
where
python -c 'import sys; print(sys.prefix)'
python -c 'import onlyhere; print(onlyhere.__file__)'
python -c 'import named; print(named.PREFIX)'
"""
NAMED = "import named; print(named.PREFIX)"
LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"


def unpack(archive: Path, prefix: Path) -> Path:
    """As a user would, without us."""
    prefix.mkdir(parents=True)
    command = (
        ["unzip", "-q", archive, "-d", prefix] if archive.suffix == ".zip" else ["tar", "-xf", archive, "-C", prefix]
    )
    subprocess.run(command, check=True)
    return prefix


def says(script: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("suffix", [".tar.gz", pytest.param(".tar.zst", marks=pytest.mark.heavy)])
def test_an_exported_environment_works_where_it_is_unpacked_and_is_the_same_packed_again(
    conda_pair: tuple[Path, Path], shared_store: Store, store: Store, tmp_path: Path, suffix: str
) -> None:
    environment = pack(conda_pair[0], store=shared_store)
    archive = environment.export(tmp_path / f"mine{suffix}")
    prefix = unpack(archive, tmp_path / "some" / "where")
    said = says(ACTIVATE.format(prefix=prefix, unpack="conda-unpack"))
    assert said[:4] == [str(prefix), str(prefix), f"mininoarch {prefix}", f"{prefix}/share/libmini"]
    assert said[4].startswith(f"{prefix}/lib/")
    assert f"{prefix}/share:{prefix}/lib\0".encode() in (prefix / "lib" / "libmini.so").read_bytes()
    assert pack(archive, store=store).id == environment.id


@pytest.mark.parametrize("suffix", [pytest.param(".tar.gz", marks=pytest.mark.heavy), ".tar.zst"])
def test_an_exported_venv_works_where_it_is_unpacked(shared_store: Store, tmp_path: Path, suffix: str) -> None:
    """With its interpreter; nothing of where it came from is left in it."""
    source = small_venv(tmp_path / "env", [console_script_wheel(tmp_path)])
    (source / LIBRARY / "site-packages" / "named.py").write_text(f"PREFIX = {str(source)!r}\n")
    archive = pack(source, store=shared_store).export(tmp_path / f"mine{suffix}")
    shutil.rmtree(source)
    prefix = unpack(archive, tmp_path / "some" / "where")
    script = ACTIVATE_VENV.format(prefix=prefix)
    code = f"{prefix}/{LIBRARY}/site-packages/onlyhere.py"
    assert says(script) == [str(prefix), f"{prefix}/bin/where", str(prefix), str(prefix), code, str(prefix)]


def test_an_exported_venv_is_the_same_packed_again_and_runs(store: Store, tmp_path: Path) -> None:
    """From the archive, from the folder that it was unpacked into, and when conda-unpack has moved that."""
    source = small_venv(tmp_path / "env", [console_script_wheel(tmp_path)])
    (source / LIBRARY / "site-packages" / "named.py").write_text(f"PREFIX = {str(source)!r}\n")
    (source / "share").mkdir(exist_ok=True)
    (source / "share" / "odd.txt").write_text(f"{source}, and not {OWN_PLACEHOLDER}")
    (source / "share" / "app.log").write_text("left out")
    environment = pack(source, store=store)
    archive = environment.export(tmp_path / "mine.tar.zst")
    shutil.rmtree(source)
    assert pack(archive, store=store).id == environment.id
    prefix = unpack(archive, tmp_path / "some" / "where")
    assert pack(prefix, store=store).id == environment.id
    (tmp_path / "link").symlink_to(prefix)
    assert pack(tmp_path / "link", store=store).id == environment.id
    says(f"PATH={prefix}/bin:$PATH; conda-unpack")
    (prefix / "share" / "app.log").write_text("left out")
    assert pack(prefix, store=store).id == environment.id
    built = materialise(store, environment.id)
    assert said(built / "bin" / "where") == said(built / "bin" / "python", "-c", NAMED) == str(built)
    assert (built / "share" / "odd.txt").read_text() == f"{built}, and not {OWN_PLACEHOLDER}"


def test_an_exported_venv_of_condas_interpreter_is_the_same_packed_again(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """The settings of OpenSSL stay part of the interpreter."""
    base = clone_of(conda_pair[0], tmp_path / "base")
    (base / "ssl").mkdir(exist_ok=True)
    (base / "ssl" / "openssl.cnf").write_text("# ours")
    said(base / "bin" / "python", "-m", "venv", "--without-pip", str(tmp_path / "env"))
    environment = pack(tmp_path / "env", store=store)
    assert pack(environment.export(tmp_path / "mine.tar"), store=store).id == environment.id


@pytest.mark.heavy
def test_files_of_no_package_name_the_prefix_in_what_is_packed_again(
    conda_pair: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    """Of a conda environment, text gets envship's own placeholder, which no package recorded."""
    source = clone_of(conda_pair[0], tmp_path / "env")
    (source / "share" / "note.txt").write_text(f"in {source}")
    environment = pack(source, store=store)
    archive = environment.export(tmp_path / "mine.tar")
    assert pack(archive, store=store).id == environment.id


def test_an_export_that_needs_an_interpreter_elsewhere_is_refused(store: Store, tmp_path: Path) -> None:
    """No file of this machine comes along in the name of a folder that was unpacked."""
    prefix = tmp_path / "env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").symlink_to(sys.executable)
    (prefix / "conda-meta").mkdir()
    (prefix / "conda-meta" / "history").touch()
    with pytest.raises(NotAnEnvironment, match="which is not in it"):
        pack(prefix, store=store)


def test_an_exported_interpreter_of_conda_names_its_prefix_as_its_package_does(store: Store, tmp_path: Path) -> None:
    """conda-unpack, which runs in it, does not list it."""
    interpreter = b"\x7fELF\0" + PLACEHOLDER.encode() + b"/lib\0"
    files = {"bin/python*": (interpreter, "binary"), "lib/libpython.so": (PLACEHOLDER.encode() + b"\0", "binary")}
    environment = Environment(store.read_manifest(tiny_environment(store, files)), store)
    prefix = unpack(environment.export(tmp_path / "tiny.tar"), tmp_path / "env")
    treatment = read_exported(prefix).treatment("bin/python", Verbatim())
    assert treatment((prefix / "bin" / "python").read_bytes()) == (interpreter, ("binary", PLACEHOLDER), None, "")


@pytest.mark.parametrize("name", ["tiny.tar.gz", "tiny.tar.zst", "tiny.tar", "tiny.zip"])
def test_every_kind_of_archive_holds_every_kind_of_entry_and_is_the_same_each_time(
    store: Store, tmp_path: Path, name: str
) -> None:
    environment = Environment(store.read_manifest(tiny_environment(store)), store)
    archive = environment.export(tmp_path / name)
    prefix = unpack(archive, tmp_path / "env")
    assert (prefix / "bin" / "alias").readlink() == Path("tool")
    assert (prefix / "bin" / "tool").stat().st_mode & 0o111 == 0o111
    assert (prefix / "bin" / "tool-1").read_bytes() == (prefix / "bin" / "tool").read_bytes()
    assert (prefix / "lib" / "data" / "large.bin").read_bytes() == bytes(range(256)) * 10
    assert (prefix / "lib" / "empty").read_bytes() == b""
    assert (prefix / "lib" / "nothing-inside").is_dir()
    if not name.endswith(".zip"):  # unzip makes two characters of a newline
        assert (prefix / "share" / "naïve name\nwith newline.txt").read_text() == "text"
    assert "bin/tool" not in (prefix / "bin" / "conda-unpack").read_text()  # its interpreter was left to PATH instead
    assert f"('lib/libx.so', '{PLACEHOLDER}', 'binary')" in (prefix / "bin" / "conda-unpack").read_text()
    assert environment.export(tmp_path / f"again-{name}").read_bytes() == archive.read_bytes()


def test_an_export_that_fails_leaves_nothing(store: Store, tmp_path: Path) -> None:
    environment = Environment(store.read_manifest(tiny_environment(store)), store)
    target = tmp_path / "tiny.tar.gz"
    target.write_text("before")
    store.layout.chunk(environment.packages[0].chunks[-1].digest, ".zst").unlink()
    with pytest.raises(ChunkMissing):
        environment.export(target)
    assert target.read_text() == "before"
    with pytest.raises(ExportError, match="rar"):
        environment.export(tmp_path / "tiny.rar")
    taken = Environment(store.read_manifest(tiny_environment(store, {"bin/conda-unpack": b""})), store)
    with pytest.raises(ExportError, match="conda-unpack"):
        taken.export(target)
    odd = Environment(store.read_manifest(tiny_environment(store, {"lib/\udcff": b""})), store)
    with pytest.raises(ExportError, match="zip"):
        odd.export(tmp_path / "odd.zip")
    for write, name in ((odd.export, "it.tar.gz"), (odd.save, "it.envship")):
        with pytest.raises(
            ExportError, match=f"nowhere/{name} cannot be written: .*nowhere: No such file or directory"
        ):
            write(tmp_path / "nowhere" / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tiny.tar.gz"]
    with tarfile.open(odd.export(tmp_path / "odd.tar.gz")) as tar:
        assert "lib/\udcff" in tar.getnames()
