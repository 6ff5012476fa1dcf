from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import IMPORTANCE_KNOBS, PAID_KNOBS, evaluate, judged, sequence, single, trained
from pydantic import ValidationError

from onlinerl.algorithms.constrained import Constrained
from onlinerl.algorithms.grpo import Grpo
from onlinerl.ops.multipliers import after, weight
from onlinerl.types import Plan

TWO = {"thresholds": {"score": 0.5, "harm": 0.25}}
COST = {"form": "cost", "objective": "score", "thresholds": {"harm": 0.2}, "kl_coef": 0.1}
VARIANTS = [
    {},
    {**TWO, "base": "dr_grpo", "kl_coef": 0.1},
    COST,
    {**TWO, "form": "equality", "u0": 0.3},
    {**TWO, "form": "linear", "u0": -0.4, "std_norm": "none", "base": "gspo"},
    {**TWO, "form": "maxmin", "base": "reinforce_pp"},
]
KNOBS = (
    IMPORTANCE_KNOBS
    | PAID_KNOBS
    | {
        "form": [(TWO | {"objective": "score"}, "equality"), (TWO | {"objective": "score"}, "linear"), (TWO, "maxmin")],
        "thresholds": [({}, {"harm": 0.0})],
        "objective": [(TWO, "score"), (TWO, "charm")],
        "kl_coef": [({}, 0.5), (COST, 0.0)],
        "std_norm": [(TWO, "none")],
        "u0": [(TWO | {"objective": "score"}, 1.0)],
        "u0_std": [(TWO | {"objective": "score"}, 1.0)],
        "u0_seed": [(TWO | {"objective": "score", "u0_std": 1.0}, 1)],
        "kl_clip": [({}, 0.05), (COST, 0.05)],
        "multiplier_lr": [],  # from the second iteration on, as the next three: see below
        "momentum": [],
        "max_grad_norm": [],
        "window": [],
        "clip_range_low": [({}, 0.05)],
        "clip_range_high": [({}, 0.05)],
        "base": [({}, "dr_grpo"), ({}, "gspo")],
    }
)
HALF = 0.5**0.5
"""Of a group of two whose values differ: the advantage of the larger one."""


def at_reference(items):
    return -np.mean([item.sequences[0].advantages.mean() for item in items])


def stops_gradients(algorithm):
    """The ratio of a whole response, with `base: gspo`."""
    return algorithm.base == "gspo"


def group(scores=(1.0, 0.0), lengths=(1, 1), **components):
    one = judged(lengths, scores=scores)
    return replace(one, verdict=replace(one.verdict, components=components))


def advantages(algorithm, *groups, past=(), **kept):
    """Of each response, in the first iteration or after `past`."""
    items = [item for one in groups for item in algorithm.items(one, [])[0]]
    arrays = {"old_logprobs": -1.0, "reference_logprobs": -1.0} | kept
    filled = [
        replace(
            i, sequences=(i.sequences[0].with_(**{n: np.full(len(i.sequences[0].response_ids), v) for n, v in arrays.items()}),)
        )
        for i in items
    ]
    return [item.sequences[0].advantages[0] for item in algorithm.prepare(filled, past)]


def test_value_by_hand():
    # A = 1/4 of the score's, which prefers the first, and 3/4 of harm's, which prefers the second; a ratio of 1.1 of the first
    algorithm = Constrained(thresholds={"harm": 0.0}, objective="score", u0=math.log(3.0))
    made = advantages(algorithm, group(harm=(0.0, 7.0)))
    assert made == pytest.approx([-HALF / 2, HALF / 2], rel=1e-5)
    rows = [single(sequence(1, advantages=a, old_logprobs=-1.0, behavior_logprobs=-1.0)) for a in made]
    loss, _, _, _ = evaluate(algorithm, rows, [-1.0 + math.log(1.1), -1.0])
    assert loss == pytest.approx((1.1 * HALF / 2 - HALF / 2) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("form", "u0", "expected"),
    [
        ("bounded", 0.0, (2 - 1) * HALF + 0.5 * HALF - 0.5 * HALF),
        ("bounded", math.log(3.0), (2 - 1.5) * HALF),
        ("equality", math.atanh(0.5), (2 - 1) * HALF),
        ("linear", -0.5, HALF + -0.5 * HALF + 0.5 * HALF),
        ("cost", 0.0, (HALF - HALF + HALF) / 3),
        ("maxmin", 0.0, -HALF),
    ],
)
def test_each_form_by_hand(form, u0, expected):
    """Two constraints, one that prefers the first response and one that prefers the second, beside the score, which prefers the first."""
    knobs = {"objective": "score", "u0": u0} if form != "maxmin" else {}
    algorithm = Constrained(form=form, thresholds={"charm": 0.0, "harm": 9.0}, **knobs)
    first, second = advantages(algorithm, group(charm=(9.0, 1.0), harm=(0.0, 9.0)))
    assert (first, second) == (pytest.approx(expected, rel=1e-5, abs=1e-7), pytest.approx(-expected, rel=1e-5, abs=1e-7))


def test_the_objective_of_the_paper_is_the_kl():
    """The first response is two nats further from the reference."""
    items = [item for item in Constrained().items(group((0.0, 0.0), (2, 1)), [])[0]]
    filled = [
        replace(i, sequences=(i.sequences[0].with_(old_logprobs=np.full(n, -1.0), reference_logprobs=np.full(n, -1.0 - d)),))
        for i, n, d in zip(items, (2, 1), (1.5, 1.0), strict=True)
    ]
    made = [item.sequences[0].advantages[0] for item in Constrained().prepare(filled)]
    assert made == pytest.approx([-HALF / 2, HALF / 2], rel=1e-5)


def test_the_price_of_the_kl_is_the_same_whatever_lambda():
    """Taken off the reward and added to the cost, and divided by 1 + lambda: without other units, kl_coef."""
    for u0 in (0.0, 2.0):
        algorithm = Constrained(**COST | {"u0": u0, "std_norm": "none"})
        items = [item for item in algorithm.items(group((0.0, 0.0), harm=(1.0, 1.0)), [])[0]]
        filled = [
            replace(
                i, sequences=(i.sequences[0].with_(old_logprobs=np.full(1, -1.0), reference_logprobs=np.full(1, -1.0 - d)),)
            )
            for i, d in zip(items, (4.0, 0.0), strict=True)
        ]
        made = [item.sequences[0].advantages[0] for item in algorithm.prepare(filled)]
        assert made == pytest.approx([-0.2, 0.2], rel=1e-5)


@pytest.mark.parametrize("base", ["grpo", "reinforce_pp"])
def test_with_a_multiplier_of_nothing_it_is_the_base_on_the_objective(base):
    algorithm = Constrained(thresholds={"harm": 0.0}, objective="score", u0=-800.0, base=base)
    groups = [group((0.3, 0.9, 0.1), (3, 1, 2), harm=(5.0, 1.0, 2.0))]
    rows, kept = [[-0.4, -1.2, -0.7], [-0.9], [-1.1, -0.2]], {"old_logprobs": [np.full(n, -1.0) for n in (3, 1, 2)]}
    kept["behavior_logprobs"] = kept["old_logprobs"]
    ours = trained(algorithm, groups, reference_logprobs=kept["old_logprobs"], **kept)
    theirs = trained(Grpo(), groups, **kept)
    for one, other in zip(ours, theirs, strict=True):
        assert one.sequences[0].advantages == pytest.approx(other.sequences[0].advantages, rel=1e-6)
    if base == "grpo":
        assert evaluate(algorithm, ours, rows)[0] == pytest.approx(evaluate(Grpo(), theirs, rows)[0], rel=1e-6)


def test_scores_and_what_a_token_pays_may_be_cut_off():
    """Costs of 5 and 1 are 2 and 1, and 4 and -4 nats are 3 and -3: as advantages see them, not as multipliers do."""
    algorithm = Constrained(**COST | {"std_norm": "none", "score_clip": 2.0, "kl_clip": 3.0})
    made, _ = algorithm.items(group((0.0, 0.0), harm=(5.0, 1.0)), [])
    rows = [
        replace(i, sequences=(i.sequences[0].with_(old_logprobs=np.full(1, -1.0), reference_logprobs=np.full(1, -1.0 - d)),))
        for i, d in zip(made, (4.0, -4.0), strict=True)
    ]
    # (A_r - A_c) / 2 of rewards -0.3 and 0.3, and costs 2.3 and 0.7
    assert [item.sequences[0].advantages[0] for item in algorithm.prepare(rows)] == pytest.approx([-0.55, 0.55])
    assert algorithm.figures(rows)["mean_harm"] == 3.0


def test_the_order_of_constraints_and_a_shift_per_prompt_change_nothing():
    knobs = {"objective": "score", "u0": 0.4}
    scores = {"charm": (0.3, 0.7, 0.1), "harm": (2.0, 1.0, 5.0)}
    one = Constrained(thresholds={"charm": 0.1, "harm": 0.2}, **knobs)
    other = Constrained(thresholds={"harm": 0.2, "charm": 0.1}, **knobs)
    plain = advantages(one, group((1.0, 0.0, 3.0), (1, 1, 1), **scores))
    assert advantages(other, group((1.0, 0.0, 3.0), (1, 1, 1), **scores)) == pytest.approx(plain, rel=1e-6)
    shifted = scores | {"harm": tuple(x + 10.0 for x in scores["harm"])}
    assert advantages(one, group((1.0, 0.0, 3.0), (1, 1, 1), **shifted)) == pytest.approx(plain, rel=1e-5)


# --- multipliers ---


@pytest.mark.parametrize("form", ["bounded", "equality", "linear"])
def test_a_multiplier_falls_beyond_its_threshold_and_rises_below_it(form):
    sgd = {"u0": {"a": 0.2}, "rate": 0.1, "momentum": 0.0}
    assert weight(form, after(form, {"a": 1.0}, [{"a": 1.5}], **sgd)["a"]) < weight(form, 0.2)
    assert weight(form, after(form, {"a": 1.0}, [{"a": 0.5}], **sgd)["a"]) > weight(form, 0.2)
    assert after(form, {"a": 1.0}, [{"a": 1.0}] * 3, **sgd) == {"a": 0.2}


def test_the_multiplier_of_a_cost_by_hand():
    # log lambda: 0 + 0.5 * 1 * (0.6 - 0.2) = 0.2, then + 0.5 exp(0.2) ((0.6 + 0.1) / 2 - 0.2)
    means = [{"harm": 0.6}, {"harm": 0.1}]
    found = after("cost", {"harm": 0.2}, means, u0={"harm": 0.0}, rate=0.5, window=2)
    assert found["harm"] == pytest.approx(0.2 + 0.5 * math.exp(0.2) * 0.15)
    assert after("cost", {"harm": 0.2}, means, u0={"harm": 0.0}, rate=0.5)["harm"] == pytest.approx(
        0.2 - 0.5 * math.exp(0.2) * 0.1
    )
    assert math.isfinite(weight("cost", after("cost", {"harm": 0.0}, [{"harm": 1e6}] * 9, u0={"harm": 0.0}, rate=1.0)["harm"]))


def test_where_multipliers_begin_may_be_drawn():
    """Each by its own name, the same in every run; the spread is the one that was asked for."""
    names = [f"r{n}" for n in range(400)]
    drawn = Constrained(thresholds=dict.fromkeys(names, 0.0), u0=0.5, u0_std=0.1)
    begins = np.array([math.log(w / (1 - w)) for w in drawn._weights([], []).values()])
    assert begins.mean() == pytest.approx(0.5, abs=0.02)
    assert begins.std() == pytest.approx(0.1, abs=0.015)
    few = Constrained(thresholds=dict.fromkeys(names[3:5], 0.0), u0=0.5, u0_std=0.1)
    assert few._weights([], []) == {name: drawn._weights([], [])[name] for name in names[3:5]}
    other = Constrained(thresholds=dict.fromkeys(names, 0.0), u0=0.5, u0_std=0.1, u0_seed=1)
    assert not set(other._weights([], []).values()) & set(drawn._weights([], []).values())


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9])
def test_the_steps_are_those_of_torch(momentum):
    """Of several multipliers, with clipped gradients, over iterations with means on either side."""
    rng = np.random.default_rng(3)
    limits = {"a": 0.4, "b": -0.2}
    means = [dict(zip(limits, rng.normal(size=2) * 3, strict=True)) for _ in range(12)]
    u = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([u], lr=0.7, momentum=momentum)
    for mean in means:
        sgd.zero_grad()
        gap = torch.tensor([mean[n] - limits[n] for n in limits], dtype=torch.float64)
        (torch.sigmoid(u) * gap).sum().backward()
        torch.nn.utils.clip_grad_norm_([u], 0.5)
        sgd.step()
    ours = after("bounded", limits, means, u0=dict.fromkeys(limits, 0.3), rate=0.7, momentum=momentum, max_grad_norm=0.5)
    assert list(ours.values()) == pytest.approx(u.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("knobs", "field", "value"),
    [
        ({}, "multiplier_lr", 0.5),
        ({"multiplier_lr": 0.5}, "momentum", 0.8),
        ({"multiplier_lr": 0.5}, "max_grad_norm", 0.01),
        (COST | {"multiplier_lr": 0.5, "kl_coef": 0.0}, "window", 2),
    ],
)
def test_what_acts_from_the_second_iteration_on(knobs, field, value):
    past = [{"mean_harm": 2.0, "mean_score": 1.0}, {}, {"mean_harm": 0.1, "mean_score": 1.0}]
    base = {"thresholds": {"harm": 0.5}, "objective": "score"} | knobs
    three = group((1.0, 0.0, 3.0), (1, 1, 1), harm=(0.0, 3.0, 1.0))
    one, other = (advantages(Constrained(**base | more), three, past=past) for more in ({}, {field: value}))
    assert one != pytest.approx(other, rel=1e-6)
    assert one != pytest.approx(advantages(Constrained(**base), three), rel=1e-6), "in the first one"


def test_figures_say_the_weight_that_was_used_and_the_means_that_the_next_one_follows_from():
    algorithm = Constrained(**TWO, objective="score", multiplier_lr=0.5)
    items = trained(algorithm, [group((1.0, 0.0), harm=(0.0, 3.0))], old_logprobs=[[-1.0], [-1.0]])
    past = []
    for _ in range(3):
        past.append(algorithm.figures(items, json.loads(json.dumps(past))))
    assert [p["mean_harm"] for p in past] == [1.5] * 3
    assert past[0]["multiplier_harm"] == 0.5
    assert past[2]["multiplier_harm"] < past[1]["multiplier_harm"] < 0.5, "1.5 is beyond 0.25"
    assert past[2]["multiplier_score"] == 0.5, "0.5 is its threshold"


# --- what is refused, and what is said ---


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"base": "ppo"}, "has a critic"),
        ({"base": "dpo"}, "no loss on the policy's own responses"),
        ({"base": "p3o"}, "trains pairs"),
        ({"base": "rloo", "kl_coef": 0.1}, "pays the KL inside its reward"),
        ({"base": "reinforce_scalar", "clip_range_low": 0.1}, "does not take clip_range_low"),
        ({"form": "cost"}, "the objective is a reward"),
        ({"form": "cost", "objective": "score", "thresholds": {"score": 0.0}}, "the objective is a reward"),
        ({"form": "maxmin", "u0": 1.0}, "nothing would read u0"),
        ({"form": "cost", "objective": "score", "thresholds": {"harm": 0.1}, "momentum": 0.5}, "nothing would read momentum"),
        ({"window": 2}, "nothing would read window"),
        ({"form": "maxmin", "u0_std": 0.1}, "nothing would read u0_std"),
        ({"u0_seed": 1}, "u0_std is 0"),
        ({"form": "maxmin", "kl_clip": 1.0}, "nothing would read kl_clip"),
        ({"thresholds": {}}, "at least 1"),
        ({"thresholds": {"kl": 1.0}}, "thresholds has kl"),
        ({"thresholds": {"Harm": 1.0}}, "pattern"),
    ],
)
def test_what_does_not_go_together_is_refused(knobs, said):
    with pytest.raises(ValidationError, match=said):
        Constrained(**knobs)


def test_a_kl_to_the_policy_that_samples_is_no_objective():
    moving, fixed = (Plan(iterations=3, references=r) for r in ((0, 1, 2), (0, 0, 0)))
    assert Constrained().objection(fixed) is None
    assert Constrained(objective="score").objection(moving) is None
    assert Constrained().objection(moving).field == "reference.schedule"


def test_it_says_how_fast_multipliers_move():
    plan = Plan(iterations=3, references=(0, 0, 0))
    default, rate = Constrained().remarks(plan)
    assert "no value that was measured" in default
    assert "at first by 0.0025" in rate
    assert Constrained(**TWO, form="maxmin").remarks(plan) == []


def test_it_asks_for_the_scores_that_it_reads():
    assert Constrained().needs.components == ()
    assert Constrained(**TWO, objective="charm").needs.components == ("charm", "harm")
    with pytest.raises(ValueError, match="'harm', which the oracle did not give"):
        advantages(Constrained(**TWO), group())
