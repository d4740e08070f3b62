"""Editable installs in every form: the source tree as it is now comes along, and imports find it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import editables
import pytest

from envship.environment import Environment
from envship.errors import SourceProblems
from envship.options import PackOptions
from envship.pack import pack
from worker_bootstrap.manifest import File, Link
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import PLACEHOLDER
from worker_bootstrap.store import Store

from .byte_code import compiled, unlike_its_source
from .contents import all_entries, contents, entries, package
from .prefixes import onlyhere_wheel, said, small_venv
from .projects import git, install_editable, project

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
PLACE = "share/envship/projects"
EXACT_SETUP = '[tool.setuptools]\npackages = ["viafinder"]\n'
STRICT_SETUP = '[tool.setuptools]\npackages = ["viastrict"]\npackage-data = {viastrict = ["*.txt"]}\n'


class Lab:
    """A venv with a project of every form, in the folder *home*."""

    def __init__(self, home: Path, store: Store) -> None:
        self.store = store
        self.home = home
        self.prefix = home / "viasrc" / ".venv"

    @classmethod
    def make(cls, folder: Path, store: Store) -> Lab:
        self = cls(folder / "home", store)
        # The environment lies in a project, as many do.
        small_venv(self.prefix, [onlyhere_wheel(folder)])
        roots = [
            project(self.home, "viasrc", package="src/viasrc"),
            project(self.home, "viafinder", more=EXACT_SETUP),
            project(self.home, "viahatch", "hatchling"),
            project(self.home, "viaexact", "hatchling-exact", package="src/viaexact"),
            project(self.home, "viaflit", "flit"),
        ]
        install_editable(self.prefix, *roots)
        strict = project(self.home, "viastrict", more=STRICT_SETUP)
        install_editable(self.prefix, strict, settings="editable_mode=strict")
        site = self.prefix / SITE
        # The finder of hatchling needs it.
        shutil.copytree(Path(editables.__file__).parent, site / "editables")
        # As with `conda develop`; what a person writes; and an egg-link beside the line of `setup.py develop`.
        for name in ("viaconda", "viaconda2"):
            conda_develop(site, project(self.home, name))
        hand = project(self.home, "viahand", package="lib/viahand")
        (site / "byhand.pth").write_text(f"# mine\nimport sys; sys.byhand = 1\ninside\n{hand}/../viahand/lib\n")
        (site / "inside").mkdir()
        (site / "inside" / "viainside.py").write_text("VALUE = 1\n")
        develop = project(self.home, "viadevelop")
        (site / "easy-install.pth").write_text(f"{develop}\n")
        (site / "viadevelop.egg-link").write_text(f"{develop}\n.")
        info = develop / "viadevelop.egg-info"
        info.mkdir()
        (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: viadevelop\nVersion: 1.0\n")
        return self

    def moved(self, home: Path) -> Lab:
        """The same projects and the same environment at another place."""
        shutil.copytree(self.home, home, symlinks=True)
        old, new = os.fsencode(self.home), os.fsencode(home)
        for path in home.rglob("*"):
            if path.is_symlink() and os.readlink(path).startswith(str(self.home)):
                target = os.readlink(path).replace(str(self.home), str(home))
                path.unlink()
                path.symlink_to(target)
            elif path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
                path.write_bytes(path.read_bytes().replace(old, new))
        return Lab(home, self.store)

    def pack(self, **options: object) -> Environment:
        return pack(self.prefix, store=self.store, options=PackOptions(**options))  # type: ignore[arg-type]


def conda_develop(site: Path, root: Path) -> None:
    """What ``conda develop`` does, a part of conda-build: the path's line at the end of one file."""
    with open(site / "conda.pth", "a+") as file:
        file.seek(0)
        if f"{root}\n" not in file.readlines():
            file.write(f"{root}\n")


ALL = (
    "viasrc",
    "viafinder",
    "viahatch",
    "viaexact",
    "viaflit",
    "viastrict",
    "viaconda",
    "viaconda2",
    "viahand",
    "viadevelop",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("projects")
    return Lab.make(folder, Store(folder / "store"))


@pytest.fixture(scope="module")
def environment(lab: Lab) -> Environment:
    return lab.pack()


@pytest.fixture(scope="module")
def built(lab: Lab, environment: Environment) -> Path:
    return materialise(lab.store, environment.id)


@pytest.mark.parametrize("name", ALL)
def test_the_project_is_imported_from_where_it_was_built(built: Path, name: str) -> None:
    code = f"import {name}, {name}.inner as i, os; print({name}.__file__); print(open(i.HERE + '/data.txt').read())"
    file, text = said(built / "bin/python", "-c", code).splitlines()
    assert file.startswith(f"{built}/{PLACE}/")
    assert text == f"text of {name}"


def test_no_link_names_this_machine(lab: Lab, environment: Environment, built: Path) -> None:
    for path in (built / SITE).iterdir():
        if path.is_file():
            assert os.fsencode(lab.home) not in path.read_bytes(), path
    kinds = {p.name: p.kind for p in environment.packages}
    assert {name for name, kind in kinds.items() if kind == "project"} == {
        *("viasrc", "viafinder", "viahatch", "viaexact", "viaflit", "viastrict"),
        *("conda", "byhand", "easy-install"),
    }


def test_lines_that_lead_inside_or_import_are_left_alone(built: Path, environment: Environment) -> None:
    text = contents(environment, package(environment, "byhand"))[f"{SITE}/byhand.pth"].decode()
    assert text == f"# mine\nimport sys; sys.byhand = 1\ninside\n{PLACEHOLDER}/{PLACE}/byhand\n"
    code = "import sys, viainside; print(sys.byhand, viainside.__file__)"
    assert said(built / "bin/python", "-c", code) == f"1 {built}/{SITE}/inside/viainside.py"


def test_metadata_of_what_setup_py_developed_is_found(built: Path) -> None:
    code = "from importlib.metadata import version; print(version('viadevelop'), version('viasrc'))"
    assert said(built / "bin/python", "-c", code) == "1.0 1.0"


def test_only_the_package_goes_along_and_not_what_lies_beside_it(environment: Environment) -> None:
    paths = all_entries(environment)
    assert f"{PLACE}/viasrc/src/viasrc/data.txt" in paths
    assert not any("/.venv/" in path or path.startswith(f"{PLACE}/viasrc/unrelated") for path in paths)


def test_projects_compile_nothing_when_they_are_imported(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.pyc")}
    said(built / "bin/python", "-c", "import " + ", ".join(ALL))
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.pyc")} == before


def test_one_changed_line_ships_that_files_chunk(lab: Lab, environment: Environment) -> None:
    """The listing, the module and its byte code; no other package is touched."""
    module = lab.home / "viahatch" / "viahatch" / "__init__.py"
    before = module.read_text()
    module.write_text(before.replace("VALUE = 1", "VALUE = 2"))
    edited = lab.pack()
    module.write_text(before)
    changed = {p.name for p in set(edited.packages) - set(environment.packages)}
    new = set(edited.chunks) - set(environment.chunks)
    assert changed == {"viahatch"}
    assert sum(edited.chunks[digest] for digest in new) < 1 << 20
    built = materialise(lab.store, edited.id)
    assert said(built / "bin/python", "-c", "import viahatch; print(viahatch.VALUE)") == "2"


def test_a_project_elsewhere_is_the_same_project(lab: Lab, environment: Environment, tmp_path: Path) -> None:
    """Its folder's name and place are its user's business."""
    moved = lab.moved(tmp_path / "another" / "place").pack()
    assert {(p.name, p.listing) for p in environment.packages} == {(p.name, p.listing) for p in moved.packages}
    assert moved.id == environment.id


def test_projects_may_stay_away(lab: Lab) -> None:
    environment = lab.pack(ignore_editable=True)
    assert not any(path.startswith("share/envship") for path in all_entries(environment))
    assert not any(p.name == "viasrc" and p.chunks for p in environment.packages)


# -- what of a tree goes along


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository with what repositories hold."""
    root = project(tmp_path, "mine", package="src/mine")
    (root / ".gitignore").write_text("data/\n_version.py\n*.so\n.env\n*.bin\nsrc/mine/_generated/\n")
    folder = root / "src" / "mine"
    (folder / "_version.py").write_text("version = '1'\n")
    (folder / "_ext.so").write_bytes(b"compiled")
    (folder / ".env").write_text("SECRET=1")
    (folder / "data").mkdir()
    (folder / "data" / "rows.csv").write_bytes(b"x" * (3 << 20))
    (folder / "data" / "sandbox").mkdir()
    (folder / "data" / "sandbox" / "pyvenv.cfg").write_text("an environment")
    (folder / "data" / "sandbox" / "site.py").write_text("its module")
    (folder / "_generated" / "more").mkdir(parents=True)
    (folder / "_generated" / "api.py").write_text("VALUE = 1\n")
    (folder / "_generated" / "more" / "rows.csv").write_text("no module")
    (folder / ".mypy_cache").mkdir()
    (folder / ".mypy_cache" / "x.json").write_text("{}")
    (folder / "untracked.py").write_text("")
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "first")
    (folder / "new.py").write_text("# not committed\n")
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    folder = tmp_path_factory.mktemp("plain")
    return small_venv(folder / "env", [onlyhere_wheel(folder)]), Store(folder / "store")


@pytest.fixture
def prefix(plain: tuple[Path, Store], tree: Path) -> Iterator[Path]:
    """A venv that links to the tree."""
    path_file = plain[0] / SITE / "mine.pth"
    path_file.write_text(f"{tree}/src\n")
    yield plain[0]
    path_file.unlink()


@pytest.fixture
def store(plain: tuple[Path, Store]) -> Store:
    """One for all, so that the interpreter is packed once."""
    return plain[1]


def test_what_git_ignores_stays_except_for_modules_and_large_data_is_said(
    tree: Path, prefix: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "envship"):
        environment = pack(prefix, store=store)
    files = {path.removeprefix(f"{PLACE}/mine/mine/") for path in entries(environment, package(environment, "mine"))}
    assert {"__init__.py", "_version.py", "_ext.so", "untracked.py", "new.py", "data.txt"} <= files
    assert "_generated/api.py" in files and "_generated/more/rows.csv" not in files
    assert not any(path.startswith(("data/", ".env", ".mypy_cache")) or ".git" in path for path in files)
    built = materialise(store, environment.id)
    assert said(built / "bin/python", "-c", "import mine._generated.api as api; print(api.VALUE)") == "1"
    shutil.rmtree(built)
    (said_so,) = (record.getMessage() for record in caplog.records if "stays here" in record.getMessage())
    assert "mine/data (3.00 MiB)" in said_so


def test_a_module_that_is_new_in_an_ignored_folder_is_seen(tree: Path, prefix: Path, store: Store) -> None:
    """Though nothing of that folder went along before; whatever else happens in there changes nothing."""
    before = pack(prefix, store=store)
    (tree / "src" / "mine" / "data" / "more.csv").write_text("1\n")
    assert pack(prefix, store=store).id == before.id
    (tree / "src" / "mine" / "data" / "late.py").write_text("VALUE = 1\n")
    assert f"{PLACE}/mine/mine/data/late.py" in all_entries(pack(prefix, store=store))


@pytest.mark.parametrize("why", ["no repository", "no git"])
def test_without_git_what_gitignore_says_stays_all_the_same(
    tree: Path, prefix: Path, store: Store, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_git = all_entries(pack(prefix, store=store))
    if why == "no repository":
        shutil.rmtree(tree / ".git")
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    (tree / "src" / "mine" / "new.py").write_text("# to be looked at again\n")
    assert all_entries(pack(prefix, store=store)).keys() == with_git.keys()


def test_what_submodules_ignore_stays_and_their_rules_may_be_edited(
    tree: Path, prefix: Path, store: Store, tmp_path: Path
) -> None:
    library = project(tmp_path, "library")
    (library / ".gitignore").write_text("data/\n")
    git(library, "init")
    git(library, "add", "-A")
    git(library, "commit", "-m", "first")
    git(tree, "-c", "protocol.file.allow=always", "submodule", "add", str(library), "src/vendored")
    vendored = tree / "src" / "vendored"
    (vendored / "data").mkdir()
    (vendored / "data" / "big.bin").write_bytes(bytes(3 << 20))
    environment = pack(prefix, store=store)
    files = all_entries(environment)
    assert f"{PLACE}/mine/vendored/library/__init__.py" in files
    assert not any(path.endswith("big.bin") for path in files)
    (vendored / ".gitignore").write_text("nothing\n")
    assert f"{PLACE}/mine/vendored/data/big.bin" in all_entries(pack(prefix, store=store))


def test_a_checkout_in_the_environment_goes_along_without_what_git_left(
    plain: tuple[Path, Store], tmp_path: Path
) -> None:
    """``pip install -e git+…`` clones into the environment: two clones are one environment, and nobody's no more."""
    checkout = project(tmp_path / "repository", "cloned", "flit").parent
    (checkout / ".gitignore").write_text("*.csv\n")
    git(checkout, "init")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "first")
    ids = set()
    for name in ("one", "another"):
        prefix = small_venv(tmp_path / name, [])
        install_editable(prefix, more=["-e", f"git+file://{checkout}#egg=cloned&subdirectory=cloned"])
        (prefix / "src" / "cloned" / "rows.csv").write_text(name)
        environment = pack(prefix, store=plain[1])
        ids.add(environment.id)
    assert len(ids) == 1
    files = entries(environment, package(environment, "cloned", "project"))
    assert {"src/cloned/.gitignore", "src/cloned/cloned/cloned/__init__.py"} <= files.keys()
    assert not any("/.git/" in path or path.endswith(".csv") for path in all_entries(environment))
    built = materialise(plain[1], environment.id)
    code = "import cloned; print(cloned.__file__)"
    assert said(built / "bin/python", "-c", code) == f"{built}/src/cloned/cloned/cloned/__init__.py"


@pytest.mark.heavy
def test_modules_in_folders_of_the_environment_are_compiled_once(store: Store, tmp_path: Path) -> None:
    """In checkouts, by path files and by modules; in folders of one's own; also those that name their prefix."""
    ids = set()
    for place in ("one", "another"):
        prefix = small_venv(tmp_path / place / "env", [])
        repositories = [
            project(tmp_path / place, "viaflit", "flit"),
            project(tmp_path / place, "viafinder", more=EXACT_SETUP),
        ]
        for root in repositories:
            git(root, "init")
            git(root, "add", "-A")
            git(root, "commit", "-m", "first")
        more = [argument for root in repositories for argument in ("-e", f"git+file://{root}#egg={root.name}")]
        install_editable(prefix, more=more)
        texts = {"mylibs/plain.py": "", "mylibs/named.py": f"PREFIX = {str(prefix)!r}\n", "opt/x/pkg/inner.py": ""}
        texts |= {"alone/only.py": f"PREFIX = {str(prefix)!r}\n", "unsearched/module.py": ""}
        for name, text in texts.items():
            (prefix / name).parent.mkdir(parents=True, exist_ok=True)
            (prefix / name).write_text(text)
        (prefix / SITE / "mine.pth").write_text(f"{prefix}/mylibs\n{prefix}/alone\n../../../opt/x\n")
        environment = pack(prefix, store=store)
        ids.add(environment.id)
        shutil.rmtree(tmp_path / place)
    assert len(ids) == 1
    code = {path for path in all_entries(environment) if path.endswith(".pyc") and not path.startswith("lib/")}
    assert {os.path.dirname(os.path.dirname(path)) for path in code} == {
        *("src/viaflit/viaflit", "src/viafinder/viafinder", "mylibs", "opt/x/pkg")
    }
    built = materialise(store, environment.id)
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.pyc")}
    modules = ("viaflit.inner", "viafinder.inner", "plain", "named", "pkg.inner", "only")
    assert compiled(built / "bin/python", *modules) == []
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.pyc")} == before
    assert unlike_its_source(built) == []
    assert said(built / "bin/python", "-c", "import only, plain; print(only.PREFIX)") == str(built)


@pytest.mark.heavy
def test_modules_beside_the_folders_of_an_environment_are_compiled_once(store: Store, tmp_path: Path) -> None:
    """A path file names the environment itself, which was made in the folder of a project."""
    root = project(tmp_path, "flat")
    small_venv(root, [])
    for name in ("bin", "share"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "other.py").write_text("")
    without = pack(root, store=store)
    (root / SITE / "flat.pth").write_text(f"{root}\n")
    environment = pack(root, store=store)
    new = all_entries(environment).keys() - all_entries(without).keys()
    assert {os.path.dirname(path) for path in new} == {SITE, "flat/__pycache__"}
    built = materialise(store, environment.id)
    assert compiled(built / "bin/python", "flat.inner") == []


def test_environments_in_a_project_are_no_part_of_it(store: Store, tmp_path: Path) -> None:
    """Neither the one that is packed nor others, however deep, with git and without."""
    root = project(tmp_path, "flat")
    prefix = small_venv(root / "envs" / "dev", [])
    small_venv(root / "flat" / "tools" / "other", [])
    (root / "flat" / "conda" / "conda-meta").mkdir(parents=True)
    (root / "flat" / "conda" / "module.py").write_text("")
    (prefix / SITE / "flat.pth").write_text(f"{root}\n")
    environment = pack(prefix, store=store)
    files = {path.removeprefix(f"{PLACE}/flat/") for path in entries(environment, package(environment, "flat"))}
    sources = {path for path in files if "__pycache__" not in path} - {f"{SITE}/flat.pth"}
    inside = {f"flat/{name}" for name in ("__init__.py", "inner.py", "data.txt")}
    assert sources == {*inside, "pyproject.toml", "unrelated.txt"}
    git(root, "init")
    (root / ".gitignore").write_text("*.csv\n")
    assert all_entries(pack(prefix, store=store)).keys() - all_entries(environment).keys() == {
        f"{PLACE}/flat/.gitignore"
    }
    built = materialise(store, environment.id)
    assert (
        said(built / "bin/python", "-c", "import flat; print(flat.__file__)")
        == f"{built}/{PLACE}/flat/flat/__init__.py"
    )


def test_an_edit_in_a_large_project_ships_less_than_a_mebibyte(tree: Path, prefix: Path, store: Store) -> None:
    """Ten thousand files, 24 MiB that do not compress; a part of the listing, a chunk, the byte code."""
    folder = tree / "src" / "mine" / "many"
    for number in range(100):
        (folder / f"{number:02}").mkdir(parents=True)
        for inner in range(100):
            (folder / f"{number:02}" / f"{inner:02}.txt").write_bytes(os.urandom(2500))
    before = pack(prefix, store=store)
    (folder / "50" / "50.txt").write_text("edited")
    (tree / "src" / "mine" / "__init__.py").write_text("VALUE = 2\n")
    after = pack(prefix, store=store)
    new = set(after.chunks) - set(before.chunks)
    paths = [path for digest in new for path in store.layout.chunks.rglob(f"{digest}*")]
    assert len(paths) == len(new) <= 5
    found = before.diff(after)
    assert found.ship_bytes == sum(path.stat().st_size for path in paths)
    # How much of the manifest is new does not grow with the project: see test_manifest_delta.
    assert found.ship_bytes + found.manifest_bytes < 1 << 20
    assert 0 < found.manifest_bytes < len(after.manifest.to_bytes()) / 2


def test_data_over_the_limit_is_refused_and_may_be_left_out_or_wanted(tree: Path, prefix: Path, store: Store) -> None:
    (tree / "src" / "mine" / "model.dat").write_bytes(bytes(200_000))
    with pytest.raises(SourceProblems) as caught:
        pack(prefix, store=store, options=PackOptions(project_limit_bytes=100_000))
    (problem,) = caught.value.problems
    assert "model.dat (195.31 kiB)" in problem
    assert "--project-limit" in caught.value.remedy
    without = PackOptions((("exclude", "*/model.dat"),), project_limit_bytes=100_000)
    assert not any(path.endswith("model.dat") for path in all_entries(pack(prefix, store=store, options=without)))
    wanted = PackOptions(project_limit_bytes=1_000_000)
    assert f"{PLACE}/mine/mine/model.dat" in all_entries(pack(prefix, store=store, options=wanted))


def test_links_in_a_tree_lead_to_the_same_content(tree: Path, prefix: Path, store: Store, tmp_path: Path) -> None:
    folder = tree / "src" / "mine"
    (folder / "alias.py").symlink_to("inner.py")
    (folder / "absolute.py").symlink_to(folder / "inner.py")
    (folder / "readme.txt").symlink_to(tree / "unrelated.txt")
    (folder / "dangling").symlink_to("nothing")
    environment = pack(prefix, store=store)
    found = entries(environment, package(environment, "mine"))
    place = f"{PLACE}/mine/mine"
    for name in ("alias.py", "absolute.py"):
        assert found[f"{place}/{name}"] == Link(f"{place}/{name}", "inner.py")
    assert found[f"{place}/dangling"] == Link(f"{place}/dangling", "nothing")
    assert isinstance(found[f"{place}/readme.txt"], File)
    assert contents(environment, package(environment, "mine"))[f"{place}/readme.txt"] == b"no part of the package"

    (tmp_path / "elsewhere.txt").write_text("far")
    (folder / "far.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(SourceProblems, match=r"far\.txt is a symbolic link"):
        pack(prefix, store=store)
    copied = pack(prefix, store=store, options=PackOptions(copy_outside_links=True))
    assert contents(copied, package(copied, "mine"))[f"{place}/far.txt"] == b"far"


def test_a_path_file_may_name_a_link_which_may_lead_elsewhere_the_next_time(
    tree: Path, prefix: Path, store: Store
) -> None:
    link = tree.parent / "link"
    link.symlink_to("mine")
    plain = pack(prefix, store=store)
    (prefix / SITE / "mine.pth").write_text(f"{link}\n{tree}/src\n")
    environment = pack(prefix, store=store)
    text = contents(environment, package(environment, "mine"))[f"{SITE}/mine.pth"].decode()
    assert text == f"{PLACEHOLDER}/{PLACE}/mine\n{PLACEHOLDER}/{PLACE}/mine/src\n"
    link.unlink()
    link.symlink_to(tree / "src")
    (prefix / SITE / "mine.pth").write_text(os.path.relpath(link, prefix / SITE) + "\n")
    assert pack(prefix, store=store).id == plain.id
    link.unlink()
    link.symlink_to(project(tree.parent, "other"))
    assert f"{PLACE}/mine/other/__init__.py" in all_entries(pack(prefix, store=store))


def test_links_in_a_tree_that_is_reached_through_a_link_lead_to_the_same_content(
    tree: Path, prefix: Path, store: Store
) -> None:
    (tree.parent / "link").symlink_to("mine")
    (tree / "src" / "mine" / "alias.py").symlink_to("inner.py")
    (tree / "src" / "mine" / "readme.txt").symlink_to(tree / "unrelated.txt")
    plain = pack(prefix, store=store)
    (prefix / SITE / "mine.pth").write_text(f"{tree.parent}/link/src\n")
    assert pack(prefix, store=store).id == plain.id


def test_what_links_in_a_project_point_to_is_copied_without_what_projects_leave_behind(
    tree: Path, prefix: Path, store: Store, tmp_path: Path
) -> None:
    other = project(tmp_path, "other")
    git(other, "init")
    (other / ".gitignore").write_text("*.csv\n")
    (other / "rows.csv").write_text("1")
    (other / ".mypy_cache").mkdir()
    (other / ".mypy_cache" / "x.json").write_text("{}")
    small_venv(other / "other" / "sandbox", [])
    (other / "history").symlink_to(other / ".git")
    folder = tree / "src" / "mine"
    (folder / "other").symlink_to(other)
    (folder / "environment").symlink_to(other / "other" / "sandbox")
    (tree / "data" / "sub").mkdir(parents=True)
    (tree / "data" / "more.py").write_text("")
    (tree / "data" / "sub" / ".git").write_text("gitdir: elsewhere\n")
    (folder / "more").symlink_to(tree / "data")
    environment = pack(prefix, store=store, options=PackOptions(copy_outside_links=True))
    found = entries(environment, package(environment, "mine"))
    files = {path.removeprefix(f"{PLACE}/mine/mine/") for path in found if "__pycache__" not in path}
    copied = {path for path in files if path.startswith(("other", "environment", "more"))}
    assert {path.removeprefix("other/") for path in copied} == {
        *("other/__init__.py", "other/inner.py", "other/data.txt"),
        *(".gitignore", "pyproject.toml", "unrelated.txt", "history", "more/more.py"),
    }


def test_a_project_that_is_built_on_every_import_is_refused(store: Store, tmp_path: Path) -> None:
    """What meson-python writes needs the build folder, a compiler and ninja."""
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    info = prefix / SITE / "onlyhere-1.0.dist-info"
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    (prefix / SITE / "_onlyhere_editable_loader.py").write_text(f"install('{tmp_path}')\n")
    with open(info / "RECORD", "a") as record:
        record.write("_onlyhere_editable_loader.py,,\n")
    with pytest.raises(SourceProblems, match="builds it again on every import"):
        pack(prefix, store=store)
