from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import ModuleType

import pytest

import envship.errors
from worker_bootstrap import errors
from worker_bootstrap.errors import EnvshipError, StoreFull

MODULES = (errors, envship.errors)


def tree(kind: type[EnvshipError], depth: int = 0) -> Iterator[tuple[int, type[EnvshipError]]]:
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ in [module.__name__ for module in MODULES]:
            yield from tree(child, depth + 1)


CLASSES = [kind for _, kind in tree(EnvshipError)]
SAMPLES = {
    "looked_in": ["~/.conda"],
    "problems": [f"line {number}" for number in range(60)],
    "shown": None,
    "mismatches": [("python", "3.11", "3.13")],
    "causes": {"host-1": "no room", "host-0": "no route"},
    "needed_bytes": 2_000_000,
    "free_bytes": 1_000_000,
    "room_bytes": 255,
    "timeout_s": 10.0,
    "environment_id": "ab" * 32,
    "digest": "cd" * 32,
}
TOLD = {
    "looked_in": ["~/.conda"],
    "problems": [*(f"line {number}\n" for number in range(50)), "10 more", "--all-problems"],
    "mismatches": ["python", "3.11", "3.13"],
    "causes": ["host-1: no room", "host-0: no route"],
}
"""What a message holds of those samples that are more than one text."""


def sample(kind: type[EnvshipError]) -> EnvshipError:
    return kind(*(SAMPLES.get(name, f"some-{name}") for name in kind.fields))


@pytest.mark.parametrize("kind", CLASSES)
def test_each_survives_pickling(kind: type[EnvshipError]) -> None:
    error = sample(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.values == error.values
    assert str(again) == str(error)
    error.retryable = not error.retryable
    assert pickle.loads(pickle.dumps(error)).retryable is error.retryable


@pytest.mark.parametrize("kind", CLASSES)
def test_each_describes_itself_with_all_its_fields(kind: type[EnvshipError]) -> None:
    error = sample(kind)
    text = str(error)
    assert text and "None" not in text
    for name in kind.fields:
        assert hasattr(error, name)
        for told in TOLD.get(name, () if name in SAMPLES else (f"some-{name}",)):
            assert told.lower() in text.lower()


@pytest.mark.parametrize("kind", CLASSES)
def test_each_describes_itself_with_empty_fields(kind: type[EnvshipError]) -> None:
    """A message must not fail where an error is half filled in: it would hide what happened."""
    empty = {"needed_bytes": 0, "free_bytes": None, "room_bytes": 0, "timeout_s": 0.0}
    lists = {"looked_in": [], "problems": [], "mismatches": [], "causes": {}}
    assert isinstance(str(kind(*({**empty, **lists}.get(name, "") for name in kind.fields))), str)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_the_drawn_tree_is_the_tree(module: ModuleType) -> None:
    """Of each module: its own errors, and what they stand below."""
    drawn = []
    for line in (module.__doc__ or "").splitlines():
        bare = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ")
        if line.startswith("    ") and bare.strip():
            drawn.append(((len(bare) - len(bare.lstrip())) // 4 - 1, bare.split()[0]))
    above = {parent for kind in CLASSES if kind.__module__ == module.__name__ for parent in kind.__mro__}
    assert sorted(drawn) == sorted((depth, kind.__name__) for depth, kind in tree(EnvshipError) if kind in above)


def test_fields_by_keyword_and_unknown_ones() -> None:
    assert StoreFull(path="/x", needed_bytes=1).free_bytes is None
    with pytest.raises(TypeError):
        StoreFull(where="/x")
    with pytest.raises(TypeError):
        StoreFull("/x", 1, 2, 3)
