"""What an oracle that compares goes by, counted by hand."""

from __future__ import annotations

import math

from onlinerl.controller.comparing import Compared
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
