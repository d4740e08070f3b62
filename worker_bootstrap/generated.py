"""Source that the standard library writes and runs while classes are made: methods of data classes, named tuples."""

from __future__ import annotations

import builtins
import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

RUNS = {"dataclasses": "exec", "collections": "eval"}
"""Modules, and the function with which they run what they have written."""

Source = tuple[str, str]
"""(function, text)."""


@contextlib.contextmanager
def kept(known: dict[Source, Any] | None, seen: dict[Source, Any]) -> Iterator[None]:
    """Until the end of the block, run what is *known* as it is; note in *seen* what had to be compiled."""
    with contextlib.ExitStack() as stack:
        for name, function in RUNS.items():
            module = importlib.import_module(name)
            setattr(module, function, _running(function, known or {}, seen))
            stack.callback(delattr, module, function)  # what it stood before is the built-in function
        yield


def _running(function: str, known: dict[Source, Any], seen: dict[Source, Any]) -> Callable[..., Any]:
    built_in: Callable[..., Any] = getattr(builtins, function)

    def run(source: Any, *namespaces: Any) -> Any:
        if type(source) is str:
            code = known.get((function, source))
            if code is None:
                code = seen[function, source] = compile(source, "<string>", function, dont_inherit=True)
            source = code
        return built_in(source, *namespaces)

    return run
