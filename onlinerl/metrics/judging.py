"""Metrics of what an oracle costs, and of what one that compares goes by."""

from __future__ import annotations

from onlinerl.metrics.definition import Definition, Series

ORACLE = "Oracle and training data"
JUDGING = (
    Definition(
        name="oracle_requests",
        help="Questions that the oracle has put to a model or a service, those that failed and were asked again included",
        unit="calls",
        section=ORACLE,
        labels={"phase": ()},
        series=(Series(name="onlinerl_oracle_requests_total", kind="counter", labels={"phase": None}),),
    ),
    Definition(
        name="oracle_tokens",
        help="Tokens that the oracle has read and written",
        unit="tokens",
        section=ORACLE,
        labels={"phase": (), "kind": ("prompt", "completion")},
        series=(Series(name="onlinerl_oracle_tokens_total", kind="counter", labels={"phase": None, "kind": None}),),
    ),
    Definition(
        name="oracle_seconds",
        help="Time that all questions of the oracle took together, also where several were under way at once",
        unit="s",
        section=ORACLE,
        labels={"phase": ()},
        series=(Series(name="onlinerl_oracle_seconds_total", kind="counter", labels={"phase": None}),),
    ),
    Definition(
        name="oracle_usd",
        help="What the oracle has cost, by its price_per_million_tokens",
        unit="USD",
        section=ORACLE,
        title="Cost of the oracle",
        labels={"phase": ()},
        series=(Series(name="onlinerl_oracle_usd_total", kind="counter", labels={"phase": None}),),
    ),
    Definition(
        name="swap_disagreement",
        help="Share of the pairs compared in both orders whose orders name different winners: 1 for a judge that always names the first",
        unit="ratio",
        section=ORACLE,
        title="Verdicts that flip with the order",
        estimators=("ratio",),
        n_min=200,
        n_of="pairs",
        series=(Series(name="onlinerl_swap_disagreement_ratio"),),
    ),
    Definition(
        name="first_place_wins",
        help="Share of comparisons won by the response that is shown first, a tie being half; 0.5 without a position bias",
        unit="ratio",
        section=ORACLE,
        title="Wins of the first place",
        estimators=("ratio",),
        n_min=200,
        n_of="pairs",
        series=(Series(name="onlinerl_first_place_wins_ratio"),),
    ),
    Definition(
        name="longer_wins",
        help="Share of the compared pairs of different length, in characters, of which the oracle prefers the longer response, a tie being half",
        unit="ratio",
        section=ORACLE,
        title="Wins of the longer response",
        estimators=("ratio",),
        n_min=200,
        n_of="pairs",
        series=(Series(name="onlinerl_longer_wins_ratio"),),
    ),
    Definition(
        name="preference_cycles",
        help="Share of the triples of responses to a prompt whose preferences go in a circle, of groups in which all pairs were compared: 0 for "
        "scores, 0.25 for coins",
        unit="ratio",
        section=ORACLE,
        title="Preferences that go in a circle",
        estimators=("ratio",),
        n_min=200,
        n_of="triples",
        series=(Series(name="onlinerl_preference_cycles_ratio"),),
    ),
)
