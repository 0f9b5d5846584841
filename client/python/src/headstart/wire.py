"""Messages of a response stream, their KV without a copy, and checksums."""

from __future__ import annotations

import dataclasses
import struct

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

from headstart.errors import HeadstartDataLoss
from headstart.v1 import prefill_pb2 as pb

_CHUNK_TAG = 3 << 3 | 2  # of PrefillResponse
_DATA_TAG = 15 << 3 | 2  # of KvChunk
_VARINT, _FIXED32 = 0, 5


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A pb.KvChunk without its data, which is a view of bytes of the message."""

    header: pb.KvChunk
    data: np.ndarray


def decode(message: bytes) -> tuple[str, object]:
    """Name and content of a message's event: accepted, manifest, chunk (a Chunk), completed (a CheckedCompletion)."""
    chunk = _decode_chunk_in_place(message)
    if chunk is not None:
        return "chunk", chunk
    try:
        response = pb.PrefillResponse.FromString(message)
    except DecodeError as error:
        raise HeadstartDataLoss("a message of the stream is no PrefillResponse") from error
    event = response.WhichOneof("event")
    if event is None:
        raise HeadstartDataLoss("a message of the stream holds 0 known events, not 1")
    content = getattr(response, event)
    return event, Chunk(content, np.frombuffer(content.data, np.uint8)) if event == "chunk" else content


def _decode_chunk_in_place(message: bytes) -> Chunk | None:
    """None: no chunk, or one whose `data` is not the last thing in the message, as the format lets servers write it."""
    try:
        if message[0] != _CHUNK_TAG:
            return None
        size, begin = _read_varint(message, 1)
        header_end = _skip_header(message, begin)
        data_size, data_begin = _read_varint(message, header_end + 1)
        if header_end < begin or not begin + size == data_begin + data_size == len(message):
            return None
        return Chunk(pb.KvChunk.FromString(message[begin:header_end]), np.frombuffer(message, np.uint8, offset=data_begin))
    except (IndexError, DecodeError):
        return None


def _skip_header(message: bytes, at: int) -> int:
    """Where the tag of `data` is, or -1 when something else than numbers comes before it."""
    while message[at] != _DATA_TAG:
        kind = message[at] & 7
        if kind == _VARINT and message[at] < 0x80:
            _, at = _read_varint(message, at + 1)
        elif kind == _FIXED32 and message[at] < 0x80:
            at += 5
        else:
            return -1
    return at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a varint of more than 10 bytes")


def chunk_crc32c(header: pb.KvChunk, data: np.ndarray | bytes) -> int:
    """The checksum of a chunk: CRC-32C of six little-endian uint32 and the data."""
    numbers = struct.pack(
        "<6I",
        header.index,
        header.layer,
        header.token_begin,
        header.token_count,
        header.kv_head_begin,
        header.kv_head_count,
    )
    return google_crc32c.extend(google_crc32c.value(numbers), data)


def check_completion(completed: pb.Completed) -> pb.CheckedCompletion:
    """As it goes over the wire."""
    serialized = completed.SerializeToString()
    return pb.CheckedCompletion(completed=serialized, crc32c=google_crc32c.value(serialized))


def read_completion(checked: pb.CheckedCompletion) -> pb.Completed:
    crc = google_crc32c.value(checked.completed)
    if crc != checked.crc32c:
        raise HeadstartDataLoss(f"completed: crc32c is {crc:08x}, the sender's was {checked.crc32c:08x}")
    try:
        return pb.Completed.FromString(checked.completed)
    except DecodeError as error:
        raise HeadstartDataLoss("completed: the bytes are no `Completed`") from error
