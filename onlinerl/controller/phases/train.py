"""Items with the log-probs that the loss needs, and optimizer steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onlinerl.controller import health, items, self_test
from onlinerl.controller.iteration import Iteration, judged
from onlinerl.controller.parts import Built, learning_rates
from onlinerl.errors import LearnerError, StoreError
from onlinerl.ops.schedule import schedule
from onlinerl.stores.rows import LOGPROBS, PAIRS, logprobs_from_row, pair_rows
from onlinerl.types import TrainItem, UpdateReport, derive_seed


def train(it: Iteration) -> dict[str, Any]:
    """One pass of the learner over what was judged; no step at all where that gives nothing to learn."""
    built = _items(it)
    algorithm = it.parts.algorithm
    earned = [algorithm.score(sequence) for item in built.items for sequence in item.sequences]
    idle = health.nothing_to_learn(built.judged, earned, built.dropped, within_groups=algorithm.needs.min_samples > 1)
    in_a_row = it.idle_before() + 1 if idle else 0
    steps = UpdateReport(steps=0, tokens=0, metrics=())
    figures: Mapping[str, float] = {}
    if idle is None:
        prepared, figures = _prepare(it, built.items)
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
        "policy_version": it.number - 1,
        "sampled_by": sorted({s.policy_version for item in built.items for s in item.sequences}),
    }


def _items(it: Iteration) -> Built:
    """What is trained, in the order of the prompts, and what was left out and why."""
    everything = it.groups()
    groups = [group for group in everything if it.large_enough(group)]
    told = judged(groups, it.results())
    logprobs = dict(logprobs_from_row(row) for row in it.parts.store.read(it.number, LOGPROBS))
    dropped = Counter({"few_samples": len(everything) - len(groups), "not_judged": len(groups) - len(told)})
    truncated = useful = contradicted = 0
    annotated: list[TrainItem] = []
    rows: list[dict[str, Any]] = []
    for one in told:
        made = items.of_group(it, one)
        dropped.update(made.dropped)
        contradicted += made.contradicted
        truncated += made.truncated
        rows.extend(pair_rows(one.group, made.pairs))
        annotated.extend(_annotated(one.group.prompt.id, made.items, logprobs[one.group.prompt.id]))
        useful += bool(made.items)
    if rows and not it.parts.store.sealed(it.number, PAIRS):
        it.parts.store.write(it.number, PAIRS, rows)
    return Built(
        items=annotated,
        judged=told,
        dropped=+dropped,
        contradicted=contradicted,
        truncated=truncated,
        useful=useful,
        groups=len(everything),
    )


def _annotated(prompt_id: str, made: Sequence[TrainItem], arrays: Mapping[str, Sequence[Any]]) -> list[TrainItem]:
    """The items of a group with what was kept about their sequences.

    Raises:
        StoreError: if it was kept about others.
    """
    lengths = [len(s.response_ids) for item in made for s in item.sequences]
    if any([len(array) for array in kept] != lengths for kept in arrays.values()):
        raise StoreError(
            f"the log-probs that are stored for prompt {prompt_id!r} are not those of its items",
            field="logprobs",
            fix="remove logprobs.parquet of this iteration and resume with the version of onlinerl that began it",
        )
    filled = iter(
        [
            s.with_(**{name: kept[i] for name, kept in arrays.items()})
            for i, s in enumerate(s for item in made for s in item.sequences)
        ]
    )
    return [replace(item, sequences=tuple(next(filled) for _ in item.sequences)) for item in made]


def _prepare(it: Iteration, annotated: Sequence[TrainItem]) -> tuple[list[TrainItem], Mapping[str, float]]:
    """The items as the loss needs them, and what the algorithm says about them.

    Before the very first step of a run they must pass the self-test.
    """
    past = _past_figures(it)
    prepared = it.parts.algorithm.prepare(annotated, past)
    figures = it.parts.algorithm.figures(annotated, past)
    if not it.trained_before():
        _self_test(it, prepared)
    return prepared, figures


def _past_figures(it: Iteration) -> list[Mapping[str, float]]:
    """What the algorithm said about each earlier iteration: from disk, so that a resume knows exactly what the run knew."""
    return [it.parts.store.phases(t).get("train", {}).get("figures", {}) for t in range(1, it.number)]


def _update(it: Iteration, prepared: Sequence[TrainItem]) -> UpdateReport:
    """Optimizer steps over the items.

    Raises:
        LearnerError: after too many steps whose gradient was not finite.
    """
    training, learner = it.parts.config.training, it.parts.learner
    if training.optimizer_state == "reset" and it.trained_before():
        learner.reset_optimizer()
    seed = derive_seed(it.parts.config.seed, "steps", it.number)
    indices = schedule(len(prepared), training.items_per_step, training.epochs, seed)
    rates = learning_rates(it.parts.config, it.number, len(indices))
    it.parts.tracker.phase_started(it.number, "train", sum(len(s) for s in indices), "items")
    metrics: list[Mapping[str, float]] = []
    tokens = skipped = 0
    for chosen, report in zip(indices, learner.update([[prepared[i] for i in step] for step in indices], rates), strict=True):
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


def _self_test(it: Iteration, prepared: Sequence[TrainItem]) -> None:
    """Before the very first step."""
    result = it.parts.learner.self_test(self_test.choose(prepared), it.parts.base_model)
    self_test.check(result, it.parts.algorithm.loss_at_reference, it.parts.config.learner.dtype)
    it.report.self_test(result)
