"""The role of what moves weights."""

from __future__ import annotations

from typing import Protocol

from onlinerl.types import SyncReport


class WeightSync(Protocol):
    """Moves the policy into every replica of the engine, and proves that it arrived."""

    def push(self, version: int, model: str = "policy") -> SyncReport:
        """Send, reset caches, prove. Returns only if everything was proved.

        Args:
            version: which the engine then says of its responses.
            model: whose weights: "policy", or the path of a saved model, which the learner reads.

        Raises:
            SyncError: on any failure, with the replica's own error.
        """
        ...
