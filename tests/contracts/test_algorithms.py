"""What every algorithm must hold to, whatever its loss. A new file in `algorithms/` is found here by its name."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from algorithm_cases import (
    Constants,
    Policy,
    annotated_items,
    build,
    golden,
    holds_constants,
    pairs_of,
    refereed,
    selected,
    sources,
    trained,
    training_items,
    variants,
)

from onlinerl import registry
from onlinerl.batch import Outputs
from onlinerl.errors import LearnerError
from onlinerl.learners import _whole_step
from onlinerl.loss import LossOutput, Mean
from onlinerl.metrics.catalogue import CATALOGUE, PAIRS, POLICY_GRADIENT
from onlinerl.ops import whole_step
from onlinerl.ops.batching import collate, plan_step
from onlinerl.ops.pair_modifiers import weighed
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Pair, TrainItem, Verdict

KINDS = ("scores", "preferences", "oracle")
NAMES = registry.names("algorithms")
CASES = [pytest.param(name, knobs, id=f"{name}-{n}") for name in NAMES for n, knobs in enumerate(variants(name))]


def assert_same(one, other) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-8, abs=1e-10)
    assert torch.allclose(one[1], other[1], rtol=1e-8, atol=1e-8)
    assert one[2].keys() == other[2].keys()
    for name, (total, count) in one[2].items():
        assert (total, count) == (pytest.approx(other[2][name][0], rel=1e-4, abs=1e-4), other[2][name][1]), name


@pytest.mark.parametrize("name", NAMES)
def test_has_a_golden_value(name):
    """An algorithm without values that somebody worked out by hand is not proven, whatever else holds."""
    test = golden(name)
    assert test.VARIANTS
    assert callable(test.test_value_by_hand)
    assert callable(test.at_reference)


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_every_kind_of_verdict(name, knobs, kind):
    algorithm = build(name, knobs)
    items = training_items(algorithm, kind)
    assert items
    loss, gradient, metrics = Policy(items).gradient(algorithm, [items])
    assert math.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    assert metrics
    for label, (total, count) in metrics.items():
        assert math.isfinite(total), label
        assert count >= 0, label
    assert any(count > 0 for _, count in metrics.values())


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("place", range(4))
def test_a_response_that_nobody_judged_is_as_if_it_had_not_been_sampled(name, knobs, place):
    """It is not worth 0.5, beats nobody, is nobody's baseline and nobody's pair; and it is counted."""
    algorithm = build(name, knobs)
    texts = ["aaa b", "b", "ba"]
    without = refereed(texts, sources(algorithm), algorithm.needs)
    texts.insert(place, "dull")
    judged = refereed(texts, sources(algorithm), algorithm.needs)
    clean = pairs_of(without)
    # The pairs of the judged ones by their places now, and one with the unjudged response that no builder should have made.
    moved = [
        dataclasses.replace(p, chosen=p.chosen + (p.chosen >= place), rejected=p.rejected + (p.rejected >= place))
        for p in clean
    ]
    planted = [*moved, Pair(chosen=place, rejected=(place + 1) % 4, prob=0.9)]
    needs_pairs = algorithm.needs.pairs
    expected, _ = trained(algorithm, without, clean if needs_pairs else [])
    got, dropped = trained(algorithm, judged, planted if needs_pairs else [])
    assert expected
    assert got == expected
    assert dropped["unjudged"] == 1


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_a_group_with_too_few_judged_responses_gives_nothing_and_is_counted(name, knobs):
    algorithm = build(name, knobs)
    judged = refereed(["dull", "a", "dull 2", "dull 3"], needs=algorithm.needs)  # the second was compared with nobody
    items, dropped = algorithm.items(judged, [Pair(chosen=1, rejected=0, prob=0.9)] if algorithm.needs.pairs else [])
    assert items == []
    assert dropped == {"unjudged": 1 if algorithm.needs.pairs else 4}
    scored = dataclasses.replace(
        judged, verdict=Verdict(annotator="t", oracle_version="1", scores=(math.nan, 1.0, math.nan, math.nan))
    )
    items, dropped = algorithm.items(scored, [])
    if algorithm.needs.min_samples > 1:
        assert items == []
        assert dropped == ({} if algorithm.needs.pairs else {"unjudged": 3, "single": 1})


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_the_gradient_does_not_depend_on_micro_batches_ranks_order_or_padding(name, knobs):
    algorithm = build(name, knobs)
    items = training_items(algorithm)
    policy = Policy(items)
    whole = policy.gradient(algorithm, [items])
    assert_same(policy.gradient(algorithm, [[item] for item in items]), whole)
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    assert_same(policy.gradient(algorithm, [shuffled]), whole)
    assert_same(policy.gradient(algorithm, [items], extra=3), whole)
    for ranks, budget in ((2, 40), (3, 1), (len(items) + 2, 1000)):  # the last one leaves ranks with dummies only
        plan = plan_step(items, ranks, budget)
        assert_same(policy.gradient(algorithm, [micro for micros in plan for micro in micros]), whole)


@pytest.mark.parametrize("kind", ["certainty", "score_gap", "per_prompt"])
@pytest.mark.parametrize("name", [name for name in NAMES if build(name, {}).weighable])
def test_weights_have_mean_1_whatever_micro_batches_and_ranks_they_are_cut_into(name, kind):
    """`training.sample_weights`: of the whole iteration, so every item has its own before anything is cut."""
    algorithm = build(name, {})
    plain = training_items(algorithm)
    if kind == "per_prompt":
        plain = plain[1:]  # else all prompts are alike
    items = list(weighed(plain, kind, None, algorithm.unit))
    counts = [item.count(algorithm.unit) for item in items]
    assert np.average([item.weight / before.weight for item, before in zip(items, plain, strict=True)], weights=counts) == (
        pytest.approx(1.0)
    )
    policy = Policy(items)
    whole = policy.gradient(algorithm, [items])
    assert_same(policy.gradient(algorithm, [[item] for item in items]), whole)
    for ranks, budget in ((2, 40), (3, 1), (len(items) + 2, 1000)):
        plan = plan_step(items, ranks, budget)
        assert_same(policy.gradient(algorithm, [micro for micros in plan for micro in micros]), whole)
    doubled = [dataclasses.replace(item, weight=2 * item.weight) for item in items]
    assert torch.allclose(policy.gradient(algorithm, [doubled])[1], 2 * whole[1], rtol=1e-5, atol=1e-7)


def holding(name: str) -> list[Algorithm]:
    """Its variants that hold something constant, as its golden test says."""
    return [algorithm for algorithm in (build(name, knobs) for knobs in variants(name)) if holds_constants(name, algorithm)]


HOLDING = [name for name in NAMES if holding(name)]


def slopes(algorithm: Algorithm, *, held: bool) -> tuple[float, float]:
    """Of the loss in a random direction: by its values, in central differences, and by its gradient. `held`: with what it holds constant
    kept where it was."""
    items = training_items(algorithm)
    policy, constants = Policy(items), Constants()

    def at(point: Policy) -> tuple[float, torch.Tensor]:
        with constants.held() if held else nullcontext():
            return point.gradient(algorithm, [items])[:2]

    _, gradient = at(policy)
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(len(gradient)))
    ahead, behind = (at(policy.moved(step * direction))[0] for step in (1e-5, -1e-5))
    return (ahead - behind) / 2e-5, (gradient @ direction).item()


def check_slope(algorithm: Algorithm, *, held: bool) -> None:
    by_values, by_gradient = slopes(algorithm, held=held)
    assert by_values == pytest.approx(by_gradient, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_the_gradient_is_the_slope_of_the_loss(name, knobs):
    """By finite differences in fp64, in a random direction, of every algorithm.

    Where a formula stops a gradient on purpose, which its golden test says (`stops_gradients`), values are taken with those terms held at
    the point itself. This sees every wrong gradient of what is not held. That such a formula holds the right terms it cannot see: if it
    detaches one more, values do not move with that either. The slopes in its golden test, worked out by hand, show it. A loss that
    does not say it stops a gradient may detach nothing that its value depends on.
    """
    algorithm = build(name, knobs)
    check_slope(algorithm, held=holds_constants(name, algorithm))


@pytest.mark.parametrize("name", HOLDING)
def test_what_is_said_to_stop_a_gradient_does(name):
    """Else its slope would be checked less strictly than it could be, for nothing."""
    found = [slopes(algorithm, held=False) for algorithm in holding(name)]
    assert any(by_values != pytest.approx(by_gradient, rel=1e-5, abs=1e-7) for by_values, by_gradient in found)
    assert golden(name).stops_gradients.__doc__, "name what is held; the table in docs/algorithms.md says it"


class Steeper(registry.load("algorithms", "dpo", Algorithm)):
    """The right value, and twice its gradient."""

    def loss(self, outputs, batch):
        out = super().loss(outputs, batch)
        return dataclasses.replace(out, total=2 * out.total - out.total.detach())


@pytest.mark.parametrize("name", HOLDING)
def test_a_wrong_gradient_would_be_noticed_although_something_is_held(name, monkeypatch):
    """The fault of a backward pass that is wrong by a factor: with and without constants."""
    algorithm = holding(name)[0]
    plain = type(algorithm).loss

    def steeper(self, outputs, batch):
        out = plain(self, outputs, batch)
        out.total.register_hook(lambda slope: 1.01 * slope)
        return out

    monkeypatch.setattr(type(algorithm), "loss", steeper)
    with pytest.raises(AssertionError):
        check_slope(algorithm, held=True)


def test_a_constant_that_nobody_said_would_be_noticed():
    with pytest.raises(AssertionError):
        check_slope(Steeper(), held=False)


def test_what_the_whole_step_makes_of_its_rows_is_part_of_the_slope(monkeypatch):
    """The fault of slopes that are wrong by a factor, where two passes carry numbers in between."""
    plain = whole_step.differentiated

    def wrong(algorithm, rows):
        loss, slopes_N = plain(algorithm, rows)
        return loss, 1.01 * slopes_N

    monkeypatch.setattr(_whole_step, "differentiated", wrong)
    for name in ("kto", "bco", "re_po", "aot"):
        algorithm = build(name, {})
        with pytest.raises(AssertionError):
            check_slope(algorithm, held=holds_constants(name, algorithm))


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_masked_positions_are_not_read(name, knobs):
    algorithm = build(name, knobs)
    items = training_items(algorithm)
    policy = Policy(items)
    clean = policy.gradient(algorithm, [items], extra=2, junk=0.0)
    for junk in (123.0, math.inf, math.nan):
        dirty = policy.gradient(algorithm, [items], extra=2, junk=junk)
        assert dirty[0] == clean[0]
        assert torch.equal(dirty[1], clean[1])
        assert dirty[2] == clean[2]


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_a_rank_without_data_contributes_zero_through_the_graph(name, knobs):
    algorithm = build(name, knobs)
    batch = collate([])
    logprobs = torch.full((1, 1), -1.0, requires_grad=True)
    values = torch.full((1, 1), 0.5, requires_grad=True)
    others = dict.fromkeys(("entropy_BT", "collision_BT", "reference_kl_BT"), torch.ones(1, 1))
    out = algorithm.loss(Outputs(logprobs_BT=logprobs, values_BT=values, **others), batch)
    assert out.total.item() == 0
    out.total.backward()  # every rank must reach the backward pass
    assert logprobs.grad.tolist() == [[0.0]]
    items = training_items(algorithm)
    rows = [s for item in items for s in item.sequences]
    filled = collate(items)
    assert out.metrics.keys() == algorithm.loss(Policy(items).outputs(rows, filled), filled).metrics.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_where_policy_and_reference_agree(name, kind):
    algorithm = build(name, golden(name).VARIANTS[0])
    items = training_items(algorithm, kind, at_reference=True)
    loss, _, _ = Policy(items, at_reference=True).gradient(algorithm, [items])
    assert loss == pytest.approx(golden(name).at_reference(items), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_weight_zero_gives_no_gradient(name, knobs):
    algorithm = build(name, knobs)
    items = [dataclasses.replace(item, weight=0.0) for item in training_items(algorithm)]
    assert Policy(items).gradient(algorithm, [items])[1].abs().max() == 0


def prepare_and_train(algorithm: Algorithm, items: list[TrainItem]) -> None:
    prepared = list(algorithm.prepare(selected(algorithm, items)))
    Policy(prepared).gradient(algorithm, [prepared])


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_declares_what_it_reads(name, knobs):
    """`training_items` fills in exactly `needs`; without any one of those fields the algorithm must refuse, not go on."""
    algorithm = build(name, knobs)
    needs = algorithm.needs
    assert algorithm.unit in ("token", "sequence", "pair", "list")
    assert algorithm.reference == "none" if not needs.reference else algorithm.reference in ("fixed", "previous")
    read = {
        "reference_logprobs": needs.reference_logprobs,
        "anchor_logprobs": needs.anchor,
        "old_logprobs": needs.old_logprobs,
        "values": needs.values,
        "ches": needs.ches,
    }
    for field in [f for f, needed in read.items() if needed]:
        items = annotated_items(algorithm)
        stripped = [
            dataclasses.replace(item, sequences=tuple(s.with_(**{field: None}) for s in item.sequences)) for item in items
        ]
        with pytest.raises((ValueError, LearnerError), match=field):  # the latter from the first pass over a whole step
            prepare_and_train(algorithm, stripped)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_refuses_outputs_that_lack_what_it_declares(name, knobs):
    """What nobody declared is not there in any of these tests, so what is read must be declared, too."""
    algorithm = build(name, knobs)
    items = training_items(algorithm)
    rows, batch = [s for item in items for s in item.sequences], collate(items)
    for need in ("collision", "reference_kl"):
        if getattr(algorithm.needs, need):
            outputs = dataclasses.replace(Policy(items).outputs(rows, batch), **{f"{need}_BT": None})
            with pytest.raises(ValueError, match=f"outputs.{need}_BT"):
                algorithm.loss(outputs, batch)


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_remembers_survives_the_run_directory(name, knobs, kind):
    """Figures are finite, and an iteration prepared from what was stored is the one prepared from what was in memory."""
    algorithm = build(name, knobs)
    items, past = annotated_items(algorithm, kind), []
    for _ in range(3):
        past.append(dict(algorithm.figures(items, past)))
    assert all(math.isfinite(value) for figures in past for value in figures.values())
    stored = json.loads(json.dumps([*past, {}], allow_nan=False))  # the last iteration had nothing to train on
    for one, other in zip(algorithm.prepare(items, past), algorithm.prepare(items, stored), strict=True):
        for a, b in zip(one.sequences, other.sequences, strict=True):
            assert repr(a) == repr(b)


def reported(algorithm: Algorithm) -> dict[str, str]:
    """Names of the metrics that it reports -> who reports them, its loss or its `figures`."""
    items = training_items(algorithm)
    from_loss = Policy(items).gradient(algorithm, [items])[2]
    return dict.fromkeys(from_loss, "step") | dict.fromkeys(algorithm.figures(annotated_items(algorithm)), "iteration")


def undeclared(algorithm: Algorithm) -> set[str]:
    """Metrics that it reports and that neither the catalogue nor its own `metrics` have."""
    catalogue = CATALOGUE.including(algorithm.metrics, type(algorithm).__name__)
    declared = {d.name: d.origin for d in catalogue}
    return {name for name, origin in reported(algorithm).items() if declared.get(name) != origin}


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_reports_only_metrics_that_are_described(name, knobs):
    assert undeclared(build(name, knobs)) == set(), "declare them in `metrics`"


@pytest.mark.parametrize("name", NAMES)
def test_reports_every_metric_that_it_declares(name):
    algorithms = [build(name, knobs) for knobs in variants(name)]
    assert {d.name for d in algorithms[0].metrics} <= set().union(*map(reported, algorithms))


def test_every_metric_that_families_share_is_reported_by_some_algorithm():
    algorithms = [build(name, knobs) for name in NAMES for knobs in variants(name)]
    assert {d.name for d in (*PAIRS, *POLICY_GRADIENT)} <= set().union(*map(reported, algorithms))


def test_a_metric_that_is_not_described_is_noticed():
    class Talkative(registry.load("algorithms", "dpo", Algorithm)):
        def loss(self, outputs, batch):
            out = super().loss(outputs, batch)
            more = {"surprise": Mean.of(batch.prob_P), "length": Mean.of(batch.prob_P)}
            return LossOutput(total=out.total, metrics=out.metrics | more)

        def figures(self, items, past=()):
            return {"mood": 1.0, "margin": 1.0}

    assert undeclared(Talkative()) == {"surprise", "length", "mood", "margin"}


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_is_frozen_and_survives_its_own_dump(name, knobs):
    algorithm = build(name, knobs)
    assert type(algorithm).model_validate_json(algorithm.model_dump_json()) == algorithm
    with pytest.raises(ValueError, match="frozen"):
        setattr(algorithm, next(iter(type(algorithm).model_fields)), 0)
    with pytest.raises(ValueError, match="no_such_knob"):
        build(name, {**knobs, "no_such_knob": 1})
