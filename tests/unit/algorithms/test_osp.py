from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, judged, pair

from onlinerl import config as configuration
from onlinerl.algorithms.dno import Dno
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.osp import Osp

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"
VARIANTS = [{}]
KNOBS = MARGIN_KNOBS | {"soft_labels": [({}, False)]}


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    assert evaluate(Osp(), [ITEM], ROWS)[0] == pytest.approx(0.8 * F_PLUS + 0.2 * F_MINUS, rel=1e-7)


def test_its_pairs_are_those_of_rank_r_and_r_plus_half():
    """Four responses with win rates .9, .7, .4 and 0, in another order; whoever wants other pairs says so."""
    config = configuration.load(QUICKSTART, ["algorithm.name=osp"])
    group = judged([1, 2, 3, 4], scores=(0.4, 0.9, 0.0, 0.7))
    pairs, _ = configuration.pair_builder(config).build(group)
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (3, 2)]
    assert (Osp().needs.pairing, Osp().needs.preferences, Dpo().needs.pairing) == ("ranked", True, None)
    other = configuration.load(QUICKSTART, ["algorithm.name=osp", "pairing.name=best_worst"])
    assert [(p.chosen, p.rejected) for p in configuration.pair_builder(other).build(group)[0]] == [(1, 2)]


def test_a_certain_pair_is_that_of_dpo():
    certain = pair(*ITEM.sequences, prob=1.0)
    one, other = (evaluate(a, [certain], ROWS) for a in (Osp(), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_dno_is_the_same_with_its_own_target():
    rates = [s.with_(win_rate=rate) for s, rate in zip(ITEM.sequences, (0.9, 0.1), strict=True)]
    q = 1 / (1 + math.exp(-0.8))
    osp, dno = evaluate(Osp(), [pair(*rates, prob=q)], ROWS)[0], evaluate(Dno(eta=0.1), [pair(*rates)], ROWS)[0]
    assert osp == pytest.approx(dno, rel=1e-6)
