"""conda-pack's archives: unpacked into a folder that nobody else can see, then packed like any environment.

Nothing in an archive is believed. Files are made in folders that were made here, links when all files and folders are
there, and only if no member lies below any of them, so that nothing is ever made through a link; what could lead out of
the folder is refused, all of it in one error. Sizes are bounded by what a real environment can come to, not by what the
archive claims. Nothing from it is run here; packing runs the interpreter in it, as packing any environment does.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from envship.errors import ArchiveInvalid, NotAnEnvironment, SourceProblems
from envship.sources.locate import is_environment
from envship.sources.members import DAMAGES, Content, Member, opener
from envship.sources.unpacked import SCRIPTS, read_unpacked
from worker_bootstrap.blueprint import may_leave
from worker_bootstrap.durable import full_error
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.paths import check_link

RATIO_LIMIT = 200
"""An archive may grow to so many times its size and `ALLOWANCE_BYTES`; real ones grow to three to five times."""
ALLOWANCE_BYTES = 256 << 20
ENTRY_LIMIT = 5_000_000

_PIECE_BYTES = 1 << 20
_REMEDY = "Make the archive again, from an environment without them."


def is_archive(path: Path) -> bool:
    """Whether the file at *path* begins as an archive does that this module reads."""
    try:
        return path.is_file() and opener(path) is not None
    except OSError:
        return False


@contextmanager
def unpacked(path: Path, scratch: Path) -> Iterator[Path]:
    """The environment in the archive at *path*, in a folder below *scratch* that is gone afterwards.

    Raises
    ------
    ArchiveInvalid
        If the archive is damaged, cut short, or grows beyond all measure.
    SourceProblems
        If it holds what has no place in an environment; lists all of it.
    NotAnEnvironment
        If there is no environment in it.
    StoreFull
        If there is no room.
    """
    with scratch_folder(scratch) as folder:
        try:
            _Extraction(path, folder / "env").run()
        except OSError as error:
            if (full := full_error(error, scratch)) is not None:
                raise full from error
            raise ArchiveInvalid(str(path), str(error)) from error
        yield _environment_in(folder / "env", path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in *parent* that nobody else can see into, and that is gone afterwards with all that is in it then.

    Raises
    ------
    StoreFull
        If there is no room for it.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="archive-", dir=parent))
    except OSError as error:
        if (full := full_error(error, parent)) is not None:
            raise full from error
        raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Extraction:
    def __init__(self, archive: Path, folder: Path) -> None:
        self._archive = archive
        self._folder = folder
        self._room_bytes = RATIO_LIMIT * archive.stat().st_size + ALLOWANCE_BYTES
        self._files: set[str] = set()
        self._folders = {""}
        self._links: dict[str, str] = {}
        self._replacing: list[str] = []
        self._problems: list[str] = []

    def run(self) -> None:
        """Extract everything."""
        members = opener(self._archive)
        if members is None:
            raise ArchiveInvalid(str(self._archive), "it is no archive of a kind that is known here")
        self._folder.mkdir(mode=0o700)
        try:
            for number, member in enumerate(members()):
                if number >= ENTRY_LIMIT:
                    raise ArchiveInvalid(str(self._archive), f"it has more than {ENTRY_LIMIT} entries")
                self._add(member)
        except DAMAGES as error:
            raise ArchiveInvalid(str(self._archive), str(error) or "it is cut short") from error
        self._check_replacing()
        self._make_links()
        if self._problems:
            raise SourceProblems(str(self._archive), self._problems, _REMEDY)

    def _add(self, member: Member) -> None:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if member.name.startswith("/") or ".." in parts or "\0" in member.name:
            self._problems.append(f"{member.name!r} leads out of the environment")
            return
        if not parts:
            return
        path = "/".join(parts)
        if path in self._links or (path in self._files and not self._replaced(path, member)):
            self._problems.append(f"{path} is there twice")
        elif member.kind == stat.S_IFDIR:
            self._make_folder(path)
        elif member.kind == stat.S_IFLNK:
            self._links[path] = member.target or _text(member.open())
        elif member.kind == stat.S_IFREG and member.target:
            self._hard_link(path, member.target)
        elif member.kind == stat.S_IFREG:
            self._write(path, member)
        else:
            self._problems.append(f"{path} is neither a file, a folder nor a link")

    def _replaced(self, path: str, member: Member) -> bool:
        """Whether the file at *path* was removed, because *member* may take its place."""
        if not path.endswith(tuple(SCRIPTS)) or member.kind != stat.S_IFREG or member.target:
            return False
        os.unlink(self._folder / path)
        self._files.remove(path)
        self._replacing.append(path)
        return True

    def _check_replacing(self) -> None:
        """Refuse what was there twice and is no script of conda-pack's.

        Of an environment that conda-unpack has moved, it packs the scripts of its last time, and adds new ones.
        """
        root = _root(self._folder)
        scripts = {os.path.join(root, script) for script in SCRIPTS}
        self._problems += [f"{path} is there twice" for path in self._replacing if path not in scripts]

    def _make_folder(self, path: str) -> bool:
        if path in self._folders:
            return True
        try:
            os.makedirs(self._folder / path, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            self._problems.append(f"{path} is a folder and a file at once")
            return False
        self._folders.update((path, *_above(path)))
        return True

    def _write(self, path: str, member: Member) -> None:
        if not self._make_folder(os.path.dirname(path)):
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            handle = os.open(self._folder / path, flags, 0o755 if member.mode & 0o100 else 0o644)
        except (FileExistsError, IsADirectoryError):
            self._problems.append(f"{path} is a folder and a file at once")
            return
        self._files.add(path)
        with os.fdopen(handle, "wb") as file, member.open() as content:
            while piece := content.read(_PIECE_BYTES):
                self._room_bytes -= len(piece)
                if self._room_bytes < 0:
                    raise ArchiveInvalid(str(self._archive), f"it grows to more than {RATIO_LIMIT} times its size")
                file.write(piece)

    def _hard_link(self, path: str, target: str) -> None:
        # Only to a file that this archive brought: its folders are real, so no link can lead anywhere.
        target = "/".join(part for part in target.split("/") if part not in ("", "."))
        if target not in self._files:
            self._problems.append(f"{path} is a hard link to {target}, which is not in the environment")
        elif self._make_folder(os.path.dirname(path)):
            os.link(self._folder / target, self._folder / path)
            self._files.add(path)

    def _make_links(self) -> None:
        targets = self._targets()
        leaving = frozenset(may_leave(targets))
        problems = [self._link_problem(path, target, leaving) for path, target in targets.items()]
        self._problems += filter(None, problems)
        if self._problems:
            return
        # Folders while there is no link yet, links from folders that are none.
        if not all(self._make_folder(os.path.dirname(path)) for path in targets):
            return
        for path, target in targets.items():
            with _opened(self._folder, os.path.dirname(path)) as folder:
                os.symlink(target, os.path.basename(path), dir_fd=folder)

    def _targets(self) -> dict[str, str]:
        """Where the links lead by their paths; relative, if by the name of a prefix that the environment has had."""
        root = _root(self._folder)
        found = read_unpacked(self._folder / root, frozenset())
        older = found.older_prefixes if found is not None else ()
        targets = dict(self._links)
        for path, target in self._links.items():
            for prefix in older:
                if target.startswith(prefix + "/"):
                    place = f"{root}/{target[len(prefix) + 1 :]}" if root else target[len(prefix) + 1 :]
                    targets[path] = os.path.relpath(place, os.path.dirname(path) or ".")
        return targets

    def _link_problem(self, path: str, target: str, leaving: Collection[str]) -> str:
        """Why the link at *path* cannot be made; empty if it can."""
        if path in self._folders:
            return f"{path} is a link and something else at once"
        above = next((folder for folder in _above(path) if folder in self._links), None)
        if above is not None:
            return f"{path} lies below {above}, which is a symbolic link"
        try:
            check_link(path, target)
        except ManifestInvalid:
            return f"{path} is a symbolic link to {self._links[path]}, outside of the environment"
        if path in leaving:
            return f"{path} is a symbolic link to {target}, by way of other links perhaps outside of the environment"
        return ""


def _above(path: str) -> Iterator[str]:
    """The folders that *path* lies in, the nearest first."""
    while path := os.path.dirname(path):
        yield path


@contextmanager
def _opened(root: Path, path: str) -> Iterator[int]:
    """A descriptor of the folder at *path* below *root*; no part of the way there may be a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    handle = os.open(root, flags)
    try:
        for part in path.split("/") if path else ():
            inner = os.open(part, flags, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _environment_in(folder: Path, archive: Path) -> Path:
    prefix = folder / _root(folder)
    if not is_environment(prefix):
        raise NotAnEnvironment(str(archive), "there is no bin/python in it")
    return prefix


def _root(folder: Path) -> str:
    """The only folder in *folder* (conda-pack's ``--arcroot``), if the environment lies in one."""
    names = os.listdir(folder)
    return names[0] if len(names) == 1 and names != ["bin"] and os.path.isdir(folder / names[0]) else ""


def _text(file: Content) -> str:
    with file:
        return os.fsdecode(file.read(4096))
