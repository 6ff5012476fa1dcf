"""Values on the disk instead of in memory, for as long as a phase works with them."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar, overload

from onlinerl.stores import _files

V = TypeVar("V")


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Scratch]:
    """Files without names below `folder`: nobody else can change them, and they are gone with the process."""
    with contextlib.ExitStack() as files:
        yield Scratch(folder, files)


class Scratch:
    """Keeps any number of sequences."""

    def __init__(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._folder, self._files = folder, files

    def keep(self, values: Iterable[V]) -> Sequence[V]:
        """The same values in the same order, each of them read when it is asked for."""
        with _files.explained(self._folder):
            file = self._files.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        ends = array("Q", [0])
        for value in values:
            data = pickle.dumps(value, protocol=5)
            with _files.explained(self._folder):
                file.write(data)
            ends.append(ends[-1] + len(data))
        with _files.explained(self._folder):
            file.flush()
        return _Kept(file, ends)


class _Kept(Sequence[V]):
    def __init__(self, file: IO[bytes], ends: array[int]) -> None:
        self._file, self._ends = file, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> V: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[V]: ...
    def __getitem__(self, index: int | slice) -> V | Sequence[V]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index % len(self)], self._ends[index % len(self) + 1]
        self._file.seek(start)
        value: V = pickle.loads(self._file.read(end - start))
        return value
