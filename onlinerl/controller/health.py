"""What must hold before anything is trained on, and what is said when it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from onlinerl.errors import EngineError, OracleError
from onlinerl.types import Failure, Group, Judged

TIE = 1e-9
"""Judgements that differ by less are the same."""


def check_group(group: Group, policy_version: int) -> None:
    """Refuse rollouts that cannot be trained on: missing or non-finite log-probs (R-E3), or a stale policy (R-B3).

    Raises:
        EngineError: naming the prompt.
    """
    for rollout in group.rollouts:
        if len(rollout.logprobs) != len(rollout.token_ids) or not np.isfinite(rollout.logprobs).all():
            raise EngineError(
                f"prompt {group.prompt.id}: a response lacks a finite log-prob for every token",
                fix="this is a bug of the engine; nothing was stored",
            )
        if rollout.policy_version != policy_version:
            raise EngineError(
                f"prompt {group.prompt.id}: sampled by version {rollout.policy_version}, expected {policy_version}",
                fix="a replica missed a weight update; `onlinerl resume` starts fresh replicas",
            )


def check_failures(failures: Sequence[Failure], groups: int, limit: float) -> None:
    """Stop when the oracle has failed on more than `limit` of the groups (R-G1).

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


def check_spread(judged: Sequence[Judged], *, within_groups: bool) -> None:
    """Stop when the oracle never separates anything: nothing could be learned from it (R-G4).

    Args:
        judged: everything of an iteration.
        within_groups: the algorithm compares responses to one prompt with each other; otherwise any difference will do.

    Raises:
        OracleError: if every group is tied, or everything has one score.
    """
    fix = (
        "check that the oracle reads the response, and that responses differ (sampling.temperature > 0); "
        "then start a new run: these verdicts belong to this one"
    )
    if within_groups and judged and all(_spread([j]) < TIE for j in judged):
        raise OracleError(
            f"all {len(judged)} groups are ties: the oracle gives every response to a prompt the same judgement",
            field="oracle",
            fix=fix,
        )
    if not within_groups and judged and _spread(judged) < TIE:
        raise OracleError(f"all responses of {len(judged)} groups got the same judgement", field="oracle", fix=fix)


def check_items(items: int, judged: int, dropped: Mapping[str, int]) -> None:
    """Stop when nothing is left to train on.

    Raises:
        OracleError: with what was dropped and why.
    """
    if items == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "no reason recorded"
        raise OracleError(
            f"no training item is left of {judged} judged groups (dropped: {reasons})",
            field="pairing",
            fix="loosen the pairing filters, raise sampling.samples_per_prompt, or check the oracle",
        )


def check_mismatch(k3: float, limit: float) -> None:
    """Engine and learner must agree on the same tokens with the same weights (R-E1).

    Raises:
        EngineError: if they differ by more than numerics explain.
    """
    if not k3 <= limit:
        raise EngineError(
            f"engine and learner differ by {k3:.4f} nats per token (k3) on fresh rollouts of the same weights",
            field="evaluation.max_mismatch_k3",
            fix="look for a different dtype, temperature or model implementation; raise the limit only if that explains it",
        )


def _spread(judged: Sequence[Judged]) -> float:
    """Between the best and the worst response, in scores or win rates; NaN if nothing was said."""
    said = [np.asarray(v.scores, float) if v.preferences is None else v.win_rates() for v in (j.verdict for j in judged)]
    return float(np.nanmax(np.concatenate(said)) - np.nanmin(np.concatenate(said)))
