"""What this iterate is worth: its answers to the held-out prompts, and the figures about them."""

from __future__ import annotations

from functools import partial
from typing import Any

from onlinerl.controller import collect, evaluation, health
from onlinerl.controller.iteration import Iteration
from onlinerl.stores.rows import EVALUATION, EVALUATION_VERDICTS, group_from_row, result_from_row
from onlinerl.types import Request, Sampling, derive_seed


def evaluate(it: Iteration) -> dict[str, Any]:
    """Held-out prompts, one response each, with the same seeds for every iterate."""
    config, learner = it.parts.config, it.parts.learner
    it.ensure_engine()
    # Divergences need temperature 1 and the whole vocabulary.
    sampling = Sampling(max_new_tokens=config.sampling.max_new_tokens)
    requests = [Request(prompt=p, seeds=(derive_seed(config.seed, "evaluation", p.id),)) for p in it.parts.heldout]
    groups = collect.generate(it, requests, sampling, EVALUATION, "evaluate")
    calls, verdicts = collect.judge(it, groups, EVALUATION_VERDICTS, "evaluate")
    now = evaluation.Evaluated(groups=groups, verdicts=verdicts)
    own = learner.score(evaluation.sequences(groups), model="policy", temperature=1.0)
    base_kl = evaluation.drift(now, learner, own, _other(it, 0))
    prev_kl = base_kl if it.number <= 1 else evaluation.drift(now, learner, own, _other(it, it.number - 1))
    rates = {}
    for iterate in sorted({0, it.number - 1}) if it.number > 0 else ():
        judge = partial(collect.judge, it, table=f"comparisons_{iterate:04d}", phase="evaluate")
        rates[iterate], more = evaluation.win_rate(now, _evaluated(it, iterate), judge)
        calls += more
    wins = {"base": rates[0], "prev": rates[it.number - 1]} if rates else {}
    sample = groups[: config.evaluation.mismatch_sample]
    gap = evaluation.mismatch(sample, own[: len(sample)])
    health.check_mismatch(gap.k3, config.evaluation.max_mismatch_k3)
    return it.report.evaluated(it.number, now, base_kl, prev_kl, wins, gap) | {"oracle_calls": calls}


def _other(it: Iteration, iterate: int) -> str | None:
    model = it.model_of(iterate)
    return None if model == "policy" else model


def _evaluated(it: Iteration, iterate: int) -> evaluation.Evaluated:
    """What an earlier iterate answered, from disk."""
    by_id = {p.id: p for p in it.parts.heldout}
    groups = [group_from_row(row, by_id) for row in it.parts.store.read(iterate, EVALUATION)]
    verdicts = dict(result_from_row(row) for row in it.parts.store.read(iterate, EVALUATION_VERDICTS))
    return evaluation.Evaluated(groups=groups, verdicts=verdicts)
