from __future__ import annotations

import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, judged
from pydantic import ValidationError

from onlinerl.algorithms.ipo import Ipo
from onlinerl.algorithms.ipo_md import IpoMd
from onlinerl.types import Pair, Plan

VARIANTS = [{}, {"mixture_coef": 0.5, "tau": 0.3, "soft_labels": True}]
KNOBS = (
    MARGIN_KNOBS
    | {
        "tau": [({}, 0.3)],
        "mixture_coef": [({}, 0.5)],
        "mixture_samples": [({}, 3)],
        "reference_free": [],  # refused, see below
        "online_kl_samples": [({"online_kl": 0.5}, 1)],  # of a group of four two are the policy's
        # The other two have no token in common in any group of the contracts, and one order by both forms of CHES. See test_ipo.py.
        "token_weights": [],
        "common_token_weight": [],
        "pair_filter": MARGIN_KNOBS["pair_filter"][:-1],
    }
)


def at_reference(items):
    return 25.0


@pytest.mark.parametrize(("knobs", "expected"), [({}, 4.0), ({"tau": 0.25}, 1.0), ({"tau": 0.5, "soft_labels": True}, 6.4)])
def test_value_by_hand(knobs, expected):
    """That of IPO: h = 3 against 5, 2 and 1."""
    ours, theirs = (evaluate(algorithm(**knobs), [ITEM], ROWS) for algorithm in (IpoMd, Ipo))
    assert ours[0] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(ours[1], theirs[1])


def test_only_pairs_of_two_responses_of_the_mixture_are_trained():
    group = judged([1, 2, 3, 4], dict.fromkeys((1, 2, 3), "mixture"), scores=(3.0, 2.0, 1.0, 0.0))
    places = [(0, 3), (0, 1), (1, 3), (1, 2), (2, 3)]
    items, dropped = IpoMd().items(group, [Pair(chosen=better, rejected=worse, prob=0.9) for better, worse in places])
    assert [[len(s.response_ids) for s in item.sequences] for item in items] == [[2, 4], [2, 3], [3, 4]]
    assert dropped == {"not_mixture": 2}
    assert [IpoMd(mixture_samples=n).most_items(n + 1, 100) for n in (2, 3, 4)] == [1, 3, 6]
    assert IpoMd(mixture_samples=4).most_items(5, 2) == 2


def test_what_it_asks_for():
    needs = IpoMd(mixture_coef=0.3, mixture_samples=3).needs
    assert (needs.beside_samples, needs.mixture_weight, needs.pairing, needs.reference) == (
        ("mixture",) * 3,
        0.3,
        "all_pairs",
        True,
    )
    assert IpoMd().reference == "fixed"


def test_there_is_no_mixture_without_a_reference():
    with pytest.raises(ValidationError, match="the mixture is of policy and reference"):
        IpoMd(reference_free=True)


def test_samples_of_the_policy_are_explained():
    plan = {"iterations": 2, "references": (0, 0)}
    assert IpoMd().remarks(Plan(**plan, samples_per_prompt=1)) == []
    (remark,) = IpoMd().remarks(Plan(**plan, samples_per_prompt=4))
    assert "not trained" in remark
