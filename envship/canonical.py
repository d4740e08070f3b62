"""How the bytes of an installed file become content that depends on no prefix, user, time or machine. Pure.

Each treatment is a function from the bytes on disk to `Content`; its ``key`` names what it does, so that a scan index
knows when an unchanged file would be treated differently. `worker_bootstrap.relocate` is the way back.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from envship import elf
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import PLACEHOLDER, RelocationError, relocate, restore

SYSTEM_PREFIXES = frozenset(("/", "/usr", "/usr/local"))
"""Prefixes that many paths begin with which have nothing to do with an environment."""

_NO_ROOM = "looks for shared libraries in %s (RPATH) and has no room for $ORIGIN/…: patchelf --set-rpath makes it"
"""What is said of an ELF file that works where it is only."""

_ENV_SHEBANG = re.compile(rb"\A#!/usr/bin/env (?:-S )?([^\s/=-][^\s/=]*(?=[ \n]))")


_BEFORE = re.compile(rb"(?:\A|[^\w\x80-\xff.~*?%})\]+/-]|://|(?:\A|[\s\"'=,;(\[])-[A-Za-z]|-isystem|\\[nrt])\Z")
"""What may stand before a prefix: `/usr/bin/env`, `~/env` and `${HOME}/env` do not name `/env`; `file:///env`,
`-I/env/include` and `"\\n/env"` do."""
_BEFORE_BYTES = 8
"""No more of it is looked at."""
_AFTER = rb"(?![\w\x80-\xff-]|\.\w)"
"""`/home/me/env2` and `/home/me/env.old` do not name `/home/me/env`; `/home/me/env.` at a sentence's end does."""


class Content(NamedTuple):
    """Canonical bytes, how they name the prefix, and their digest where it is known already.

    *doubt* says why the file may not work elsewhere; most often it is empty.
    """

    data: bytes
    relocation: Relocation | None
    digest: Digest | None = None
    doubt: str = ""


class Treatment(Protocol):
    """From the bytes of a file on disk to its canonical content."""

    @property
    def key(self) -> str:
        """Equal for equal treatments."""

    def __call__(self, data: bytes) -> Content: ...


@dataclass(frozen=True)
class Verbatim:
    """The bytes as they are."""

    key = "verbatim"

    def __call__(self, data: bytes) -> Content:
        return Content(data, None)


@dataclass(frozen=True, slots=True)
class Own:
    """A file that nobody recorded a prefix for: text gets one placeholder for all *prefixes*, ELF a relative RPATH.

    Other binary files stay as they are: which of their bytes may be changed is known to nobody. Nor are prefixes in
    the rest of an ELF file replaced: they are debug information nearly always, and a short one could not take a longer
    prefix. (conda-pack leaves such files alone for the same reason.)
    """

    prefixes: tuple[str, ...]
    path: str = ""

    @property
    def key(self) -> str:
        return f"own {self.path} {self.prefixes}"

    def __call__(self, data: bytes) -> Content:
        if not self.occurs(data):
            return Content(data, None)
        if elf.is_elf(data):
            return self._with_relative_rpath(data)
        if b"\0" in data:
            return Content(data, None)
        return _canonical_text(data, self.prefixes, is_script=self.path.startswith("bin/"))

    def _with_relative_rpath(self, data: bytes) -> Content:
        # Libraries in the folders of the system stay there. Those in /usr/local may be the interpreter's own.
        prefixes = [prefix for prefix in self.prefixes if prefix not in ("/", "/usr")]
        data = elf.with_relative_rpath(data, self.path, prefixes)
        doubt = _NO_ROOM % elf.rpath(data) if elf.names_prefix(data, prefixes) else ""
        return Content(data, None, doubt=doubt)

    def occurs(self, data: bytes) -> bool:
        """Whether one of the prefixes stands anywhere in *data*."""
        return any(os.fsencode(prefix) in data for prefix in self.prefixes)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file whose package recorded the *digest* of the original, and how it names the prefix.

    What turns back into the original is the original. What does not was changed since, and is content of its own.
    """

    digest: Digest
    relocation: Relocation | None
    own: Own

    @property
    def key(self) -> str:
        return f"recorded {self.digest} {self.relocation} {self.own.key}"

    def __call__(self, data: bytes) -> Content:
        if self.relocation is None:
            # Its digest is needed anyhow; what is as it was installed need not be searched for prefixes.
            digest = digest_of(data)
            return Content(data, None, digest) if digest == self.digest else self.own(data)
        candidates = (
            [data] if self.relocation.mode == "binary" else [data, with_interpreter_of(data, self.own.prefixes[0])]
        )
        for installed in dict.fromkeys(candidates):
            for prefix in self.own.prefixes:
                for original in _originals(installed, self.relocation, prefix):
                    if digest_of(original) == self.digest:
                        return Content(original, self.relocation, self.digest)
        if self.relocation.mode == "binary":
            # Signed or stripped after installing: no longer the original, but the room for a longer prefix is there.
            return _with_room(data, self.relocation, self.own)
        return self.own(data)


@dataclass(frozen=True)
class Undigested:
    """A file whose package, an old one, recorded how it names the prefix, and no digest of the original.

    Which of its bytes name the prefix is seen from the file itself: text as everywhere, binary files by the padding
    that an installer left. Where conda-pack kept the original, the placeholder is there.
    """

    relocation: Relocation
    own: Own

    @property
    def key(self) -> str:
        return f"undigested {self.relocation} {self.own.key}"

    def __call__(self, data: bytes) -> Content:
        placeholder = os.fsencode(self.relocation.placeholder)
        if self.relocation.mode == "text":
            return self.own(data.replace(placeholder, os.fsencode(self.own.prefixes[0])))
        if placeholder in data:
            return Content(data, self.relocation)
        return _with_room(data, self.relocation, self.own)


@dataclass(frozen=True)
class Rewritten:
    """The result of a pure function of the bytes; *name* says which."""

    name: str
    function: Callable[[bytes], bytes]
    then: Treatment | None = None

    @property
    def key(self) -> str:
        return f"rewritten {self.name} {self.then.key if self.then else ''}"

    def __call__(self, data: bytes) -> Content:
        data = self.function(data)
        return self.then(data) if self.then else Content(data, None)


def with_interpreter_of(data: bytes, prefix: str) -> bytes:
    """The script *data* with an interpreter at *prefix* in place of the one that it finds on PATH.

    That is how conda writes a script's first line where the path is too long for the kernel, and conda-pack everywhere.
    Other data comes back as it is.
    """
    return _ENV_SHEBANG.sub(lambda match: b"#!" + os.fsencode(prefix) + b"/bin/" + match[1], data, count=1)


def names_prefix(data: bytes, prefixes: tuple[str, ...]) -> bool:
    """Whether a module with the text *data* would be relocated."""
    pattern = _text_pattern(prefixes)
    return pattern is not None and any(map(_is_whole, pattern.finditer(data)))


def _originals(data: bytes, relocation: Relocation, prefix: str) -> Iterator[bytes]:
    """What *data*, installed at *prefix*, may have been made of."""
    original = restore(data, relocation, prefix)
    yield original
    if relocation.mode == "text" and original != data:
        # The original may name what only ends like the prefix: `/usr/bin/env`, where that is `/env`.
        plain = restore(data, relocation, relocation.placeholder)
        yield _replaced(plain, (prefix,), os.fsencode(relocation.placeholder))


def _with_room(data: bytes, relocation: Relocation, own: Own) -> Content:
    """A binary file with the placeholder in it again, if that is what it could be made of; else its *own* content."""
    for prefix in own.prefixes:
        original = restore(data, relocation, prefix)
        if original != data and _comes_back(original, relocation, prefix, data):
            return Content(original, relocation)
    return own(data)


def _comes_back(original: bytes, relocation: Relocation, prefix: str, data: bytes) -> bool:
    try:
        return relocate(original, relocation, prefix) == data
    except RelocationError:
        return False


def _canonical_text(data: bytes, prefixes: tuple[str, ...], is_script: bool) -> Content:
    placeholder = PLACEHOLDER.encode()
    while placeholder in data:
        placeholder += b"-"
    if is_script:
        # A script's interpreter moves along even from `/usr`, where the rest of its text means the system.
        data = _with_plain_shebang(data, prefixes)
        data = _shebang_pattern(prefixes).sub(b"#!" + placeholder, data, count=1)
    data = _replaced(data, prefixes, placeholder)
    return Content(data, Relocation("text", placeholder.decode()) if placeholder in data else None)


def _replaced(data: bytes, prefixes: tuple[str, ...], placeholder: bytes) -> bytes:
    """The text *data* with *placeholder* wherever it names one of *prefixes*."""
    pattern = _text_pattern(prefixes)
    if pattern is None:
        return data
    return pattern.sub(lambda match: placeholder if _is_whole(match) else match.group(), data)


def _is_whole(match: re.Match[bytes]) -> bool:
    """Whether a path begins where *match*, of `_text_pattern`, does."""
    return _BEFORE.search(match.string, max(0, match.start() - _BEFORE_BYTES), match.start()) is not None


def _with_plain_shebang(data: bytes, prefixes: tuple[str, ...]) -> bytes:
    """Undo the form of scripts whose interpreter's path is too long for the kernel, or has a space."""
    if not data.startswith(b"#!/bin/sh\n"):
        return data
    plain = restore(data, Relocation("text", "/"), "/")
    return plain if _shebang_pattern(prefixes).match(plain) else data


@functools.lru_cache(maxsize=64)
def _shebang_pattern(prefixes: tuple[str, ...]) -> re.Pattern[bytes]:
    return re.compile(rb"\A#! *(?:" + _alternatives(prefixes) + rb")(?=/bin/(?:python|pypy))")


@functools.lru_cache(maxsize=64)
def _text_pattern(prefixes: tuple[str, ...]) -> re.Pattern[bytes] | None:
    chosen = tuple(prefix for prefix in prefixes if prefix not in SYSTEM_PREFIXES)
    return re.compile(b"(?:" + _alternatives(chosen) + b")" + _AFTER) if chosen else None


def _alternatives(prefixes: tuple[str, ...]) -> bytes:
    # The longest first: one prefix may lie inside another (a venv in its interpreter's folder).
    return b"|".join(re.escape(os.fsencode(prefix)) for prefix in sorted(prefixes, key=len, reverse=True))
