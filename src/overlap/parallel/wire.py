"""What the leading rank tells the others, and how: frames of msgspec over a socket. Nothing is pickled.

A frame is its length (4 bytes, big-endian), then a message. A plan is sent as it is: its columns as their bytes.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from overlap.schedule.plan import StepPlan

_LENGTH: Final = struct.Struct("!I")


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First: what to load, and where to meet."""

    model: str
    load_format: str
    revision: str | None
    cache_dir: str | None
    rank: int
    size: int
    store: str
    """The path of the file in which the ranks meet; empty for torchrun's store."""
    device: str
    """This rank's; under torchrun that of the first rank of a machine."""
    dtype: str
    max_rows: int
    token_budget: int
    graphs: bool
    halves: bool
    """Whether steps with many prompt tokens are run as two halves."""
    timeout_s: float
    """How long a sum may wait for another rank."""


class Memory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Second: how much KV, the same on all ranks."""

    num_pages: int
    context: int


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Launch this step."""

    plan: StepPlan


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Capture one more graph, as the leading rank does now."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Finish what is queued and end."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A follower is there."""

    pid: int
    rank: int = -1
    """Of torchrun; a follower that the leading rank has started is told."""
    token: str = ""


class Placed(msgspec.Struct, frozen=True, tag=True):
    """A follower has its device, and joins the others now."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A follower has its weights."""

    free_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A follower waits for plans."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A follower cannot go on, and ends now."""

    why: str


Order: TypeAlias = Setup | Memory | Launch | WarmUp | Stop
Report: TypeAlias = Hello | Placed | Loaded | Ready | Failed


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.char.encode() + value.tobytes()
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _decode(_kind: Any, data: Any) -> Any:
    if not isinstance(data, bytes):
        raise TypeError(f"a column came as a {type(data).__name__}")
    return np.frombuffer(data, dtype=np.dtype(data[:1].decode()), offset=1)


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_encode)
ORDERS: Final[msgspec.msgpack.Decoder[Order]] = msgspec.msgpack.Decoder(Order, dec_hook=_decode)
REPORTS: Final[msgspec.msgpack.Decoder[Report]] = msgspec.msgpack.Decoder(Report)


def send(connection: socket.socket, message: Order | Report) -> None:
    """Send a frame. Raises OSError once the other end is gone."""
    data = _ENCODER.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> bytes | None:
    """Wait for a frame and return its message; None once the other end is gone."""
    try:
        head = _exactly(connection, _LENGTH.size)
        return None if head is None else _exactly(connection, _LENGTH.unpack(head)[0])
    except OSError:
        return None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
