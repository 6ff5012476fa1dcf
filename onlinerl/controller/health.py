"""What must hold before anything is trained on, and what is said when it does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from onlinerl.controller.tally import Lost
from onlinerl.errors import EngineError, OracleError, StoreError
from onlinerl.types import Failure, Group, RejectReason, Request, Sampling, TrainRecord, Verdict

TIE = 1e-9
"""Judgements that differ by less are the same."""


def check_groups(groups: Sequence[Group], policy_version: int) -> None:
    """Refuse rollouts of another policy than the current one.

    Raises:
        EngineError: naming the prompt.
    """
    for group in groups:
        for rollout in group.rollouts:
            if rollout.policy_version != policy_version:
                raise EngineError(
                    f"prompt {group.prompt.id}: sampled by version {rollout.policy_version}, expected {policy_version}",
                    fix="a replica missed a weight update; `onlinerl resume` starts fresh replicas",
                )


def check_sources(groups: Sequence[Group], asked: Mapping[str, Request], sampling: Sampling) -> None:
    """Refuse responses that were drawn where the greedy one was asked for, or the other way round, or that begin otherwise than asked for.

    Args:
        groups: what the engine answered.
        asked: by prompt id.
        sampling: of the responses that are drawn.

    Raises:
        EngineError: naming the prompt.
    """
    for group in groups:
        expected = {seed: (how.temperature == 0, source) for seed, how, source in asked[group.prompt.id].responses(sampling)}
        for rollout in group.rollouts:
            if tuple(rollout.prefix_ids) != (wanted := asked[group.prompt.id].prefix_ids):
                raise EngineError(
                    f"prompt {group.prompt.id}: a response says that it begins with {len(rollout.prefix_ids)} given tokens, and it should "
                    f"with {len(wanted)} others",
                    field="engine.name",
                    fix="an engine lets responses begin with `Request.prefix_ids` and says so in `Rollout.prefix_ids`; choose another one",
                )
            found = (rollout.sampler.temperature == 0, rollout.source)
            if expected.get(rollout.seed, found) != found:
                raise EngineError(
                    f"prompt {group.prompt.id}: the response to seed {rollout.seed} is {rollout.source} at temperature "
                    f"{rollout.sampler.temperature:g}, and another one was asked for",
                    field="engine.name",
                    fix="an engine answers each seed as `Request.responses` says; repair it, or choose another one",
                )


def require_asked_for(group: Group, sources: Collection[str]) -> None:
    """Refuse to train on a group with responses that the algorithm did not ask for.

    Args:
        group: all responses to a prompt.
        sources: where they may be from.

    Raises:
        StoreError: naming the prompt.
    """
    if others := {rollout.source for rollout in group.rollouts} - {*sources}:
        raise StoreError(
            f"prompt {group.prompt.id} has responses that are not the policy's samples ({', '.join(sorted(others))}), and the algorithm "
            "did not ask for them",
            field="algorithm.name",
            fix="resume with the algorithm that sampled them, or start a new run",
        )


def check_rejected(reasons: Mapping[RejectReason, int], asked: int, limit: float) -> None:
    """Stop when more than `limit` of the responses had to be thrown away.

    Raises:
        EngineError: with the reasons.
    """
    rejected = sum(reasons.values())
    if rejected > limit * asked:
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise EngineError(
            f"{rejected} of {asked} responses had to be thrown away ({said})",
            field="engine.max_rejected",
            fix="`logprob`: the model gives NaN or infinite log-probs, try engine.dtype=float32 in a new run; `abort`: look at the "
            "engine's log. `onlinerl resume` asks for them again; engine.max_rejected sets the limit",
        )


def check_failures(failures: Sequence[Failure], groups: int, limit: float) -> None:
    """Stop when the oracle has failed on more than `limit` of the groups.

    Raises:
        OracleError: with the kinds of failure and the first message of the commonest.
    """
    if len(failures) > limit * groups:
        kinds = Counter(f.kind for f in failures)
        top = kinds.most_common(1)[0][0]
        message = next(f.message for f in failures if f.kind == top)
        raise OracleError(
            f"the oracle failed on {len(failures)} of {groups} groups ({', '.join(f'{n} {k}' for k, n in kinds.items())}); "
            f"first {top}: {message}",
            field="oracle",
            fix="repair the oracle and `onlinerl resume`; verdicts already given are kept. max_failed_labels sets the limit",
        )


def check_replies(lost: Lost, groups: int, limit: float) -> None:
    """Stop when more than `limit` of the replies have failed that the verdicts on so many groups are made of.

    Raises:
        OracleError: with the kinds of failure and what was said of the first one of the commonest.
    """
    if lost.replies.lost > limit * lost.expected(groups):
        raise OracleError(
            f"the oracle got no verdict from too many of its questions, while it still judges groups by the others: {lost}",
            field="oracle",
            fix="repair the oracle and `onlinerl resume`, which asks again for what has failed and for nothing else. max_failed_labels sets "
            "the limit",
        )


def nothing_to_learn(
    spreads: Sequence[float], earned: Sequence[float], dropped: Mapping[str, int], *, within_groups: bool, labels: bool = True
) -> str | None:
    """Why an iteration gives nothing to learn, or None if it does.

    Args:
        spreads: of every group of an iteration that has a verdict (see `spread`).
        earned: what each response of its training items earns.
        dropped: what was left out, by reason.
        within_groups: the algorithm compares responses to one prompt with each other; otherwise any difference will do.
        labels: it learns from what the oracle says; otherwise no difference is needed.
    """
    if labels and within_groups and spreads and max(spreads) < TIE:
        return f"all {len(spreads)} groups are ties: the oracle gives every response to a prompt the same judgement"
    if labels and not within_groups and earned and max(earned) - min(earned) < TIE:
        return f"all responses of {len(spreads)} groups got the same judgement"
    if not earned:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "no reason recorded"
        return f"no training item is left of {len(spreads)} judged groups (dropped: {reasons})"
    return None


def check_idle(record: TrainRecord, limit: int) -> None:
    """Stop after `limit` iterations in a row that gave nothing to learn: more would only cost. `record`: of the last training.

    Raises:
        OracleError: with the reason of the last one.
    """
    if (in_a_row := record["idle_in_a_row"]) >= limit:
        raise OracleError(
            f"{in_a_row} iteration{'s' if in_a_row > 1 else ''} in a row gave nothing to learn; the last one: {record['idle']}",
            field="training.max_idle_iterations",
            fix="check that the oracle reads the response and can tell good from bad ones here, repair it and `onlinerl resume`, which "
            "goes on with fresh prompts; or stop here if the policy has learned what this oracle can teach. "
            "A higher training.max_idle_iterations lets a resume try longer",
        )


def check_mismatch(k3: float, limit: float) -> None:
    """Engine and learner must agree on the same tokens with the same weights.

    Raises:
        EngineError: if they differ by more than numerics explain.
    """
    if not k3 <= limit:
        raise EngineError(
            f"engine and learner differ by {k3:.4f} nats per token (k3) on fresh rollouts of the same weights",
            field="evaluation.max_mismatch_k3",
            fix="look for a different dtype, temperature or model implementation; raise the limit only if that explains it",
        )


def spread(verdict: Verdict, components: Collection[str] = ()) -> float:
    """Between the best and the worst response of a group, in scores or win rates, or in one of these `components`, where that is more; 0 if
    nothing was said."""
    said = (() if verdict.scores is None else verdict.scores) if verdict.preferences is None else verdict.win_rates().tolist()
    more = ((verdict.components or {}).get(name, ()) for name in components)
    finite = ([value for value in values if math.isfinite(value)] for values in (said, *more))
    return max((float(max(values) - min(values)) for values in finite if values), default=0.0)
