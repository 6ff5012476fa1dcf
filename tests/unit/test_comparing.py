"""What an oracle that compares goes by, counted by hand."""

from __future__ import annotations

import math

import numpy as np

from onlinerl.controller.comparing import Compared, circles
from onlinerl.types import Group, Prompt, Rollout, Sampling, Verdict

NAN = math.nan


def test_flips_first_places_and_longer_responses():
    """Pairs 01 (flips: the first both times), 02 (2 wins), 12 (asked once, a tie). Lengths 1, 3, 3."""
    verdict = Verdict(annotator="a", oracle_version="1", preferences=((NAN, 0.9, 0.2), (0.9, NAN, 0.5), (0.8, NAN, NAN)))
    rollouts = tuple(
        Rollout(token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", policy_version=0, sampler=Sampling(), seed=i)
        for i, text in enumerate(("a", "bbb", "ccc"))
    )
    found = Compared.of(Group(prompt=Prompt(id="p", text="", token_ids=(1,)), rollouts=rollouts), verdict)
    assert (found.flips, found.both_orders) == (1, 2)
    assert (found.first_wins, found.comparisons) == (0 + 1 + 1 + 1 + 0.5, 5)
    assert (found.longer_wins, found.unequal) == (0.5 + 1, 2), "the flip is a tie on average"
    # On average 2 beats 0, and 0 and 1, 1 and 2 are ties, for which a coin falls.
    assert found.triples == 1
    assert found.circles in (0, 1)


def test_circles():
    wins = {"circle": [(0, 1), (1, 2), (2, 0)], "order": [(0, 1), (1, 2), (0, 2)]}
    found = {}
    for name, pairs in wins.items():
        matrix = np.full((3, 3), 0.5)
        for i, j in pairs:
            matrix[i, j], matrix[j, i] = 0.9, 0.1
        found[name] = circles(matrix)
    assert found == {"circle": 1, "order": 0}
