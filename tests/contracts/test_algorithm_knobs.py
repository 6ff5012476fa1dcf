"""No knob of an algorithm is read by nobody: each value that a key may take changes what is trained, or what the loss says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from algorithm_cases import Policy, annotated_items, build, group, pairs_of

from onlinerl import registry

LEARNERS = {("ppo", "critic"), ("ppo", "critic_learning_rate")}
"""Keys that the learner reads, where they are tested."""

PAST = [{"responses": 20.0, "score_mean": 2.0, "score_std": 3.0, "kl_rollouts": 9.0, "kl_coef": 0.05}]
REWARD = {"kl_in": "reward"}
PAIRWISE = {"beta": [({}, 0.3)], "label_smoothing": [({}, 0.2)], "soft_labels": [({}, True)], "nll_coef": [({}, 0.5)]}
PAIRWISE |= {"length_norm": [({}, True)]}

CHANGES: dict[str, dict[str, list[tuple[dict[str, Any], Any]]]] = {
    "dpo": PAIRWISE,
    "dno_prct": PAIRWISE | {"floor": [({}, 0.5)], "margin": [({}, 0.5)]},
    "dno": {"eta": [({}, 0.3)], "reward_scale": [({}, 4.0)]},
    "sppo": {"eta": [({}, 10.0)], "train": [({}, "all")]},
    "grpo": {
        "std_norm": [({}, "batch"), ({}, "none"), ({"std_norm": "batch"}, "none")],
        "agg": [({}, "token_mean")],
        "clip_low": [({}, 0.05)],
        "clip_high": [({}, 0.05)],
        "dual_clip": [({}, 1.01)],
        "kl": [({}, 0.5)],
        "sampler_cap": [({}, 0.9), ({}, None), ({"sampler_cap": 0.9}, None)],
    },
    "ppo": {
        "kl": [({}, 0.5), (REWARD, 0.5), ({}, 0.0)],
        "kl_in": [({}, "reward")],
        "target_kl": [(REWARD, 1.0)],
        "kl_horizon": [(REWARD | {"target_kl": 1.0}, 100)],
        "gamma": [({}, 0.5)],
        "lam": [({}, 0.5)],
        "clip": [({}, 0.05)],
        "dual_clip": [({}, 1.01)],
        "normalize_scores": [({}, False)],
        "whiten_rewards": [({}, True)],
        "missing_eos_score": [({}, -1.0)],
        "whiten_advantages": [({}, False)],
        "value_clip": [({}, 0.1), ({"value_clip": 0.1}, 0.3)],
        "vf_coef": [({}, 1.0)],
        "entropy_coef": [({}, 0.1)],
        "sampler_cap": [({}, 0.9), ({}, None), ({"sampler_cap": 0.9}, None)],
        "critic_warmup": [({}, 2)],
    },
}

CASES = [
    pytest.param(name, field, base, value, id=f"{name}-{field}-{number}")
    for name, fields in CHANGES.items()
    for field, changes in fields.items()
    for number, (base, value) in enumerate(changes)
]


@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_every_knob_is_here(name):
    fields = {field for field in type(build(name, {})).model_fields if (name, field) not in LEARNERS}
    assert set(CHANGES.get(name, {})) == fields, f"say in CHANGES how each knob of {name} is set, and to what"


def outcome(name: str, knobs: dict[str, Any]) -> tuple[float, list[float], list[int], list[str]]:
    """Loss per unit, its gradient, items per group, and what was left out."""
    algorithm = build(name, knobs)
    groups = [group(np.random.default_rng(number), number, "scores") for number in range(5)]
    built = [algorithm.items(one, pairs_of(one) if algorithm.needs.pairs else []) for one in groups]
    items = algorithm.prepare(annotated_items(algorithm), PAST)
    loss, gradient, _ = Policy(items).gradient(algorithm, [items])
    return loss, gradient.tolist(), [len(kept) for kept, _ in built], [str(dropped) for _, dropped in built]


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
