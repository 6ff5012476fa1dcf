"""A file of numbered JSON lines, one for each thing that was done, which can be taken back to an earlier one."""

from __future__ import annotations

from pathlib import Path

from onlinerl.stores import _files


class Lines:
    """Line n, from 1, is about the n-th thing. Each is on the disk when `append` returns.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size if path.exists() else 0

    def read(self) -> list[str]:
        """All whole lines; half of one, which a kill has left, is none."""
        if not self._path.exists():
            return []
        return self._path.read_bytes()[: self._size].decode().splitlines()

    def cut(self, count: int) -> None:
        """Forget all but the first lines.

        Raises:
            StoreError: if there are not so many.
        """
        data = self._path.read_bytes() if self._path.exists() else b""
        ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
        if len(ends) < count:
            raise _files.damaged(self._path, f"it has {len(ends)} lines, and {count} steps were taken")
        self._size = ends[count - 1] if count else 0
        if self._size < len(data):
            _files.replace(self._path, data[: self._size])

    def append(self, line: str) -> None:
        """One more.

        Raises:
            StoreError: if it cannot be written.
        """
        data = line.encode() + b"\n"
        _files.append(self._path, [data], at=self._size)
        self._size += len(data)
