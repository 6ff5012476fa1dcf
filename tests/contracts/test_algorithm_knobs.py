"""No knob of an algorithm is read by nobody: each value that a key may take changes what is trained, or what the loss says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from algorithm_cases import GOLDEN, Policy, annotated_items, build, golden, group, pairs_of, selected, sources

from onlinerl import registry
from onlinerl.protocols.needs import Needs

PAST = [{"responses": 20.0, "score_mean": 2.0, "score_std": 3.0, "kl_rollouts": 9.0, "kl_coef": 0.05}]


def knobs(name: str) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """How each knob is set, with which others, and to what; without a golden test, which is a failure of its own, none."""
    return golden(name).KNOBS if (GOLDEN / f"test_{name}.py").is_file() else {}


CASES = [
    pytest.param(name, field, base, value, id=f"{name}-{field}-{number}")
    for name in registry.names("algorithms")
    for field, changes in knobs(name).items()
    for number, (base, value) in enumerate(changes)
]


@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_every_knob_is_here(name):
    assert set(golden(name).KNOBS) == set(type(build(name, {})).model_fields), f"say in KNOBS how each knob of {name} is set"


def outcome(name: str, values: dict[str, Any]) -> tuple[Needs, float, list[float], list[int], list[str], list[list[int]]]:
    """What the learner is told, loss per unit, its gradient, items per group, what was left out, and the order of training."""
    algorithm = build(name, values)
    asked = {"sources": sources(algorithm), "needs": algorithm.needs}
    groups = [group(np.random.default_rng(number), number, "scores", **asked) for number in range(5)]
    built = [algorithm.items(one, pairs_of(one) if algorithm.needs.pairs else []) for one in groups]
    items = list(algorithm.prepare(selected(algorithm, annotated_items(algorithm)), PAST))
    loss, gradient, _ = Policy(items).gradient(algorithm, [items])
    order = [list(stage) for stage in algorithm.order(items)]
    left_out = [str(dropped) for _, dropped in built]
    return algorithm.needs, loss, gradient.tolist(), [len(kept) for kept, _ in built], left_out, order


@pytest.mark.parametrize(("name", "field", "base", "value"), CASES)
def test_a_knob_changes_what_is_learned(name, field, base, value):
    before, after = outcome(name, base), outcome(name, base | {field: value})
    assert before == outcome(name, base), "the comparison itself is not deterministic"
    assert before != after


def test_a_knob_that_nobody_reads_would_be_noticed(monkeypatch):
    """The fault that this file is there for."""
    algorithm = type(build("ppo", {}))
    plain = algorithm.loss

    def deaf(self, outputs, batch):
        return plain(self.model_copy(update={"dual_clip": None}), outputs, batch)

    monkeypatch.setattr(algorithm, "loss", deaf)
    with pytest.raises(AssertionError):
        test_a_knob_changes_what_is_learned("ppo", "dual_clip", {}, 1.01)
