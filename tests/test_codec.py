from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_bootstrap import codec
from worker_bootstrap.codec import CodecError, available, choose, decode, encode

CODECS = list(codec.SUFFIXES)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.binary(max_size=2000))
def test_decode_is_the_inverse_of_encode(name: str, data: bytes) -> None:
    assert decode(encode(data, name), name, len(data)) == data


@pytest.mark.parametrize("name", CODECS)
def test_more_than_announced_is_refused(name: str) -> None:
    with pytest.raises(CodecError):
        decode(encode(b"x" * 1000, name), name, 999)


@pytest.mark.parametrize("name", ["zstd", "zlib"])
@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_payload_cut_short_is_refused(name: str, cut: int) -> None:
    with pytest.raises(CodecError):
        decode(encode(bytes(range(256)), name)[:cut], name, 1000)


@pytest.mark.parametrize("name", ["zstd", "zlib"])
def test_a_damaged_payload_is_refused(name: str) -> None:
    with pytest.raises(CodecError):
        decode(b"\xff" * 50, name, 1000)


def test_a_frame_that_claims_much_in_few_bytes_reserves_nothing() -> None:
    """A zstd frame header may claim 512 MiB in nine bytes."""
    bomb = bytes.fromhex("28b52ffd") + bytes([0b10100000]) + (512 << 20).to_bytes(4, "little")
    with pytest.raises(CodecError, match="claims"):
        decode(bomb, "zstd", 16 << 20)


def test_a_deflate_bomb_stops_at_the_limit() -> None:
    bomb = zlib.compress(b"\0" * (64 << 20))
    with pytest.raises(CodecError):
        decode(bomb, "zlib", 1 << 20)


def test_without_zstandard_zlib_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = encode(b"data", "zstd")
    monkeypatch.setattr(codec, "_zstandard", None)
    assert available() == ("zlib", "raw")
    assert choose(["zstd", "zlib"]) == "zlib"
    for call in (lambda: encode(b"", "zstd"), lambda: decode(payload, "zstd", 100)):
        with pytest.raises(CodecError, match="not available"):
            call()


def test_raw_is_always_understood() -> None:
    assert choose([]) == "raw"
    assert choose(["brotli"]) == "raw"


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(CodecError):
        decode(b"", "lzma", 10)
