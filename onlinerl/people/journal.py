"""A file of JSON objects, one a line, to which one process at a time appends and which any number read meanwhile.

Each line begins with the CRC-32 of the object behind it. A line is on the disk when `append` returns. What a crash leaves of one is a torn
tail, which readers ignore and the next writer cuts off; any other line that does not agree with its checksum is damage.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onlinerl import durable
from onlinerl.errors import StoreError

Entry = Mapping[str, Any]


class Journal:
    """Of one file; no file is an empty journal.

    Args:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        """Bytes of the file that were read, all of whole lines."""
        self._file: int | None = None
        """Which file that was, by its inode."""

    def news(self) -> list[dict[str, Any]]:
        """The entries since the last call, one's own included.

        Raises:
            StoreError: if the file is damaged or cannot be read.
        """
        try:
            state = self.path.stat()
            if state.st_size < self._read or self._file not in (None, state.st_ino):
                why, fix = "another file is in its place, as if the run had been started afresh", "start this command again"
                raise durable.damaged(self.path, why, fix)
            self._file = state.st_ino
            if state.st_size == self._read:
                return []
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise durable.damaged(self.path, str(error)) from error
        found: list[dict[str, Any]] = []
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines):
            entry = _entry(line)
            if entry is None:
                if not _has_hole(line) or any(_entry(later) is not None for later in lines[number + 1 :]):
                    raise self._damaged()
                break
            found.append(entry)
            self._read += len(line) + 1
        if _entry(torn[:-1]) is not None:  # all of a line, and then something else than its end
            raise self._damaged()
        return found

    def _damaged(self) -> StoreError:
        return durable.damaged(self.path, f"the line at byte {self._read} does not agree with its checksum")

    def append(self, entries: Sequence[Entry]) -> None:
        """Add them; they are on the disk when this returns, and `news` gives them too. Everything in the file must have been read.

        Raises:
            StoreError: if the disk does not take them; then none is in the file.
        """
        durable.append(self.path, [_line(entry) for entry in entries], at=self._read)


def _line(entry: Entry) -> bytes:
    said = json.dumps(entry, ensure_ascii=True).encode()
    return b"%08x " % zlib.crc32(said) + said + b"\n"


def _has_hole(line: bytes) -> bool:
    """Whether a block of the disk, as far as it belongs to a line, was never written. A flipped bit makes no more than one zero of it."""
    return line.startswith(b"\0") or line.count(b"\0") > 1


def _entry(line: bytes) -> dict[str, Any] | None:
    """None if it does not agree with its checksum."""
    checksum, _, said = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(said):
        return None
    entry: dict[str, Any] = json.loads(said)
    return entry
