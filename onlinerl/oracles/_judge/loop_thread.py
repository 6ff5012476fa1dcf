"""An asyncio loop in a thread of its own, for callers that know nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
END_S = 10.0


class LoopThread:
    """Runs until it is ended."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="judge", daemon=True).start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it; may be called from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it."""
        return self.begin(work).result()

    def end(self, last: Callable[[], Awaitable[None]] | None) -> None:
        """Cancel all that is under way, do one last thing and stop."""
        with contextlib.suppress(TimeoutError):
            self.begin(_wind_up(last)).result(END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _wind_up(last: Callable[[], Awaitable[None]] | None) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last is not None:
        await last()
