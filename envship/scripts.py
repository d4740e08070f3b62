"""Scripts as if one installer had written all of them: what pip, uv, conda and others write differs, and does the same.

Two things differ: by which of its names the script's first line calls the interpreter (pip takes the one that it was
started with), and how the few lines are spelled that call an entry point. What a person changed in such a script is no
installer's spelling any more, and stays. Pure. Source: the templates of distlib (which pip has), pip, uv,
pypa/installer, conda and rattler (which pixi has). See also `envship.canonical`, for the prefix in the first line.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from envship.canonical import Content, Own

_INSTALLED = re.compile(
    rb"(?:# -\*- coding: utf-8 -\*-\n)?(?:import re\n)?import sys\n"
    rb"from (?P<module>[\w.]+) import (?P<name>\w+)\n"
    rb"if __name__ == '__main__':\n"
    rb"(?:"
    rb" {4}sys\.argv\[0\] = re\.sub\(r'\(-script\\\.pyw\??\|\\\.exe\)\?\$', '', sys\.argv\[0\]\)\n"
    rb"| {4}sys\.argv\[0\] = sys\.argv\[0\]\.removesuffix\('\.exe'\)\n"
    rb"| {4}if sys\.argv\[0\]\.endswith\('\.exe'\):\n {8}sys\.argv\[0\] = sys\.argv\[0\]\[:-4\]\n"
    rb"| {4}if sys\.argv\[0\]\.endswith\('-script\.pyw'\):\n {8}sys\.argv\[0\] = sys\.argv\[0\]\[:-11\]\n"
    rb" {4}elif sys\.argv\[0\]\.endswith\('\.exe'\):\n {8}sys\.argv\[0\] = sys\.argv\[0\]\[:-4\]\n"
    rb")"
    rb" {4}sys\.exit\((?P<function>(?P=name)(?:\.\w+)*)\(\)\)\n?"
)
"""The spellings, in one kind of quotes, without tabs and empty lines. What they do besides the call is for Windows."""

_CANONICAL = b"""\
import sys
from %(module)s import %(name)s
if __name__ == '__main__':
    sys.exit(%(function)s())
"""
_LONGEST_BYTES = 4096
"""No script of an entry point is longer."""


@dataclass(frozen=True)
class Script:
    """A script in ``bin`` that a package recorded, which an installer wrote or gave its first line.

    Parameters
    ----------
    own
        Its treatment as any file's that names its prefix.
    python
        The interpreter's name with its version, as in ``lib/python3.11``.
    """

    own: Own
    python: str

    @property
    def key(self) -> str:
        return f"script of {self.python} {self.own.key}"

    def __call__(self, data: bytes) -> Content:
        content = self.own(data)
        if content.relocation is None or content.relocation.mode != "text":
            return content
        first = _first_line(content.relocation.placeholder.encode(), self.python.encode()).match(content.data)
        if first is None:
            return content
        body = content.data[first.end() :]
        return content._replace(data=b"#!" + first["prefix"] + b"/bin/python" + first["rest"] + canonical_body(body))


def canonical_body(data: bytes) -> bytes:
    """What follows the first line of a script: of one that an installer wrote for an entry point, in one spelling."""
    if len(data) > _LONGEST_BYTES:
        return data
    plain = re.sub(rb"\n\n+", b"\n", data.replace(b'"', b"'"))
    plain = re.sub(rb"(?m)^\t+", lambda tabs: b"    " * len(tabs[0]), plain)
    found = _INSTALLED.fullmatch(plain)
    return data if found is None else _CANONICAL % {name.encode(): value for name, value in found.groupdict().items()}


@functools.lru_cache(maxsize=64)
def _first_line(placeholder: bytes, python: bytes) -> re.Pattern[bytes]:
    """The first line of a script whose interpreter is the environment's, by any of its names."""
    names = b"|".join(re.escape(name) for name in (python, b"python3", b"python"))
    return re.compile(
        rb"#! *(?P<prefix>" + re.escape(placeholder) + rb")/bin/(?:" + names + rb")(?P<rest>(?: [^\n]*)?\n)"
    )
