"""Moving the prefix that a file's bytes name: text and binary, there and back. Pure.

*Text*: each occurrence is replaced; a shebang that the kernel could not use takes another form. *Binary*: within each
NUL-terminated string the new prefix takes the place of the old one, and NUL bytes after the string keep its length, so
that nothing else in the file moves.

Source: conda's ``core/portability.py`` and conda-build's manual, "Making packages relocatable". See also
`worker_bootstrap.materialise`, which relocates while it writes, and the sources of `envship`, which undo it.
"""

from __future__ import annotations

import os
import re

from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.manifest import Relocation

PLACEHOLDER = "/envship-prefix-" + "placeholder"
"""Stands for the prefix where no installer recorded another placeholder. In two parts, lest this file contain it."""

SHEBANG_LIMIT_BYTES = 127
"""Linux before 5.1 reads no more of a script's first line (``BINPRM_BUF_SIZE`` less the newline)."""

FIRST_LINE_LIMIT_BYTES = 1024
"""No shebang with a placeholder of 255 bytes is longer; taking a line apart takes the square of its length."""
GROWTH_LIMIT_BYTES = 64 << 20
"""Text may become so much longer: a short placeholder in every word would stand for gigabytes."""

_SHEBANG = re.compile(rb"#![ \t]*(?P<interpreter>[^ \t\r\n]*)(?P<arguments>[^\n]*)(?:\n|\Z)")
_ENCODING = re.compile(rb"[ \t\f]*#[^\n]*?coding[:=][ \t]*[-_.a-zA-Z0-9]+[^\n]*\n")
"""Source: PEP 263. A shell takes it for a comment."""
_PYTHON = re.compile(rb"(?:python|pypy)[0-9.]*t?")
_BARE = re.compile(rb"[\w%+=:,./@\x80-\xff-]+")
"""What a shell takes for one word."""


class RelocationError(ValueError):
    """The new prefix does not fit. *room_bytes* is the length of the longest that would."""

    def __init__(self, room_bytes: int) -> None:
        super().__init__(f"room for {room_bytes} bytes")
        self.room_bytes = room_bytes


def fits(relocation: Relocation, prefix: str) -> bool:
    """Whether a file with this relocation can be moved to *prefix*: text always, binary up to its placeholder."""
    return relocation.mode == "text" or len(os.fsencode(prefix)) <= len(os.fsencode(relocation.placeholder))


def relocate(data: bytes, relocation: Relocation, prefix: str) -> bytes:
    """*data* as it reads at *prefix*.

    Parameters
    ----------
    data
        The whole canonical content of a file.
    relocation
        Its placeholder, and how it occurs.
    prefix
        Absolute path without a trailing slash.

    Raises
    ------
    RelocationError
        If a binary file's placeholder is shorter than *prefix*.
    ManifestInvalid
        If a text would grow beyond all measure.
    """
    old, new = os.fsencode(relocation.placeholder), os.fsencode(prefix)
    if relocation.mode == "binary":
        return _replace_binary(data, old, new)
    return _replace_text(data, old, new)


def restore(data: bytes, relocation: Relocation, prefix: str, *, is_end: bool = True) -> bytes:
    """The inverse of `relocate`: the canonical content of a file that was installed at *prefix*.

    *is_end* tells whether *data* goes to the file's end: no NUL has to be left there to end a string.

    Exact for what `relocate` or conda wrote, as long as *prefix* did not occur in the original, and except for scripts
    whose interpreter was left to PATH. Strings of a binary file that lack the padding to take the placeholder back are
    left as they are; so compare the result with a recorded digest.
    """
    placeholder, here = os.fsencode(relocation.placeholder), os.fsencode(prefix)
    if relocation.mode == "binary":
        return _restore_binary(data, here, placeholder, is_end)
    return _restore_shebang(data).replace(here, placeholder)


def _replace_binary(data: bytes, old: bytes, new: bytes) -> bytes:
    room = len(old) - len(new)
    if room < 0:
        raise RelocationError(len(old))

    def replaced(match: re.Match[bytes]) -> bytes:
        string = match.group()
        # Several occurrences may share one string (a list of search paths): the padding of all goes to its end.
        return string.replace(old, new) + b"\0" * (room * string.count(old))

    return re.sub(re.escape(old) + rb"[^\0]*", replaced, data)


def _restore_binary(data: bytes, here: bytes, placeholder: bytes, is_end: bool) -> bytes:
    room = len(placeholder) - len(here)

    def restored(match: re.Match[bytes]) -> bytes:
        string, padding = match.group(1), match.group(2)
        needed = room * string.count(here)
        at_end = is_end and match.end() == len(match.string)
        # The NUL that ends a string is no padding, except where the file ends.
        if needed > len(padding) - (0 if at_end else 1):
            return match.group()
        return string.replace(here, placeholder) + padding[needed:]

    return re.sub(b"(" + re.escape(here) + rb"[^\0]*)(\0*)", restored, data)


def _replace_text(data: bytes, old: bytes, new: bytes) -> bytes:
    growth_bytes = data.count(old) * (len(new) - len(old))
    if growth_bytes > GROWTH_LIMIT_BYTES:
        raise ManifestInvalid(f"a text of {len(data)} bytes would grow by {growth_bytes}", os.fsdecode(old))
    end = data.find(b"\n", 0, FIRST_LINE_LIMIT_BYTES) + 1 or len(data)
    if not data.startswith(b"#!") or end > FIRST_LINE_LIMIT_BYTES or old not in data[:end]:
        return data.replace(old, new)
    encoding = _ENCODING.match(data, end)
    after = encoding.end() if encoding is not None else end
    second = data[end:after].replace(old, new)
    return _usable_shebang(data[:end], second, old, new) + data[after:].replace(old, new)


def _usable_shebang(line: bytes, second: bytes, old: bytes, new: bytes) -> bytes:
    """*line* with *new* in the place of *old*, or what does the same where the kernel could not read that.

    The *second* line comes with it where that says how a Python script is encoded, which none after it can.

    Python scripts get a first line that is both a shell's command and a Python string (the form that pip and distlib
    write, and which stands where the script's ``__doc__`` would). There is no such form for every language, so others
    find their interpreter on PATH, which activation has set; one with arguments takes ``env -S`` for that (coreutils
    8.30, of 2018), as the kernel passes but one argument.
    """
    moved = line.replace(old, new)
    shebang = _SHEBANG.match(line)
    assert shebang is not None
    interpreter = shebang["interpreter"].replace(old, new)
    if old not in shebang["interpreter"] or (len(moved.rstrip()) <= SHEBANG_LIMIT_BYTES and b" " not in interpreter):
        return moved + second
    arguments = shebang["arguments"].strip().replace(old, new)
    name = interpreter.rpartition(b"/")[2]
    if _PYTHON.fullmatch(name) is None:
        command = b"-S " + name + b" " + _split_again(arguments) if arguments else name
        return b"#!/usr/bin/env " + command + b"\n" + second
    quoted = interpreter if _BARE.fullmatch(interpreter) else b'"' + interpreter + b'"'
    command = quoted + (b" " + arguments if arguments else b"")
    return b"#!/bin/sh\n" + second + b"'''exec' " + command + b" \"$0\" \"$@\"\n' '''\n"


def _split_again(arguments: bytes) -> bytes:
    """*arguments* such that ``env -S`` passes them on: as they are, or where they hold what it interprets, as one."""
    if re.fullmatch(rb"[\w\s%+=:,./@-]*", arguments):
        return arguments
    return b"'" + arguments.replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"


# As pip and distlib write it, as uv does (other quotes), both in two lines more, and as rattler does (in one).
_POLYGLOT = re.compile(
    rb"#!/bin/sh\n(?P<second>" + _ENCODING.pattern + rb")?"
    rb"'''exec' (?:\"(?P<double>[^\"\n]+)\"|'(?P<single>[^'\n]+)'|(?P<bare>[^ '\"\n]+))"
    rb"(?P<arguments>[^\n\"]*?) \"\$0\" \"\$@\"(?:\n' '''| #''')\n"
)


def _restore_shebang(data: bytes) -> bytes:
    polyglot = _POLYGLOT.match(data)
    if polyglot is None:
        return data
    interpreter = polyglot["double"] or polyglot["single"] or polyglot["bare"]
    return b"#!" + interpreter + polyglot["arguments"] + b"\n" + (polyglot["second"] or b"") + data[polyglot.end() :]
