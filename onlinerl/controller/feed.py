"""How one phase follows another: what is durable is handed on at once, to whoever waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K")

LOOK_S = 0.2
"""How often whoever waits looks whether the run is being stopped."""


class Stopped(Exception):
    """The run is being stopped; what is durable stays, and a resume goes on from there."""


class Feed(Generic[T]):
    """Things that arrive one after the other, until it is closed. Any number of threads may put and take.

    Args:
        stop: set when the run is being stopped.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._waiting: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self.waited = 0.0
        """Seconds that all takers together have waited."""

    @classmethod
    def of(cls, things: Iterable[T], stop: threading.Event) -> Feed[T]:
        """One to which nothing will be added."""
        feed = cls(stop)
        feed._waiting.extend(things)
        feed._closed = True
        return feed

    def put(self, things: Iterable[T]) -> None:
        """Hand on what is durable."""
        with self._changed:
            self._waiting.extend(things)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, most: int) -> list[T]:
        """At least one and at most so many things, in the order of arrival, as soon as there are any; none at the end.

        Raises:
            Stopped: if the run is being stopped.
        """
        with self._changed:
            began = time.monotonic()
            while not self._waiting and not self._closed and not self._stop.is_set():
                self._changed.wait(LOOK_S)
            self.waited += time.monotonic() - began
            if self._stop.is_set():
                raise Stopped
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]


class Loading(Generic[K, T]):
    """What the keys in a feed stand for, read only when it is taken: a feed of keys may grow longer than the memory has room.

    Args:
        feed: of keys.
        load: reads what keys stand for, in the same order.
    """

    def __init__(self, feed: Feed[K], load: Callable[[Sequence[K]], Sequence[T]]) -> None:
        self._feed, self._load = feed, load

    @property
    def waited(self) -> float:
        """Seconds that all takers together have waited."""
        return self._feed.waited

    def take(self, most: int) -> Sequence[T]:
        """At least one and at most so many things, in the order of arrival, as soon as there are any; none at the end.

        Raises:
            Stopped: if the run is being stopped.
        """
        return self._load(self._feed.take(most))
