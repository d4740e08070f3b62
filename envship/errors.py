"""The errors of packing and exporting, below those of `worker_bootstrap.errors`.

::

    EnvshipError
    ├── PackError                    the source cannot be packed as it is
    │   ├── SourceNotFound           no such environment, prefix or bundle
    │   ├── NotAnEnvironment         it exists, but holds no Python environment
    │   └── SourceProblems           the source was read; everything wrong with it, listed
    ├── ContentError                 bytes are not what their name or format says
    │   └── ArchiveInvalid           an archive is damaged, or grows beyond all measure
    └── ExportError                  the environment cannot be written as a bundle or an archive
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from worker_bootstrap.errors import ContentError, EnvshipError

_SHOWN_LINES = 50
"""So many problems of a source stand in its message."""


class PackError(EnvshipError):
    """The source cannot be packed."""


class SourceNotFound(PackError):
    """No environment, prefix, bundle or id of that name."""

    fields = ("source", "looked_in")
    source: str
    looked_in: Sequence[str]

    def describe(self) -> str:
        places = ", ".join(self.looked_in or ()) or "nowhere"
        return (
            f"no environment {self.source!r}: looked in {places}. Give the name of a conda environment, the path of a "
            "prefix, an archive of conda-pack, a bundle (.envship), or the id of an environment that the store holds."
        )


class NotAnEnvironment(PackError):
    """The path exists, but is not a Python environment."""

    fields = ("path", "reason")
    path: str
    reason: str

    def describe(self) -> str:
        return f"{self.path} is not a conda environment or a venv: {self.reason}"


class SourceProblems(PackError):
    """Everything that is wrong with a source, collected before raising.

    ``problems`` are single lines, which name every file; ``shown``, where it is given, are the same in fewer words.
    """

    fields = ("source", "problems", "remedy", "shown")
    source: str
    problems: Sequence[str]
    remedy: str
    shown: Sequence[str] | None

    def describe(self) -> str:
        lines = list(self.shown or self.problems)
        more = [f"… and {len(lines) - _SHOWN_LINES} more"] if len(lines) > _SHOWN_LINES else []
        text = self._text([*lines[:_SHOWN_LINES], *more])
        is_all = not more and lines == list(self.problems)
        return text if is_all else f"{text}\nTo see all of it: --all-problems; in Python, the `problems` of this error."

    def in_full(self) -> str:
        """The message with all problems, however many."""
        return self._text(self.problems)

    def _text(self, lines: Sequence[str]) -> str:
        indented = "".join(f"  {line}\n" for line in lines)
        return f"{self.source} cannot be packed as it is:\n{indented}{self.remedy}"


class ArchiveInvalid(ContentError):
    """An archive of an environment is damaged, cut short, of no known kind, or a bomb."""

    fields = ("path", "reason")
    path: str
    reason: str

    def describe(self) -> str:
        return f"{self.path} cannot be unpacked: {self.reason}. Copy it again, or make it again with conda-pack."


class ExportError(EnvshipError):
    """The environment cannot be written as a file of that kind, under that name, or in that place."""

    fields = ("path", "reason")
    path: str
    reason: str

    @classmethod
    def of(cls, error: OSError, path: Path) -> ExportError:
        """What the system refused while *path*, by way of a file beside it, was written."""
        other = str(error.filename or "")
        place = other if other and Path(other).parent != path.parent else path.parent
        return cls(str(path), f"{place}: {error.strerror or error}")

    def describe(self) -> str:
        return f"{self.path} cannot be written: {self.reason}"
