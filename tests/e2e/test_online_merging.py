"""When the loop merges what an iteration has trained: on the toy learner, which is given something to merge with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_runs import weights

from onlinerl.learners.toy import Toy, ToyLearner
from onlinerl.types import derive_seed

KEYS = {"metrics.prometheus": False, "iterations": 2}


@pytest.fixture
def merging(monkeypatch, tiny_model):
    """Switches it on: half of what an iteration has changed stays. Returns what the learner was asked, in order."""
    asked: list[object] = []

    def update(self, steps, rates, original=ToyLearner.update):
        for report in original(self, steps, rates):
            asked.append("step")
            yield report

    def keep_weights(self):
        asked.append("keep")
        self._kept = self.logits.detach().clone()

    def merge(self, seed):
        asked.append(seed)
        with torch.no_grad():
            self.logits.sub_((self.logits - self._kept) / 2)

    monkeypatch.setattr(ToyLearner, "update", update)
    monkeypatch.setattr(ToyLearner, "keep_weights", keep_weights)
    monkeypatch.setattr(ToyLearner, "merge", merge)
    monkeypatch.setattr(Toy, "merges", True)
    return asked, {"training.online_merging.base_model": str(tiny_model)}


def test_once_after_the_last_step_of_each_iteration(toy_config, onlinerl, merging, tmp_path):
    asked, keys = merging
    assert onlinerl("run", toy_config(tmp_path, KEYS, name="plain", file="plain.yaml"))[0] == 0
    assert asked == ["step"] * 4
    asked.clear()
    code, message = onlinerl("run", toy_config(tmp_path, KEYS | keys))
    assert code == 0, message
    seeds = [derive_seed(0, "online_merging", t) for t in (1, 2)]
    assert asked == ["keep", "step", "step", seeds[0], "keep", "step", "step", seeds[1]]
    plain, halved = (weights(tmp_path / f"runs/{name}", 1) for name in ("plain", "toy"))
    np.testing.assert_allclose(halved, plain / 2)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, ["step", 1, "keep", "step", 2, "keep", "step", 3, "keep", "step", None]),
        (2, ["step", "step", 2, "keep", "step", "step", None]),
        (3, ["step", "step", "step", 3, "keep", "step", None]),
        (9, ["step"] * 4 + [None]),
    ],
)
def test_after_so_many_steps_and_the_rest_at_the_end(toy_config, onlinerl, merging, tmp_path, every, expected):
    """Each merge of what has changed since the one before, with a seed of its own."""
    asked, keys = merging
    more = {"training.online_merging.every": every, "training.epochs": 2, "iterations": 1}
    code, message = onlinerl("run", toy_config(tmp_path, KEYS | keys | more))
    assert code == 0, message
    at = {place: derive_seed(0, "online_merging", 1, *([place] if place else [])) for place in (None, 1, 2, 3)}
    assert asked == ["keep", *(each if isinstance(each, str) else at[each] for each in expected)]


def test_not_where_there_was_nothing_to_learn(toy_config, onlinerl, merging, oracle, tmp_path):
    asked, keys = merging
    tied = oracle("return [[0.0] * len(q['responses']) for q in queries]")
    code, message = onlinerl("run", toy_config(tmp_path, KEYS | keys | tied))
    assert code == 0, message
    assert asked == []
