"""Values on the disk instead of in memory, for as long as a phase works with them."""

from __future__ import annotations

import contextlib
import io
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

from onlinerl.stores import _files
from onlinerl.types import TrainItem, TrainSequence

V = TypeVar("V")


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Scratch]:
    """Files without names below `folder`: nobody else can change them, and they are gone with the process."""
    files = contextlib.ExitStack()
    try:
        yield Scratch(folder, files)
    finally:
        with contextlib.suppress(OSError):  # what a full disk has not taken nobody asks for any more
            files.close()


def _reduced(value: Any) -> Any:
    return _made, (type(value), [getattr(value, name) for name in _fields(type(value))])


def _reduced_array(array: np.ndarray) -> Any:
    simple = array.ndim == 1 and not array.dtype.hasobject
    return (np.frombuffer, (array.tobytes(), array.dtype.str)) if simple else array.__reduce_ex__(5)


_REDUCED: Mapping[type, Callable[[Any], Any]] = {TrainItem: _reduced, TrainSequence: _reduced, np.ndarray: _reduced_array}
"""How what items are made of is pickled: the usual ways with frozen dataclasses and arrays take several times as long."""


def _fields(kind: type) -> tuple[str, ...]:
    if kind not in _known:
        _known[kind] = tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
    return _known[kind]


_known: dict[type, tuple[str, ...]] = {}


def _made(kind: type, values: list[Any]) -> Any:
    made: Any = object.__new__(kind)
    for name, value in zip(_fields(kind), values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _pickled(value: Any) -> bytes:
    sink = io.BytesIO()
    pickler = pickle.Pickler(sink, protocol=5)
    pickler.dispatch_table = _REDUCED
    pickler.dump(value)
    return sink.getvalue()


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
            data = _pickled(value)
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
