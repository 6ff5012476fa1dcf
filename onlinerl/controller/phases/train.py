"""Items with the log-probs that the loss needs, and optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, overload

from onlinerl import users_code
from onlinerl.controller import health, items, replay, self_test
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import batched, learning_rates
from onlinerl.errors import LearnerError
from onlinerl.ops import pair_modifiers
from onlinerl.ops.schedule import staged
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.store import Scratch
from onlinerl.types import TrainItem, TrainRecord, UpdateReport, derive_seed

AT_ONCE = 1024
"""Items whose responses get their log-probs in one go."""


def train(it: Iteration) -> TrainRecord:
    """One pass of the learner over what was judged; no step at all where that gives nothing to learn."""
    with it.files:
        # Built on the way here, unless that was in another process.
        built = items.selected(it, it.built or replay.joined(it, items.build(it, items.stored(it))))
        within_groups = it.needs.min_samples > 1
        idle = health.nothing_to_learn(
            built.spreads,
            built.earned if built.items else (),
            built.dropped,
            within_groups=within_groups,
            labels=it.needs.labels,
        )
        if not it.prompt_ids:
            idle = f"all {len(it.sampled_ids)} prompts that were sampled are ties: the oracle gives every response to one the same judgement"
        if idle is not None and (built.spreads or not it.prompt_ids):
            idle += _cut(it)
        in_a_row = it.idle_before() + 1 if idle else 0
        steps = UpdateReport(steps=0, tokens=0, metrics=())
        figures: Mapping[str, float] = {}
        if idle is None:
            if it.needs.reference_kl and it.reference_path is not None:
                it.parts.learner.set_reference(it.reference_path)
            # Pairs are made of which score is higher; a loss on them that reads how much higher shows an overflow itself.
            if not it.needs.pairs:
                self_test.require_scores_fit(built.earned)
            steps, figures = _steps(it, built.items)
    it.weights.learner = it.number
    it.report.trained(it.number, steps, built, idle, in_a_row, figures)
    return {
        "steps": steps.steps,
        "tokens": steps.tokens,
        "skipped": steps.skipped,
        "stopped": steps.stopped,
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
        "sampled_by": sorted(built.sampled_by),
        "replayed": {str(age): count for age, count in built.replayed.items()},
    }


def _cut(it: Iteration) -> str:
    """A word on the length of the responses, if most of them had no room to end: that can be why they are judged the same."""
    sampled = it.parts.store.phases(it.number).get("sample", {})
    cut, responses = sampled.get("truncated", 0), sampled.get("samples", 0)
    if 2 * cut <= responses:
        return ""
    limit = it.parts.config.sampling.max_new_tokens
    return f"; {cut} of {responses} responses were cut at sampling.max_new_tokens={limit}: raise it if they need more room"


def _steps(it: Iteration, annotated: Sequence[TrainItem]) -> tuple[UpdateReport, Mapping[str, float]]:
    """All optimizer steps of the iteration, and what the algorithm says about its items.

    With auxiliary weights these are two passes over the same items. The learner takes on the newest auxiliary weights, with their
    optimizer; what the first pass makes of them is kept on the disk, and the second pass goes on from there to the policy. So the auxiliary
    weights are one training run of its own, and each iterate is a branch of it.
    """
    learner, trained = it.parts.learner, it.last_trained(it.number - 1)
    if not it.needs.auxiliary:
        return _pass(it, annotated, begun=trained > 0)
    if trained:  # before that, the learner has the base model, and so have both
        learner.load(it.parts.store.require("auxiliary", trained))
    names = ["reference_logprobs", *(["old_logprobs"] if it.old_logprobs else [])]
    first, figures = _pass(it, _against_itself(it, annotated, *names), begun=trained > 0)
    it.require_free()
    it.save("auxiliary")
    second, _ = _pass(it, _against_itself(it, annotated, *names), begun=True)
    return first.followed_by(second), figures


def _against_itself(it: Iteration, annotated: Sequence[TrainItem], *names: str) -> Sequence[TrainItem]:
    """The items, on the disk, with what the weights, as they are now, say of them under these names."""
    temperature = it.needs.temperature(it.parts.config.sampling.temperature)

    def scored() -> Iterator[TrainItem]:
        for chunk in batched(annotated, AT_ONCE):
            sequences = [s for item in chunk for s in item.sequences]
            said = iter(it.parts.learner.logprobs(sequences, model="policy", temperature=temperature))
            for item in chunk:
                yield replace(item, sequences=tuple(s.with_(**dict.fromkeys(names, next(said))) for s in item.sequences))

    return it.scratch.keep(scored())


def _pass(it: Iteration, annotated: Sequence[TrainItem], *, begun: bool) -> tuple[UpdateReport, Mapping[str, float]]:
    """The steps of one pass over the items, and what the algorithm says about them. `begun`: whether the run has taken a step before."""
    past = _past_figures(it)
    prepared = _weighed(it, _prepared(it.parts.algorithm, annotated, past, it.scratch))
    figures = _figures(it.parts.algorithm, annotated, past)
    if not begun:
        _self_test(it, prepared)
    elif it.parts.config.training.optimizer_state == "reset":
        it.parts.learner.reset_optimizer()
    return _update(it, prepared), figures


def _prepared(
    algorithm: Algorithm, annotated: Sequence[TrainItem], past: Sequence[Mapping[str, float]], scratch: Scratch
) -> Sequence[TrainItem]:
    """What the algorithm makes of all items.

    Raises:
        LearnerError: if it fails, or gives something else.
    """
    with users_code.calling(algorithm, "prepare"):
        made: object = algorithm.prepare(annotated, past)
    if made is annotated:
        return annotated
    if not isinstance(made, Iterable):
        raise users_code.wrong_result(
            algorithm, "prepare", f"a value of type {type(made).__name__}", "items: return or yield them"
        )

    def checked() -> Iterator[TrainItem]:
        for item in users_code.each(algorithm, "prepare", made):
            if not isinstance(item, TrainItem):
                raise users_code.wrong_result(algorithm, "prepare", f"a {type(item).__name__} among its items", "a TrainItem")
            yield item

    prepared = scratch.keep(checked())
    if not prepared:
        raise users_code.wrong_result(
            algorithm, "prepare", "no item", f"what becomes of the {len(annotated)} that it was given"
        )
    return prepared


def _weighed(it: Iteration, prepared: Sequence[TrainItem]) -> Sequence[TrainItem]:
    """With what each item counts."""
    training = it.parts.config.training
    if training.sample_weights == "equal":
        return prepared
    kind, clip, unit = training.sample_weights, training.sample_weight_clip, it.parts.algorithm.unit
    return it.scratch.keep(pair_modifiers.weighed(prepared, kind, clip, unit, training.sample_age_decay))


def _figures(algorithm: Algorithm, annotated: Sequence[TrainItem], past: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """What the algorithm says about the iteration.

    Raises:
        LearnerError: if it fails, or returns something else.
    """
    with users_code.calling(algorithm, "figures"):
        figures: Any = algorithm.figures(annotated, past)
    if not (isinstance(figures, Mapping) and all(isinstance(value, Real) for value in figures.values())):
        raise users_code.wrong_result(algorithm, "figures", f"{type(figures).__name__} {figures!r:.80}", "{name: number}")
    return {str(name): float(value) for name, value in figures.items()}


def _past_figures(it: Iteration) -> list[Mapping[str, float]]:
    """What the algorithm said about each earlier iteration: from disk, so that a resume knows exactly what the run knew."""
    return [it.parts.store.phases(t).get("train", {}).get("figures", {}) for t in range(1, it.number)]


def _update(it: Iteration, prepared: Sequence[TrainItem]) -> UpdateReport:
    """Optimizer steps over the items.

    Raises:
        LearnerError: after too many steps whose gradient was not finite.
    """
    training, learner = it.parts.config.training, it.parts.learner
    seed = derive_seed(it.parts.config.seed, "steps", it.number)
    stages = staged(_stages(it.parts.algorithm, prepared), training.batch_size, training.epochs, seed)
    indices = [chosen for stage in stages for chosen in stage]
    rates = learning_rates(it.parts.config.training, it.number, len(indices))
    it.parts.tracker.phase_started(it.number, "train", sum(len(s) for s in indices), "items")
    metrics: list[Mapping[str, float]] = []
    tokens = skipped = stopped = 0
    merging, unmerged = training.online_merging, 0
    if merging is not None:
        learner.keep_weights()
    for chosen, report in zip(indices, _reports(it, prepared, stages, rates), strict=True):
        if report.stopped:
            stopped = len(indices) - len(metrics)
            it.report.stopped(it.number, stopped, len(indices), report.metrics[0]["kl_old"])
            break
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
        unmerged += 1
        if merging is not None and unmerged == merging.every and len(metrics) < len(indices):
            learner.merge(derive_seed(it.parts.config.seed, "online_merging", it.number, len(metrics)))
            learner.keep_weights()
            unmerged = 0
    if merging is not None and (unmerged or merging.every is None):
        learner.merge(derive_seed(it.parts.config.seed, "online_merging", it.number))
    return UpdateReport(steps=len(metrics), tokens=tokens, metrics=metrics, skipped=skipped, stopped=stopped)


def _reports(
    it: Iteration, prepared: Sequence[TrainItem], stages: Sequence[Sequence[Sequence[int]]], rates: Sequence[float]
) -> Iterator[UpdateReport]:
    """What the learner says of each step, the stages one after the other."""
    learner, target = it.parts.learner, it.parts.config.training.target_kl
    # A learner that knows nothing of a target goes on as before where there is none.
    asked = {} if target is None else {"target_kl": target}
    if it.needs.stage_reference is None:
        yield from learner.update(_Steps(prepared, [chosen for stage in stages for chosen in stage]), rates, **asked)
        return
    taken = 0
    for number, stage in enumerate(stages):
        steps = _Steps(prepared, stage) if number == 0 else _moved(it, prepared, stage)
        yield from learner.update(steps, rates[taken : taken + len(stage)], **asked)
        taken += len(stage)


def _moved(it: Iteration, prepared: Sequence[TrainItem], stage: Sequence[Sequence[int]]) -> _Steps:
    """The steps of a stage, against the policy that the one before ended with."""
    if it.needs.stage_reference == "reset":
        it.parts.learner.reset_optimizer()
    places = sorted({place for chosen in stage for place in chosen})
    items = _against_itself(it, it.scratch.keep(prepared[place] for place in places), "reference_logprobs")
    at = {place: number for number, place in enumerate(places)}
    return _Steps(items, [[at[place] for place in chosen] for chosen in stage])


def _stages(algorithm: Algorithm, prepared: Sequence[TrainItem]) -> Sequence[Sequence[int]]:
    """In which order the algorithm wants the items trained.

    Raises:
        LearnerError: if it fails, or leaves an item out or takes it twice.
    """
    with users_code.calling(algorithm, "order"):
        made: Any = algorithm.order(prepared)
        stages = [list(stage) for stage in made]
    if sorted(place for stage in stages for place in stage) != list(range(len(prepared))):
        wanted = f"every place from 0 to {len(prepared) - 1} once, in lists"
        raise users_code.wrong_result(algorithm, "order", f"{made!r:.80}", wanted)
    return stages


class _Steps(Sequence[Sequence[TrainItem]]):
    """The items of each optimizer step, read when the step is taken."""

    def __init__(self, items: Sequence[TrainItem], indices: Sequence[Sequence[int]]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, step: int) -> Sequence[TrainItem]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[Sequence[TrainItem]]: ...
    def __getitem__(self, step: int | slice) -> Sequence[Any]:
        if isinstance(step, slice):
            return _Steps(self._items, self._indices[step])
        return [self._items[i] for i in self._indices[step]]


def _self_test(it: Iteration, prepared: Sequence[TrainItem]) -> None:
    """Before the very first step."""
    chosen = self_test.choose(prepared)
    result = it.parts.learner.self_test(chosen, it.parts.base_model)
    largest = max(abs(s.score) for item in chosen for s in item.sequences)
    learner = it.parts.config.learner
    weighed = it.parts.config.training.sample_weights != "equal"  # those of the chosen items have another mean than 1
    expected = None if weighed else it.parts.algorithm.loss_at_reference
    self_test.check(result, expected, learner.dtype, largest, padding_free=learner.padding_free)
    it.report.self_test(result)
