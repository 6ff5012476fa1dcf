"""Items, the log-probs that the loss needs, optimizer steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onlinerl.controller import health
from onlinerl.controller.iteration import Iteration, judged
from onlinerl.controller.parts import learning_rates
from onlinerl.errors import LearnerError
from onlinerl.ops.schedule import schedule
from onlinerl.stores.rows import PAIRS, VERDICTS, pair_rows, result_from_row
from onlinerl.types import Judged, Pair, TrainItem, derive_seed

SELF_TEST_ITEMS = 4


def train(it: Iteration) -> dict[str, Any]:
    """Items, log-probs that the loss needs, optimizer steps."""
    config, learner, tracker = it.parts.config, it.parts.learner, it.parts.tracker
    groups = it.groups()
    results = dict(result_from_row(row) for row in it.parts.store.read(it.number, VERDICTS))
    it.parts.engine.rest()
    it.weights.engine = None
    built_at = time.monotonic()
    items, dropped, useful = _items(it, judged(groups, results))
    reference_at = time.monotonic()
    tracker.phase_started(it.number, "reference", None, "")
    items = _annotate(it, items)
    prepared = it.parts.algorithm.prepare(items)
    if it.number == 1:
        _self_test(it, prepared)
    tracker.phase_finished(it.number, "reference", time.monotonic() - reference_at)
    train_at = time.monotonic()
    if config.training.optimizer_state == "reset" and it.number > 1:
        learner.reset_optimizer()
    indices = schedule(
        len(prepared),
        config.training.items_per_step,
        config.training.epochs,
        derive_seed(config.seed, "steps", it.number),
    )
    rates = learning_rates(config, it.number, len(indices))
    tracker.phase_started(it.number, "train", sum(len(s) for s in indices), "items")
    steps: list[Mapping[str, float]] = []
    tokens = skipped = 0
    for chosen, report in zip(indices, learner.update([[prepared[i] for i in step] for step in indices], rates), strict=True):
        tracker.phase_advanced(it.number, "train", len(chosen))
        tokens += report.tokens
        skipped += report.skipped
        steps.extend(report.metrics)
        if skipped > config.training.max_skipped_steps:
            raise LearnerError(
                f"{skipped} optimizer steps had a non-finite loss or gradient",
                field="training.learning_rate",
                fix="start a new run from the last export (model=...) with a lower learning rate; a resume would repeat this",
            )
    it.weights.learner = it.number
    it.report.trained(it.number, steps, tokens, dropped, len(items), useful, len(groups))
    return {
        "steps": len(steps),
        "tokens": tokens,
        "skipped": skipped,
        "items": len(items),
        "dropped": dict(dropped),
        "loss_first": steps[0].get("loss"),
        "loss_last": steps[-1].get("loss"),
        "reference": it.reference(),
        "build_seconds": reference_at - built_at,
        "ref_logprob_seconds": train_at - reference_at,
    }


def _items(it: Iteration, told: Sequence[Judged]) -> tuple[list[TrainItem], Counter[str], int]:
    """What is trained, what was left out and why, and how many groups gave anything."""
    config, algorithm = it.parts.config, it.parts.algorithm
    dropped: Counter[str] = Counter()
    useful = 0
    items: list[TrainItem] = []
    rows: list[dict[str, Any]] = []
    for one in told:
        pairs: Sequence[Pair] = []
        if algorithm.needs().pairs:
            pairs, reasons = it.parts.pairing.build(one)
            dropped.update(reasons)
            rows.extend(pair_rows(one.group, pairs))
        built = algorithm.items(one, pairs)
        if config.training.on_truncated == "drop":
            kept = [i for i in built if all(s.finish_reason != "length" for s in i.sequences)]
            dropped["truncated"] += len(built) - len(kept)
            built = kept
        items.extend(built)
        useful += bool(built)
    health.check_items(len(items), len(told), dropped)
    if rows and not it.parts.store.read(it.number, PAIRS):
        it.parts.store.append(it.number, PAIRS, rows)
        it.parts.store.seal(it.number, PAIRS)
    return items, dropped, useful


def _annotate(it: Iteration, items: Sequence[TrainItem]) -> list[TrainItem]:
    """Fill in the log-probs and values that the algorithm asked for; each is computed once per iteration."""
    needs, learner = it.parts.algorithm.needs(), it.parts.learner
    flat = [s for item in items for s in item.sequences]
    temperature = it.parts.config.sampling.temperature if it.parts.algorithm.policy_gradient else 1.0
    extra: dict[str, list[Any]] = {}
    reference = it.reference()
    model = None if reference is None else it.model_of(reference)
    if needs.old or model == "policy":
        extra["old"] = learner.score(flat, model="policy", temperature=temperature)
    if model is not None:
        same = model == "policy"
        extra["reference"] = extra["old"] if same else learner.score(flat, model=model, temperature=temperature)
    if needs.values:
        extra["values"] = learner.values(flat)
    filled = iter([s.with_(**{k: v[i] for k, v in extra.items()}) for i, s in enumerate(flat)])
    return [replace(item, sequences=tuple(next(filled) for _ in item.sequences)) for item in items]


def _self_test(it: Iteration, items: Sequence[TrainItem]) -> None:
    """Before the very first step (R-E5)."""
    result = it.parts.learner.self_test(items[:SELF_TEST_ITEMS], it.parts.base_model)
    expected = it.parts.algorithm.loss_at_reference
    # bfloat16 keeps three digits; the reference is read from disk and must agree to that.
    health.check_self_test(result, expected, loss_tolerance=1e-3, gap_limit=0.02)
    it.report.self_test(result)
