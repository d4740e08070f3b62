from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker_bootstrap.layout import Layout

LAYOUT = Layout(Path("/store"))
NAME: Any = "ab" + "0123456789" * 6 + "cd"


def test_where_things_lie() -> None:
    """Golden: other versions of envship look in the same places."""
    assert [
        str(path)
        for path in (
            LAYOUT.chunk(NAME, ".zst"),
            LAYOUT.manifest(NAME),
            LAYOUT.prefix(NAME),
            LAYOUT.ready(NAME),
            LAYOUT.lock(NAME),
            LAYOUT.lease(NAME),
        )
    ] == [
        f"/store/chunks/ab/{NAME}.zst",
        f"/store/manifests/{NAME}.json",
        "/store/envs/ab01234567890123",
        f"/store/ready/{NAME}",
        "/store/locks/ab01234567890123.lock",
        f"/store/leases/{NAME}",
    ]


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "ab", "A" * 64, "0" * 63 + "/", "0" * 64 + "\n"])
@pytest.mark.parametrize(
    "place",
    [
        lambda name: LAYOUT.chunk(name, ".zst"),
        LAYOUT.manifest,
        LAYOUT.prefix,
        LAYOUT.ready,
        LAYOUT.lock,
        LAYOUT.lease,
        LAYOUT.carried,
    ],
)
def test_nothing_but_an_id_becomes_a_path(place: Callable[[Any], Path], name: str) -> None:
    with pytest.raises(ValueError):
        place(name)
