"""From what the user wrote to the prefix of an environment, without a conda executable.

A name is looked for where conda keeps environments: beside the active one, in ``CONDA_ENVS_PATH`` and the
``envs_dirs`` of ``.condarc`` files, under the installation that ``CONDA_EXE`` belongs to, and in the list of all
environments that conda keeps in ``~/.conda/environments.txt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from envship.errors import NotAnEnvironment, SourceNotFound


def find_prefix(source: str | os.PathLike[str] | None) -> Path:
    """The absolute path of the environment that *source* means: None (the running one), a name, or a path.

    Raises
    ------
    SourceNotFound
        If there is none; names the places that were looked in.
    NotAnEnvironment
        If the path is no folder, or a folder without a Python environment.
    """
    if source is None:
        return Path(sys.prefix).absolute()
    text = os.fspath(source)
    path = Path(os.path.expanduser(text)).absolute()
    if os.sep in text or text.startswith((".", "~")):
        if not path.exists():
            raise SourceNotFound(text, [str(path)])
        return checked(path)
    looked_in = []
    for candidate in _candidates(text):
        if is_environment(candidate):
            return candidate
        looked_in.append(str(candidate))
    if path.exists():
        return checked(path)
    raise SourceNotFound(text, [*dict.fromkeys(looked_in), str(path)])


def checked(path: Path) -> Path:
    """*path* itself, if an environment lies there.

    Raises
    ------
    NotAnEnvironment
        If not.
    """
    if not path.is_dir():
        raise NotAnEnvironment(str(path), "it is not a folder")
    if not is_environment(path):
        raise NotAnEnvironment(str(path), "there is no bin/python in it")
    return path


def is_environment(path: Path) -> bool:
    """Whether a conda environment, a venv or an interpreter lies at *path*."""
    return is_conda(path) or _has_interpreter(path)


def is_conda(path: Path) -> bool:
    """Whether conda (or mamba, pixi, rattler) made the environment at *path*: its packages, or an empty one."""
    return any((path / "conda-meta").glob("*.json")) or (_has_history(path) and not _has_interpreter(path))


def is_exported(path: Path) -> bool:
    """Whether the environment at *path* has all that it needs, but no package of conda's: see `exported`."""
    return _has_history(path) and not is_conda(path) and not (path / "pyvenv.cfg").exists()


def _has_history(path: Path) -> bool:
    return (path / "conda-meta" / "history").is_file()


def _has_interpreter(path: Path) -> bool:
    return (path / "bin" / "python").exists() or (path / "bin" / "python3").exists()


def _candidates(name: str) -> Iterator[Path]:
    roots = list(_installations())
    if name in ("base", "root"):
        yield from roots
    for active in _active():
        if active.name == name:
            yield active
        if active.parent.name == "envs":
            yield active.parent / name
    for folder in (*_environment_folders(), *(root / "envs" for root in roots)):
        yield folder / name
    try:
        known = Path(os.path.expanduser("~/.conda/environments.txt")).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        known = []
    yield from (Path(line) for line in known if os.path.basename(line.rstrip("/")) == name)


def _active() -> Iterator[Path]:
    for value in (os.environ.get("CONDA_PREFIX"), sys.prefix):
        if value:
            yield Path(value)


def _installations() -> Iterator[Path]:
    """Prefixes that conda itself lies in."""
    executable = os.environ.get("CONDA_EXE") or os.environ.get("MAMBA_EXE")
    if executable and Path(executable).parent.name in ("bin", "condabin"):
        yield Path(executable).parent.parent
    root = os.environ.get("MAMBA_ROOT_PREFIX") or os.environ.get("CONDA_ROOT")
    if root:
        yield Path(root)
    for active in _active():
        if active.parent.name == "envs":
            yield active.parent.parent
        elif (active / "envs").is_dir():
            yield active


def _environment_folders() -> Iterator[Path]:
    for variable in ("CONDA_ENVS_PATH", "CONDA_ENVS_DIRS"):
        for entry in os.environ.get(variable, "").split(os.pathsep):
            if entry:
                yield Path(os.path.expanduser(entry))
    files = [os.environ.get("CONDARC"), "~/.condarc", "~/.conda/.condarc", "~/.mambarc"]
    for file in (*files, *(str(root / ".condarc") for root in _installations())):
        if file:
            yield from _configured_folders(Path(os.path.expanduser(file)))
    yield Path(os.path.expanduser("~/.conda/envs"))


def _configured_folders(file: Path) -> Iterator[Path]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    folders = settings.get("envs_dirs") if isinstance(settings, dict) else None
    for folder in folders if isinstance(folders, list) else ():
        if isinstance(folder, str):
            yield Path(os.path.expanduser(os.path.expandvars(folder)))
