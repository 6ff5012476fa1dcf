"""Numbers of one response as a run reads them back: as small as an array, and for everybody else the tuple that was stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

N = TypeVar("N", int, float)


class Numbers(Sequence[N]):
    """An array that never changes, and reads, compares, hashes and prints like the tuple of its numbers.

    >>> Numbers(np.array([5, 6, 7], np.uint32))[1:] == (6, 7)
    True

    Args:
        array: one axis; nobody changes it later.
    """

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What numpy takes it for."""
        if dtype is None or dtype == self.array.dtype:
            return self.array.copy() if copy else self.array
        return self.array.astype(dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[N]:
        return iter(self.array.tolist())

    @overload
    def __getitem__(self, index: int) -> N: ...
    @overload
    def __getitem__(self, index: slice) -> Numbers[N]: ...
    def __getitem__(self, index: int | slice) -> N | Numbers[N]:
        found: Any = self.array[index]
        return Numbers(found) if isinstance(index, slice) else found.item()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbers):
            return np.array_equal(self.array, other.array)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Numbers, (self.array,)
