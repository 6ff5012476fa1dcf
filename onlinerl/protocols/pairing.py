"""The role of pair builders."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl.protocols.component import Component
from onlinerl.types import Judged, Pair


class PairBuilder(Component):
    """Turns one judged group into pairs."""

    def most(self, samples: int) -> int:
        """Upper bound of the pairs built from `samples` responses."""
        return samples * (samples - 1) // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many candidates were dropped for which reason."""
        raise NotImplementedError
