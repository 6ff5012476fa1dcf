"""The role of what moves weights."""

from __future__ import annotations

from typing import Protocol

from onlinerl.types import SyncReport


class WeightSync(Protocol):
    """Moves the policy into every replica of the engine, and proves that it arrived."""

    def push(self, version: int) -> SyncReport:
        """Send, reset caches, prove. Returns only if everything was proved.

        Raises:
            SyncError: on any failure, with the replica's own error.
        """
        ...
