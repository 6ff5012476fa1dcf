"""What is on disk must have come from weights that are there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinerl import graph
from onlinerl.errors import StoreError
from onlinerl.resuming import require_in_order

WHOLE = set(graph.NAMES)


class Stored:
    """What is finished, by iteration, and which artefacts there are."""

    path = Path("/runs/r")

    def __init__(self, done: dict[int, set[str]], *artefacts: int) -> None:
        self._done, self._artefacts = done, list(artefacts)

    def phase_done(self, iteration: int, phase: str) -> bool:
        return phase in self._done.get(iteration, set())

    def iterations(self) -> list[int]:
        return sorted(self._done)

    def artefacts(self, kind: str) -> list[int]:
        return self._artefacts


TRAINED = {"sample", "label", "annotate", "train", "checkpoint"}


def test_what_is_sampled_with_lag_before_the_push_of_the_iterate_between_is_in_order():
    stored = Stored({0: WHOLE, 1: WHOLE, 2: TRAINED, 3: {"sample"}}, 1, 2)
    require_in_order(stored, 1)
    with pytest.raises(StoreError, match="there are results of iteration 3"):
        require_in_order(stored, 0)


@pytest.mark.parametrize(
    ("stored", "gap"),
    [
        (Stored({0: WHOLE, 2: {"sample"}}, 1), 2),  # the prompts of 2 begin where those of 1 end
        (Stored({0: WHOLE, 1: WHOLE, 2: {"sample"}, 3: TRAINED}, 1, 3), 3),  # trained from an iterate that was not pushed
        (Stored({0: WHOLE, 1: TRAINED, 2: {"sample"}, 3: {"sample"}}, 1), 3),  # sampled from one that was not pushed
    ],
)
def test_with_lag_too_nothing_stays_whose_weights_are_gone(stored, gap):
    with pytest.raises(StoreError, match=f"there are results of iteration {gap}") as refused:
        require_in_order(stored, 1)
    assert f"iterations/{gap:04d}" in refused.value.fix
