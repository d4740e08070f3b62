from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from worker_bootstrap.digest import digest_of, digest_of_file, is_digest


def test_a_digest_is_sha256_in_lower_case_hexadecimal() -> None:
    assert digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("size_bytes", [0, 1, 15, 16, 17, 1000])
def test_a_file_has_the_digest_of_its_bytes_whatever_the_block(tmp_path: Path, size_bytes: int) -> None:
    data = bytes(range(256)) * 4
    path = tmp_path / "file"
    path.write_bytes(data[:size_bytes])
    assert digest_of_file(path, block_bytes=16) == hashlib.sha256(data[:size_bytes]).hexdigest()


@pytest.mark.parametrize("text", ["", "A" * 64, "g" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", None, 3, b"a" * 64])
def test_what_is_no_digest(text: object) -> None:
    assert not is_digest(text)
