"""Regular expressions: compiling them is a tenth of importing Dask.

What is kept are the arguments of the function in C that makes a pattern; that one checks the code that it is given.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Pattern = tuple[str, int]
"""(text, flags)."""

Compiled = tuple[int, list[int], int, dict[str, int], tuple[Any, ...]]
"""(flags, code, number of groups, group numbers by name, group names by number). Source: ``re._compiler.compile``."""


@contextlib.contextmanager
def kept(known: dict[Pattern, Compiled] | None, seen: dict[Pattern, Compiled]) -> Iterator[None]:
    """Until the end of the block, take what is *known*; if nothing is, note in *seen* what was compiled."""
    compiler: Any = importlib.import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")
    with contextlib.ExitStack() as stack:
        if known is not None:
            stack.enter_context(_replaced(compiler, "compile", _taking(known, compiler.compile, compiler._sre.compile)))
        else:
            in_c = _Recorder(compiler._sre)
            stack.enter_context(_replaced(compiler, "_sre", in_c))
            stack.enter_context(_replaced(compiler, "compile", _noting(seen, compiler.compile, in_c)))
        yield


class _Recorder:
    """Stands for the module ``_sre``, and remembers what it was last asked to compile."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def compile(self, *arguments: Any) -> Any:
        self.asked = list(arguments)
        return self._module.compile(*arguments)


def _taking(known: dict[Pattern, Compiled], original: Any, in_c: Any) -> Callable[..., Any]:
    def compile(p: Any, flags: int = 0) -> Any:
        compiled = known.get((p, int(flags))) if type(p) is str else None
        if compiled is not None:
            with contextlib.suppress(Exception):  # made by other code than we think
                return in_c(p, *compiled)
        return original(p, flags)

    return compile


def _noting(seen: dict[Pattern, Compiled], original: Any, in_c: _Recorder) -> Callable[..., Any]:
    def compile(p: Any, flags: int = 0) -> Any:
        in_c.asked = []
        pattern = original(p, flags)
        if type(p) is str and len(in_c.asked) == 6:
            _, final, code, groups, index, names = in_c.asked
            seen[p, int(flags)] = (int(final), [int(word) for word in code], int(groups), dict(index), tuple(names))
        return pattern

    return compile


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
