"""One call to a peer over Dask's comms, whose reply is never unpickled.

Dask unpickles parts of every ordinary reply, whatever deserialisers are asked for: the type of a ``to_serialize``
object, anything marked ``__Pickled__``, the exception in an error. So the reply is read here, frame by frame, from the
same connection (same port, same security, same pool), as msgpack and raw frames only, and within a size.

Dask's own handshake comes before, and Dask's servers read requests in their own way: this guards what we ask for.
See also `worker_bootstrap.transfer`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Optional, Union

import msgpack
from distributed.protocol import Serialized
from distributed.protocol.serialize import register_serialization_family

from worker_bootstrap.errors import ProtocolBroken, TransferError

Payload = Union[bytes, memoryview]

Mark = Optional[Callable[[Any], None]]
"""Called with a connection before a message goes over it."""

FAMILY = "envship"
"""Name of our (de)serialiser: a frame is sent as it is, without pickle, compression or copy."""
REPLY_LIMIT_BYTES = 40 << 20
"""No reply is larger: a batch of 16 MiB, with room for codecs that did not compress."""
FRAMES_LIMIT = 20_000
CONNECT_TIMEOUT_S = 10.0
"""Dask goes on trying to connect to a port that refuses for so long."""
_LENGTH = struct.Struct("Q")


def frame(payload: Payload) -> Serialized:
    """Mark *payload* to travel as a frame of its own. It must not change until it is sent."""
    return Serialized({"serializer": FAMILY}, [payload])


def payload_of(value: Any) -> Payload:
    """The bytes of a `frame` as they arrive, on servers that deserialise and those that do not (the scheduler).

    Raises
    ------
    TypeError
        If *value* is not a frame of ours.
    """
    if isinstance(value, Serialized):
        if value.header.get("serializer") != FAMILY or any(value.header.get("compression") or ()):
            raise TypeError("not a plain frame")
        return _joined(value.frames)
    if isinstance(value, (bytes, memoryview)):
        return value
    raise TypeError(f"not bytes: {type(value).__name__}")


async def call(
    pool: Any,
    address: str,
    op: str,
    message: dict[str, Any],
    *,
    timeout_s: float,
    limit_bytes: int = REPLY_LIMIT_BYTES,
    mark: Mark = None,
) -> dict[str, Any]:
    """Call the handler *op* of the server at *address*; return its reply.

    Parameters
    ----------
    pool
        A `distributed.core.ConnectionPool`: ``server.rpc`` or ``client.rpc``, with their security.
    message
        Keyword arguments of the handler: what msgpack takes, and frames.
    mark
        Called with the connection before the message is sent.

    Returns
    -------
    dict
        The reply, whose ``status`` is ``OK``. Sequences are tuples; frames are bytes or memoryviews.

    Raises
    ------
    TransferError
        If the peer cannot be reached, does not answer in time, or reports an error.
    ProtocolBroken
        If it answers something else, or too much.

    Notes
    -----
    When cancelled, the connection is dropped: a half-read reply is never taken for the next one.
    """
    try:
        reply = await asyncio.wait_for(_exchange(pool, address, op, message, limit_bytes, mark), timeout_s)
    except asyncio.TimeoutError as error:
        raise TransferError(address, f"no answer to {op} within {timeout_s:g} s") from error
    except (OSError, EOFError) as error:  # CommClosedError and TLS errors are OSErrors
        raise TransferError(address, f"{type(error).__name__}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, struct.error, msgpack.UnpackException) as error:
        raise ProtocolBroken(address, f"its answer to {op} cannot be read: {error}") from error
    if not isinstance(reply, dict) or reply.get("status") != "OK":
        raise TransferError(address, _complaint(op, reply))
    return reply


async def _exchange(
    pool: Any,
    address: str,
    op: str,
    message: dict[str, Any],
    limit_bytes: int,
    mark: Mark,
) -> Any:
    comm = await pool.connect(address, timeout=CONNECT_TIMEOUT_S)
    try:
        if mark is not None:
            mark(comm)
        await comm.write({"op": op, "reply": True, **message})
        return await _read(comm, limit_bytes)
    except BaseException:
        comm.abort()
        raise
    finally:
        pool.reuse(address, comm)


async def _read(comm: Any, limit_bytes: int) -> Any:
    stream = getattr(comm, "stream", None)
    if stream is None:
        # Neither tcp nor tls (or closed): the transport's own reading, without any family of serialisers but ours.
        return await comm.read(deserializers=(FAMILY,))
    try:
        return _loads(await _read_frames(stream, limit_bytes))
    except OSError:
        raise
    except Exception as error:
        # Tornado's StreamClosedError is an IOError; what remains is a reply that breaks the format.
        raise ValueError(str(error) or type(error).__name__) from error


async def _read_frames(stream: Any, limit_bytes: int) -> list[memoryview]:
    """Frames of one message.

    Source: ``distributed.comm.tcp.TCP.read`` (2024.8 to 2026.8): a length, so many bytes, which start with the count
    and the lengths of all frames; frames that do not fit into them follow one by one.
    """
    (head_bytes,) = _LENGTH.unpack(await stream.read_bytes(_LENGTH.size))
    if not _LENGTH.size <= head_bytes <= limit_bytes:
        raise ValueError(f"a message of {head_bytes} bytes")
    head = await _read_exactly(stream, head_bytes)
    (count,) = _LENGTH.unpack_from(head)
    start = _LENGTH.size * (1 + count)
    if count > FRAMES_LIMIT or start > head_bytes:
        raise ValueError(f"{count} frames")
    lengths = struct.unpack_from(f"{count}Q", head, _LENGTH.size)
    if sum(lengths) > limit_bytes:
        raise ValueError(f"a message of {sum(lengths)} bytes")
    frames = []
    for length in lengths:
        if start + length <= head_bytes:
            frames.append(head[start : start + length])
            start += length
        elif start == head_bytes:
            frames.append(await _read_exactly(stream, length))
        else:
            raise ValueError("a frame across the end of the message")
    return frames


async def _read_exactly(stream: Any, size_bytes: int) -> memoryview:
    buffer = bytearray(size_bytes)
    if size_bytes:
        await stream.read_into(buffer)
    return memoryview(buffer)


def _loads(frames: list[memoryview]) -> Any:
    def place(value: dict[Any, Any]) -> Any:
        if "__Pickled__" in value:
            raise ValueError("it holds a pickled object")
        if "__Serialized__" not in value:
            return value
        header = msgpack.loads(frames[value["__Serialized__"]], use_list=False)
        if any(header.get("compression") or ()):
            raise ValueError("it holds a compressed frame")
        first = value["__Serialized__"] + 1
        return _joined(frames[first : first + header["num-sub-frames"]])

    return msgpack.loads(frames[0], object_hook=place, use_list=False, strict_map_key=False)


def _joined(frames: Any) -> Payload:
    payload: Payload = frames[0] if len(frames) == 1 else b"".join(frames)
    return payload


def _complaint(op: str, reply: Any) -> str:
    if not isinstance(reply, dict):
        return f"it does not know {op}" if reply is None else f"it answered {op} with {type(reply).__name__}"
    text = reply.get("text") or reply.get("exception_text") or reply.get("status")
    return f"{op} failed there: {str(text)[:1000]}"


def _family_loads(header: dict[str, Any], frames: list[Payload]) -> Payload:
    return _joined(frames)


# No `dumps`: what is sent is made by `frame`, already serialised.
register_serialization_family(FAMILY, None, _family_loads)
