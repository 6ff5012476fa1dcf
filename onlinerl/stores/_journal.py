"""A table's newest rows: a file of frames, each of which holds one Arrow record batch; the first one holds the schema.

A frame is a header (magic, length and CRC-32 of the payload, CRC-32 of the header itself), the payload and an end mark. It is appended
with one write and one flush, so a crash leaves the file cut short, or with blocks of zeros where a power cut came first. Both can only
be at the end, and are ignored; anything else that does not agree with its checksum is damage. Payloads are compressed, which leaves no
zeros in them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from onlinerl.stores import _files

_HEADER = struct.Struct("<4sIII")
_MAGIC = b"olrl"
_END = b"\xffend"
_BLOCK = 512
"""What a disk writes whole."""
_LENGTH = struct.Struct("<I")
_CODEC = pa.Codec("lz4")


@dataclass(frozen=True)
class _Frame:
    offset: int
    """Of the payload."""
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length + len(_END)


class Journal:
    """The newest rows of one table, on the disk and in memory: it becomes a part before it grows large. No file is an empty journal.

    Raises:
        StoreError: if the file is damaged.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.batches: list[pa.RecordBatch] = []
        """In the order of `append`."""
        self.starts: list[int] = []
        """The first row of each batch."""
        self.rows = self.bytes = 0
        """Of all batches, in memory."""
        self._size = 0
        for frame, batch in _read(path):
            self._add(batch, batch.nbytes)
            self._size, self.schema = frame.end, batch.schema

    def _add(self, batch: pa.RecordBatch, nbytes: int) -> None:
        self.batches.append(batch)
        self.starts.append(self.rows)
        self.rows += batch.num_rows
        self.bytes += nbytes

    def append(self, batch: pa.RecordBatch) -> None:
        """Add a batch; it is on the disk when this returns, and not in the file if it raises."""
        message = batch.serialize()
        pieces = [*([] if self._size else _framed(self.schema.serialize())), *_framed(message)]
        _files.append(self.path, pieces, at=self._size)
        self._size += sum(map(len, pieces))
        self._add(batch, message.size)

    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """One batch."""
        return self.batches[number] if columns is None else self.batches[number].select(columns)


def read(path: Path) -> Iterator[pa.RecordBatch]:
    """All batches of a journal, in the order of `append`; none if it is not there.

    Raises:
        StoreError: if the file is damaged.
    """
    return (batch for _, batch in _read(path))


def _read(path: Path) -> Iterator[tuple[_Frame, pa.RecordBatch]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _files.damaged(path, str(error)) from error
    frames = _frames(data, path)
    try:
        schema = pa.ipc.read_schema(_unpacked(_payload(data, frames[0]))) if frames else None
        for frame in frames[1:]:
            yield frame, _decoded(_payload(data, frame), schema)
    except (pa.ArrowException, OSError, struct.error) as error:
        raise _files.damaged(path, str(error)) from error


def _framed(message: pa.Buffer) -> list[bytes]:
    """What is written of a message, in pieces: to join them would take longer than to compress it."""
    length, compressed = _LENGTH.pack(message.size), _CODEC.compress(message, asbytes=True)
    checksum = zlib.crc32(compressed, zlib.crc32(length))
    head = struct.pack("<4sII", _MAGIC, len(length) + len(compressed), checksum)
    return [head + struct.pack("<I", zlib.crc32(head)) + length, compressed, _END]


def _unpacked(payload: memoryview) -> pa.Buffer:
    (size,) = _LENGTH.unpack_from(payload)
    return _CODEC.decompress(payload[_LENGTH.size :], decompressed_size=size)


def _decoded(payload: memoryview, schema: pa.Schema) -> pa.RecordBatch:
    return pa.ipc.read_record_batch(_unpacked(payload), schema)


def _payload(data: bytes, frame: _Frame) -> memoryview:
    return memoryview(data)[frame.offset : frame.offset + frame.length]


def _frames(data: bytes, path: Path) -> list[_Frame]:
    """Every whole frame. What a crash left of the last one is not counted."""
    frames: list[_Frame] = []
    position = 0
    while position < len(data):
        head = data[position : position + _HEADER.size]
        if len(head) < _HEADER.size:
            break
        magic, length, checksum, of_head = _HEADER.unpack(head)
        frame = _Frame(position + _HEADER.size, length)
        known = magic == _MAGIC and zlib.crc32(head[:-4]) == of_head
        if known and frame.end > len(data):
            break  # cut short
        if not known or zlib.crc32(_payload(data, frame)) != checksum or data[frame.end - len(_END) : frame.end] != _END:
            is_last = frame.end == len(data) if known else not _has_frame(data, position + 1)
            if is_last and _has_hole(data, position):
                break
            raise _files.damaged(path, f"the frame at byte {position} does not agree with its checksum")
        frames.append(frame)
        position = frame.end
    return frames


def _has_frame(data: bytes, start: int) -> bool:
    """Whether a frame begins anywhere behind `start`."""
    while (start := data.find(_MAGIC, start)) >= 0:
        head = data[start : start + _HEADER.size]
        if len(head) == _HEADER.size and zlib.crc32(head[:-4]) == _HEADER.unpack(head)[3]:
            return True
        start += 1
    return False


def _has_hole(data: bytes, start: int) -> bool:
    """Whether a block of the disk, as far as it belongs to what begins at `start`, was never written."""
    for block in range(start - start % _BLOCK, len(data), _BLOCK):
        piece = data[max(start, block) : block + _BLOCK]
        if not any(piece):
            return True
    return False


def discard(path: Path) -> None:
    """Remove a journal; nothing happens if there is none."""
    with _files.explained(path):
        path.unlink(missing_ok=True)
        _files.sync_directory(path.parent)
