"""What every algorithm must hold to, whatever its loss. A new file in `algorithms/` is found here by its name."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from onlinerl import registry
from onlinerl.batch import Batch, Outputs
from onlinerl.ops.batching import collate, plan_step
from onlinerl.protocols import Algorithm
from onlinerl.types import Group, Judged, Pair, Prompt, Rollout, Sampling, TrainItem, TrainSequence, Verdict

# Configurations tried besides the defaults, or instead of them where a knob has no default.
VARIANTS = {
    "ppo": [{}, {"kl_in": "loss", "entropy_coef": 0.01, "dual_clip": 3.0, "value_clip": None}, {"kl": 0.0}],
    "grpo": [
        {"std_norm": "group", "agg": "seq_mean_token_mean"},
        {"std_norm": "batch", "agg": "token_mean", "kl": 0.04, "clip_high": 0.28, "sampler_cap": None},
        {"std_norm": "none", "agg": "token_mean"},
    ],
    "dpo": [{}, {"soft_labels": True, "label_smoothing": 0.1, "nll_coef": 0.5, "length_norm": True}],
    "sppo": [{}, {"train": "all"}],
    "dno": [{}, {"reward_scale": 5.0}],
    "dno_prct": [{}, {"margin": -1.0, "floor": -10.0}],
}


# Mean loss where policy, old policy, reference and engine agree; V = V_old.
def _ppo(items):
    tokens = {
        name: np.concatenate([getattr(i.sequences[0], name) for i in items]) for name in ("advantages", "returns", "values")
    }
    return -tokens["advantages"].mean() + 0.1 * 0.5 * np.mean((tokens["values"] - tokens["returns"]) ** 2)


AT_REFERENCE = {
    "ppo": _ppo,
    "grpo": lambda items: -np.mean([i.sequences[0].advantages[0] for i in items]),
    "dpo": lambda items: math.log(2),
    "dno": lambda items: math.log(2),
    "dno_prct": lambda items: math.log(2),
    "sppo": lambda items: np.mean([(1000 * (s.win_rate - 0.5)) ** 2 for i in items for s in i.sequences]),
}

NAMES = registry.names("algorithms")
CASES = [pytest.param(name, knobs, id=f"{name}-{n}") for name in NAMES for n, knobs in enumerate(VARIANTS.get(name, [{}]))]


def build(name: str, knobs: dict) -> Algorithm:
    return registry.load("algorithms", name, Algorithm)(**knobs)


def group(rng: np.random.Generator, number: int, kind: str, K: int = 4) -> Judged:
    """A group of K random responses of 1 to 6 tokens, judged by scores only or by a matrix only (one order, both, gaps)."""
    rollouts = tuple(
        Rollout(
            token_ids=(k, *rng.integers(10, 99, rng.integers(0, 6)).tolist()),
            logprobs=(),
            text="",
            finish_reason="length" if rng.random() < 0.2 else "stop",
            policy_version=1,
            sampler=Sampling(),
            seed=k,
        )
        for k in range(K)
    )
    rollouts = tuple(dataclasses.replace(r, logprobs=tuple(-rng.random(len(r.token_ids)) - 0.1)) for r in rollouts)
    if kind == "scores":
        verdict = Verdict(annotator="t", oracle_version="1", scores=tuple(rng.standard_normal(K).tolist()))
    else:
        matrix = rng.random((K, K))
        np.fill_diagonal(matrix, np.nan)
        matrix[0, 1] = np.nan  # asked in one order only
        verdict = Verdict(annotator="t", oracle_version="1", preferences=tuple(map(tuple, matrix.tolist())))
    prompt = Prompt(id=f"p{number}", text="", token_ids=tuple(rng.integers(1, 9, rng.integers(1, 5)).tolist()))
    return Judged(group=Group(prompt=prompt, rollouts=rollouts), verdict=verdict)


def pairs_of(judged: Judged) -> list[Pair]:
    probs, K = judged.verdict.matrix(), len(judged.group.rollouts)
    cells = [(i, j) for i in range(K) for j in range(K) if i != j and probs[i, j] > 0.5]
    return [Pair(chosen=i, rejected=j, prob=float(probs[i, j])) for i, j in cells]


def training_items(algorithm: Algorithm, kind: str = "scores", *, at_reference: bool = False) -> list[TrainItem]:
    """What reaches the learner: items, with what `needs` asks for filled in and nothing else, prepared."""
    rng = np.random.default_rng(5)
    needs = algorithm.needs()

    def fill(s: TrainSequence) -> TrainSequence:
        def draw() -> np.ndarray:
            near = s.behaviour if at_reference else s.behaviour + 0.3 * rng.standard_normal(len(s.response_ids))
            return near.astype(np.float32)

        return s.with_(
            old=draw() if needs.old else None,
            reference=draw() if needs.reference else None,
            values=rng.standard_normal(len(s.response_ids)).astype(np.float32) if needs.values else None,
        )

    judged = [group(rng, number, kind) for number in range(5)]
    items = [item for j in judged for item in algorithm.items(j, pairs_of(j) if needs.pairs else [])]
    items = [dataclasses.replace(item, sequences=tuple(fill(s) for s in item.sequences)) for item in items]
    return algorithm.prepare(items)


class Policy:
    """Log-probs, values and entropies of every sequence as fp64 leaves, so that gradients can be compared sequence by sequence."""

    def __init__(self, items: list[TrainItem], *, at_reference: bool = False) -> None:
        rng = np.random.default_rng(9)
        self.sequences = [s for item in items for s in item.sequences]
        # Weights are kept per occurrence, since one response may be part of several pairs.
        self.index = {id(s): n for n, s in enumerate(self.sequences)}
        self.leaves = []
        for s in self.sequences:
            T = len(s.response_ids)
            logprobs = s.behaviour if at_reference else s.behaviour + 0.3 * rng.standard_normal(T)
            values = np.zeros(T) if s.values is None else s.values + (0.0 if at_reference else 0.3 * rng.standard_normal(T))
            self.leaves += [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (logprobs, values, rng.random(T))]

    def outputs(self, rows: list[TrainSequence], batch: Batch, junk: float = math.nan) -> Outputs:
        """The outputs for a batch whose rows are these sequences; `junk` is what padding holds."""
        width = batch.mask_BT.shape[1]
        columns = []
        for part in range(3):
            leaves = [self.leaves[3 * self.index[id(s)] + part] for s in rows] or [torch.zeros(0, dtype=torch.float64)]
            columns.append(torch.stack([pad(x, (0, width - len(x)), value=junk) for x in leaves]))
        return Outputs(logprobs_BT=columns[0], values_BT=columns[1], entropy_BT=columns[2])

    def gradient(self, algorithm: Algorithm, micros: list[list[TrainItem]], *, extra: int = 0, junk: float = math.nan):
        """(mean loss, gradient of every leaf, metrics) of an optimizer step made of these micro-batches."""
        total, metrics, units = torch.zeros((), dtype=torch.float64), {}, 0
        for micro in micros:
            batch = widen(collate(micro), extra)
            out = algorithm.loss(self.outputs([s for item in micro for s in item.sequences], batch, junk), batch)
            total = total + out.total
            units += sum(item.count(algorithm.unit) for item in micro)
            for name, mean in out.metrics.items():
                a, b = metrics.get(name, (0.0, 0.0))
                metrics[name] = (a + float(mean.total), b + float(mean.count))
        gradients = torch.autograd.grad(total / units, self.leaves, allow_unused=True)
        flat = torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(gradients, self.leaves, strict=True)])
        return (total / units).item(), flat, metrics


def widen(batch: Batch, extra: int) -> Batch:
    """The same batch with `extra` more padded positions per row."""
    changes = {
        f.name: pad(value, (0, extra))
        for f in dataclasses.fields(batch)
        if f.name.endswith(("_BT", "_BS")) and (value := getattr(batch, f.name)) is not None
    }
    return dataclasses.replace(batch, **changes)


def assert_same(one, other) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-8, abs=1e-10)
    assert torch.allclose(one[1], other[1], rtol=1e-8, atol=1e-8)
    assert one[2].keys() == other[2].keys()
    for name, (total, count) in one[2].items():
        assert (total, count) == (pytest.approx(other[2][name][0], rel=1e-4, abs=1e-4), other[2][name][1]), name


@pytest.mark.parametrize("name", NAMES)
def test_has_a_value_at_the_reference(name):
    assert name in AT_REFERENCE, f"add the value of {name} at pi = ref to AT_REFERENCE"


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("kind", ["scores", "preferences"])
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
    out = algorithm.loss(Outputs(logprobs_BT=logprobs, values_BT=values, entropy_BT=torch.ones(1, 1)), batch)
    assert out.total.item() == 0
    out.total.backward()  # every rank must reach the backward pass
    assert logprobs.grad.tolist() == [[0.0]]
    items = training_items(algorithm)
    rows = [s for item in items for s in item.sequences]
    filled = collate(items)
    assert out.metrics.keys() == algorithm.loss(Policy(items).outputs(rows, filled), filled).metrics.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["scores", "preferences"])
def test_value_where_policy_and_reference_agree(name, kind):
    algorithm = build(name, VARIANTS.get(name, [{}])[0])
    items = training_items(algorithm, kind, at_reference=True)
    loss, _, _ = Policy(items, at_reference=True).gradient(algorithm, [items])
    assert loss == pytest.approx(AT_REFERENCE[name](items), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_weight_zero_gives_no_gradient(name, knobs):
    algorithm = build(name, knobs)
    items = [dataclasses.replace(item, weight=0.0) for item in training_items(algorithm)]
    assert Policy(items).gradient(algorithm, [items])[1].abs().max() == 0


def prepare_and_train(algorithm: Algorithm, items: list[TrainItem]) -> None:
    prepared = algorithm.prepare(items)
    Policy(prepared).gradient(algorithm, [prepared])


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_declares_what_it_reads(name, knobs):
    """`training_items` fills in exactly `needs`; without any one of those fields the algorithm must refuse, not go on."""
    algorithm = build(name, knobs)
    needs = algorithm.needs()
    assert algorithm.unit in ("token", "sequence", "pair")
    assert (
        algorithm.default_reference == "none" if not needs.reference else algorithm.default_reference in ("fixed", "previous")
    )
    for field in [f for f in ("reference", "old", "values") if getattr(needs, f)]:
        items = training_items(algorithm)
        stripped = [
            dataclasses.replace(item, sequences=tuple(s.with_(**{field: None}) for s in item.sequences)) for item in items
        ]
        with pytest.raises(ValueError, match=field):
            prepare_and_train(algorithm, stripped)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_is_frozen_and_survives_its_own_dump(name, knobs):
    algorithm = build(name, knobs)
    assert type(algorithm).model_validate_json(algorithm.model_dump_json()) == algorithm
    with pytest.raises(ValueError, match="frozen"):
        setattr(algorithm, next(iter(type(algorithm).model_fields)), 0)
    with pytest.raises(ValueError, match="no_such_knob"):
        build(name, {**knobs, "no_such_knob": 1})
