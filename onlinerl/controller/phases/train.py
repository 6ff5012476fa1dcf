"""Items, the log-probs that the loss needs, optimizer steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onlinerl.controller import health, self_test
from onlinerl.controller.iteration import Iteration, judged
from onlinerl.controller.parts import Built, learning_rates
from onlinerl.errors import LearnerError
from onlinerl.ops.schedule import schedule
from onlinerl.stores.rows import PAIRS, VERDICTS, pair_rows, result_from_row
from onlinerl.types import Pair, TrainItem, UpdateReport, derive_seed


def train(it: Iteration) -> dict[str, Any]:
    """One pass of the learner over what was judged; no step at all where that gives nothing to learn."""
    it.weights.engine = None
    built_at = time.monotonic()
    built = _items(it)
    algorithm = it.parts.algorithm
    earned = [algorithm.score(sequence) for item in built.items for sequence in item.sequences]
    idle = health.nothing_to_learn(built.judged, earned, built.dropped, within_groups=algorithm.needs().min_samples > 1)
    in_a_row = it.idle_before() + 1 if idle else 0
    annotated_at = trained_at = time.monotonic()
    steps = UpdateReport(steps=0, tokens=0, metrics=())
    figures: Mapping[str, float] = {}
    if idle is None:
        prepared, figures = _prepare(it, built.items)
        trained_at = time.monotonic()
        steps = _update(it, prepared)
    it.weights.learner = it.number
    it.report.trained(it.number, steps, built, idle, in_a_row, figures)
    return {
        "steps": steps.steps,
        "tokens": steps.tokens,
        "skipped": steps.skipped,
        "items": len(built.items),
        "truncated": built.truncated,
        "dropped": dict(built.dropped),
        "contradicted": built.contradicted,
        "figures": dict(figures),
        "idle": idle,
        "idle_in_a_row": in_a_row,
        "loss_first": steps.metrics[0].get("loss") if steps.metrics else None,
        "loss_last": steps.metrics[-1].get("loss") if steps.metrics else None,
        "reference": it.reference(),
        "build_seconds": annotated_at - built_at,
        "ref_logprob_seconds": trained_at - annotated_at,
    }


def _items(it: Iteration) -> Built:
    """What is trained, in the order of the prompts, and what was left out and why."""
    config, algorithm = it.parts.config, it.parts.algorithm
    everything = it.groups()
    groups = it.large_enough(everything)
    told = judged(groups, dict(result_from_row(row) for row in it.parts.store.read(it.number, VERDICTS)))
    dropped = Counter({"few_samples": len(everything) - len(groups), "not_judged": len(groups) - len(told)})
    drop = config.training.on_truncated == "drop"
    truncated = useful = contradicted = 0
    items: list[TrainItem] = []
    rows: list[dict[str, Any]] = []
    for one in told:
        pairs: Sequence[Pair] = []
        if algorithm.needs().pairs:
            pairs, reasons = it.parts.pairing.build(one)
            dropped.update(reasons)
            contradicted += sum(pair.prob < 0.5 for pair in pairs)
        built, left_out = algorithm.items(one, pairs)
        dropped.update(left_out)
        whole = [i for i in built if all(s.finish_reason != "length" for s in i.sequences)]
        truncated += len(built) - len(whole)
        if drop:
            dropped["truncated"] += len(built) - len(whole)
            built = whole
            pairs = [p for p in pairs if "length" not in {one.group.rollouts[i].finish_reason for i in (p.chosen, p.rejected)}]
        rows.extend(pair_rows(one.group, pairs))
        items.extend(built)
        useful += bool(built)
    if rows and not it.parts.store.sealed(it.number, PAIRS):
        it.parts.store.write(it.number, PAIRS, rows)
    return Built(
        items=items,
        judged=told,
        dropped=+dropped,
        contradicted=contradicted,
        truncated=truncated,
        useful=useful,
        groups=len(everything),
    )


def _prepare(it: Iteration, items: Sequence[TrainItem]) -> tuple[list[TrainItem], Mapping[str, float]]:
    """The items as the loss needs them, and what the algorithm says about them.

    Before the very first step of a run they must pass the self-test.
    """
    started = time.monotonic()
    it.parts.tracker.phase_started(it.number, "reference", None, "")
    annotated, past = _annotate(it, items), _past_figures(it)
    prepared = it.parts.algorithm.prepare(annotated, past)
    figures = it.parts.algorithm.figures(annotated, past)
    if not it.trained_before():
        _self_test(it, prepared)
    it.parts.tracker.phase_finished(it.number, "reference", time.monotonic() - started)
    return prepared, figures


def _past_figures(it: Iteration) -> list[Mapping[str, float]]:
    """What the algorithm said about each earlier iteration: from disk, so that a resume knows exactly what the run knew."""
    return [it.parts.store.phases(t).get("train", {}).get("figures", {}) for t in range(1, it.number)]


def _update(it: Iteration, items: Sequence[TrainItem]) -> UpdateReport:
    """Optimizer steps over the items.

    Raises:
        LearnerError: after too many steps whose gradient was not finite.
    """
    training, learner = it.parts.config.training, it.parts.learner
    if training.optimizer_state == "reset" and it.trained_before():
        learner.reset_optimizer()
    seed = derive_seed(it.parts.config.seed, "steps", it.number)
    indices = schedule(len(items), training.items_per_step, training.epochs, seed)
    rates = learning_rates(it.parts.config, it.number, len(indices))
    it.parts.tracker.phase_started(it.number, "train", sum(len(s) for s in indices), "items")
    metrics: list[Mapping[str, float]] = []
    tokens = skipped = 0
    for chosen, report in zip(indices, learner.update([[items[i] for i in step] for step in indices], rates), strict=True):
        it.parts.tracker.phase_advanced(it.number, "train", len(chosen))
        tokens += report.tokens
        skipped += report.skipped
        metrics.extend(report.metrics)
        if report.skipped:
            it.report.skipped(it.number, skipped)
        if skipped > training.max_skipped_steps:
            raise LearnerError(
                f"{skipped} optimizer steps had a non-finite loss or gradient",
                field="training.learning_rate",
                fix="start a new run from the last export (model=...) with a lower learning rate; a resume would repeat this",
            )
    return UpdateReport(steps=len(metrics), tokens=tokens, metrics=metrics, skipped=skipped)


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
    result = it.parts.learner.self_test(self_test.choose(items), it.parts.base_model)
    self_test.check(result, it.parts.algorithm.loss_at_reference, it.parts.config.learner.dtype)
    it.report.self_test(result)
