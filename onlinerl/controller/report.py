"""From what happened to figures with error bars. What each metric is stands in the catalogue (onlinerl/metrics)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onlinerl.budget import Account
from onlinerl.controller import evaluation
from onlinerl.controller.anchors import Examined
from onlinerl.controller.comparing import Compared
from onlinerl.controller.parts import Built, Parts
from onlinerl.controller.statistics import Divergence, Estimate, Z, bootstrap, ratio, wilson
from onlinerl.controller.tally import Lost, Paid, Sampled
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import per_iteration, per_step
from onlinerl.protocols.oracle import Figure
from onlinerl.protocols.refreshing import Refreshed
from onlinerl.protocols.tracker import Tracker
from onlinerl.types import Interval, MeasureRecord, Metric, SelfTest, SyncReport, UpdateReport

_ECE = {"value": "ece", "floor": "floor", "floor_p95": "floor_95"}


@dataclass
class Reporter:
    """Turns results into Metric records and sends them to the tracker."""

    tracker: Tracker
    attempt: int = 0
    catalogue: Catalogue = CATALOGUE
    """With what the algorithm of the run declares."""
    _noted: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, parts: Parts, attempt: int) -> Reporter:
        """For a run with these parts."""
        return cls(parts.tracker, attempt, CATALOGUE.including(parts.algorithm.metrics, parts.config.algorithm["name"]))

    def phase(self, iteration: int, phase: str, seconds: float) -> None:
        """Exclusive wall time of a phase."""
        self._log(iteration, self._one("phase_seconds", seconds, labels={"phase": phase}))

    def sampled(self, iteration: int, groups: Sequence[Sampled], *, kept: int | None = None) -> None:
        """What was generated, and with dynamic sampling how many of the groups the iteration goes on with."""
        rejected = Counter(reason for g in groups for reason in g.rejected)
        self._log(
            iteration,
            self._one("generated_tokens", float(sum(g.tokens for g in groups)), n=sum(g.responses for g in groups)),
            self._one("prompts_sampled", float(len(groups))),
            self._estimate("unique_ratio", bootstrap([g.unique for g in groups if g.responses])),
            self._estimate("rollouts_truncated", bootstrap([g.cut / g.responses for g in groups if g.responses])),
            *(self._one("rollouts_rejected", float(n), labels={"reason": r}) for r, n in sorted(rejected.items())),
            *([] if kept is None else [self._one("sampled_per_kept", len(groups) / max(1, kept), n=kept)]),
        )

    def reused(self, iteration: int, by_age: Mapping[str, int], tokens: int) -> None:
        """Prompts whose responses of earlier iterations are trained on once more, by their age in iterations, and the tokens of these."""
        self._log(
            iteration,
            *(self._one("prompts_reused", float(count), labels={"age": age}) for age, count in by_age.items()),
            self._one("tokens_saved", float(tokens), n=sum(by_age.values())),
        )

    def labelled(
        self, iteration: int, *, ok: int, failed: int, spreads: Sequence[float], uncertainties: Sequence[float] = ()
    ) -> None:
        """How many groups the oracle judged and could not judge; standard deviation of the scores of each group that has scores; mean
        disagreement about its pairs of each group that was judged several times."""
        metrics = [
            self._one("oracle_calls", float(ok), labels={"status": "ok"}),
            self._one("oracle_calls", float(failed), labels={"status": "failed"}),
        ]
        if spreads:
            metrics.append(self._estimate("zero_spread", wilson([float(s < 1e-6) for s in spreads])))
            metrics.append(self._estimate("reward_std_group", bootstrap(spreads)))
        if uncertainties:
            metrics.append(self._estimate("oracle_uncertainty", bootstrap(uncertainties)))
        self._log(iteration, *metrics)

    def paid(self, iteration: int, phase: str, paid: Paid) -> None:
        """What the oracle's answers of a phase have cost, failures included, and what was saved because they were known."""
        cost, labels = paid.cost, {"phase": phase}
        if paid.saved.calls:
            self._log(iteration, self._one("oracle_requests_saved", float(paid.saved.calls), labels=labels))
        if not cost.calls:
            return
        metrics = [
            self._one("oracle_requests", float(cost.calls), labels=labels),
            self._one("oracle_seconds", cost.seconds, labels=labels),
        ]
        for kind, tokens in (("prompt", cost.tokens - cost.tokens_out), ("completion", cost.tokens_out)) if cost.tokens else ():
            metrics.append(self._one("oracle_tokens", float(tokens), labels={**labels, "kind": kind}))
        if cost.usd:
            metrics.append(self._one("oracle_usd", cost.usd, labels=labels))
        self._log(iteration, *metrics)

    def budget(self, iteration: int, account: Account) -> None:
        """How much of it is spent, where there is one."""
        shares = account.limits.shares(account.spent)
        self._log(iteration, *(self._one("budget_spent", share, labels={"kind": kind}) for kind, share in shares.items()))

    def oracle(self, iteration: int, figures: Sequence[Figure]) -> None:
        """What the oracle says of itself."""
        self._log(iteration, *map(self._figure, figures))

    def compared(self, iteration: int, found: Sequence[Compared]) -> None:
        """How an oracle that compares decides, by the order in which it is shown the two and by their lengths; one entry per group."""
        estimates = {
            "swap_disagreement": ratio([each.flips for each in found], [each.both_orders for each in found]),
            "first_place_wins": ratio([each.first_wins for each in found], [each.comparisons for each in found]),
            "longer_wins": ratio([each.longer_wins for each in found], [each.unequal for each in found]),
            "preference_cycles": ratio([each.circles for each in found], [each.triples for each in found]),
        }
        self._log(iteration, *(self._estimate(name, estimate) for name, estimate in estimates.items() if estimate.n))

    def examined(self, iteration: int, found: Examined) -> None:
        """What the oracle says of pairs whose better response is known."""
        for remark in found.remarks():
            self.tracker.note(remark)
        figures, bias = found.figures, found.figures["length_bias"]
        subsets = {
            "all": figures["accuracy"],
            "better_is_shorter": bias["shorter_is_better"],
            "better_is_longer": bias["longer_is_better"],
        }
        error = figures["calibration"]
        estimates = {"anchor_first_place_wins": found.first_place_wins, "anchor_agreement": found.agreement}
        if "swap_disagreement" in figures:
            estimates["anchor_swap_disagreement"] = Estimate(**figures["swap_disagreement"])
        self._log(
            iteration,
            *(
                self._estimate("anchor_accuracy", Estimate(**one), labels={"kind": name})
                for name, one in subsets.items()
                if one["n"]
            ),
            *(
                self._one("anchor_ece", error[key], n=figures["accuracy"]["n"], labels={"stat": stat})
                for stat, key in _ECE.items()
                if figures["accuracy"]["n"]
            ),
            *(self._estimate(name, one) for name, one in estimates.items() if one is not None and one.n),
        )

    def refreshed(self, iteration: int, made: Refreshed, shift: Estimate | None, versions: tuple[str, str]) -> None:
        """What came of training the reward model further; by how much the same answers score higher now; its version before and after."""
        if made.reason is not None:
            self.tracker.note(f"iteration {iteration}: the reward model stays as it is: {made.reason}")
        if not made.trained:
            return
        counts = {"trained": made.trained, "heldout": made.heldout}
        metrics = [self._one("refresh_comparisons", float(n), labels={"kind": kind}) for kind, n in counts.items()]
        metrics.append(self._one("refresh_taken", float(made.weights is not None)))
        # Of a training that is not taken nobody ever asks the version: it has none.
        said = {"before": (made.before, versions[0]), "after": (made.after, versions[1] if made.weights is not None else None)}
        metrics += [
            self._of("refresh_accuracy", one, labels={"kind": name}, oracle_version=version)
            for name, (one, version) in said.items()
            if one is not None
        ]
        if made.change is not None:
            metrics.append(self._of("refresh_accuracy_change", made.change))
        if shift is not None and shift.n:
            metrics.append(self._estimate("refresh_reward_shift", shift, oracle_version=versions[1]))
        self._log(iteration, *metrics)

    def self_test(self, result: SelfTest) -> None:
        """What the step-0 self-test found."""
        gaps = ", ".join(f"stored {name} {gap:.1e}" for name, gap in result.stored_gaps.items())
        self.tracker.note(
            f"self-test: loss {result.loss:.6f} with policy = reference ({result.stored_loss:.6f} as stored), KL {result.repeat_kl:.1e}; "
            f"per token off by: {gaps}{', ' if gaps else ''}base model {result.base_gap:.1e}, rounding {result.noise:.1e}"
        )

    def trained(
        self,
        iteration: int,
        steps: UpdateReport,
        built: Built,
        idle: str | None,
        idle_in_a_row: int,
        figures: Mapping[str, float],
    ) -> None:
        """What was trained on, what the algorithm and the learner said about it (the latter averaged over the iteration's steps); or
        why there was no step."""
        if idle is not None:
            self.tracker.note(f"iteration {iteration} gives nothing to learn, so no step is taken: {idle}")
        metrics = [
            self._one("trained_tokens", float(steps.tokens)),
            self._one("items_truncated", float(built.truncated), n=len(built.items)),
            self._one("pairs_per_prompt", len(built.items) / max(1, built.groups), n=built.groups),
            self._one("pair_yield", built.useful / max(1, built.groups), n=built.groups),
            self._one("skipped_steps", float(steps.skipped)),
            self._one("stopped_steps", float(steps.stopped)),
            self._one("idle_iterations", float(idle_in_a_row)),
            *(self._one("pairs_dropped", float(n), labels={"reason": r}) for r, n in built.dropped.items()),
            # Trained on all the same: chosen by win rate, although the oracle prefers the rejected one of the two.
            self._one("pairs_contradicted", float(built.contradicted)),
            *self._staleness(iteration - 1, [v for v, n in built.sampled_by.items() for _ in range(n)]),
        ]
        self._learn_of({name for step in steps.metrics for name in step}, figures)
        metrics += [
            self._one(name, value, n=len(built.items)) for name, value in figures.items() if self._reports(name, "iteration")
        ]
        for name in sorted({name for step in steps.metrics for name in step if self._reports(name, "step")}):
            values = [step[name] for step in steps.metrics if name in step and math.isfinite(step[name])]
            if values:
                metrics.append(self._estimate(name, bootstrap(values)))
        self._log(iteration, *metrics)

    def synced(self, iteration: int, report: SyncReport) -> None:
        """How the weights travelled."""
        self._log(
            iteration,
            self._one("weight_sync_seconds", report.seconds),
            self._one("weight_sync_bytes", float(report.bytes)),
            self._one("weight_sync_ok", float(report.proved)),
            self._one("weight_sync_canary", report.canary_nats),
        )

    def push_failed(self, iteration: int) -> None:
        """Weights did not arrive, or could not be proved to have arrived."""
        # A metric of a name and labels supersedes its older value; each attempt's failure is one of its own.
        labels = {"attempt": str(self.attempt)}
        self._log(
            iteration,
            self._one("weight_sync_ok", 0.0),
            self._one("weight_sync_failures", 1.0, labels=labels),
        )

    def asked(self, iteration: int, phase: str, failed: int, groups: int) -> None:
        """How many groups of a phase the oracle could not judge so far."""
        self._log(iteration, self._one("oracle_failed", failed / max(1, groups), n=groups, labels={"phase": phase}))

    def replies(self, iteration: int, phase: str, lost: Lost) -> None:
        """How many of the replies failed that the verdicts of a phase are made of, together and by kind; nothing where each is one answer."""
        replies = lost.replies
        counts = {"all": replies.lost} | {kind: replies.failed.get(kind, 0) for kind in sorted(lost.kinds)}
        for kind, count in counts.items() if replies.asked else ():
            share = count / replies.asked
            self._log(
                iteration,
                self._one("oracle_replies_failed", share, n=replies.asked, labels={"phase": phase, "kind": kind}),
            )

    def skipped(self, iteration: int, steps: int) -> None:
        """How many optimizer steps of the iteration were skipped so far."""
        self._log(iteration, self._one("skipped_steps", float(steps)))

    def stopped(self, iteration: int, steps: int, planned: int, kl: float) -> None:
        """How many optimizer steps of a pass over the items are left out, and the KL for which they are."""
        self.tracker.note(
            f"iteration {iteration} stops {steps} steps early, of {planned}: the policy is {kl:.3g} nats per token from where it began, more than "
            "training.target_kl"
        )

    def mismatch(self, iteration: int, gap: evaluation.Mismatch) -> None:
        """Engine against learner."""
        stats = ("mean", "p99", "max")
        self._log(
            iteration,
            *(self._one("logp_mismatch", getattr(gap, s), n=gap.tokens, labels={"stat": s}) for s in stats),
            self._one("logp_mismatch_k3", gap.k3, n=gap.tokens),
        )

    def evaluated(self, iteration: int, measured: evaluation.Measured, oracle_calls: int) -> MeasureRecord:
        """Held-out figures, and how many calls of the oracle they took. Returns the record that `show` reads."""
        now = measured.answers
        reward, length, cut = evaluation.reward(now), evaluation.length(now), evaluation.truncated(now)
        versions = " + ".join(measured.oracle_versions) or None
        common: dict[str, Any] = {"set": "heldout", "policy_version": iteration, "oracle_version": versions}
        metrics = [
            self._estimate("length", length, **common),
            self._estimate("truncated", cut, **common),
            self._estimate("entropy_token", measured.entropy_token, **common),
            self._estimate("entropy_seq", measured.entropy_seq, **common),
            *self._divergence("kl_ref", "initial", measured.kl_ref, common),
            *self._divergence("kl_prev", "prev_iter", measured.kl_prev, common),
        ]
        if reward.n:  # an oracle that only compares gives none
            metrics.append(self._estimate("reward", reward, labels={"oracle": "proxy"}, **common))
        if measured.kl_forward is not None:
            metrics.append(self._estimate("kl_forward", measured.kl_forward, **common))
        for opponent, estimate in measured.wins.items():
            labels = {"opponent": opponent, "control": "raw"}
            metrics.append(self._estimate("win_rate", estimate, labels=labels, **common))
        for name, one in measured.components.items():
            labels = {"component": name}
            metrics.append(self._estimate("component_score", one.score, labels=labels, **common))
            if one.win_rate is not None:
                metrics.append(self._estimate("component_win_rate", one.win_rate, labels=labels, **common))
        self._log(iteration, *metrics)
        self.tracker.note(_headline(reward, measured))
        base, kl, gains = measured.wins.get("base"), measured.kl_ref, measured.gains
        return {
            "reward": reward.value,
            "reward_interval": [reward.low, reward.high],
            "kl_ref": kl.headline.value,
            "kl_prev": measured.kl_prev.headline.value,
            "kl_ref_k1": kl.k1.value,
            "kl_ref_k3": kl.k3.value,
            "kl_estimator": kl.estimator,
            "kl_conflict": kl.conflict,
            "kl_forward": None if measured.kl_forward is None else measured.kl_forward.value,
            "entropy_token": measured.entropy_token.value,
            "win_rate": None if base is None else _interval(base),
            "win_rate_prev": None if "prev" not in measured.wins else measured.wins["prev"].value,
            "gains": None if gains is None else {"reward": _interval(gains.reward), "win_rate": _interval(gains.win_rate)},
            "components": {
                name: {"score": _interval(one.score), "win_rate": None if one.win_rate is None else _interval(one.win_rate)}
                for name, one in measured.components.items()
            },
            "length": length.value,
            "truncated": cut.value,
            "logp_mismatch": measured.mismatch.mean,
            "insufficient": sorted({m.name for m in metrics if m.insufficient}),
            "oracle_calls": oracle_calls,
            "oracle_versions": measured.oracle_versions,
        }

    def _divergence(self, name: str, reference: str, kl: Divergence, common: Mapping[str, Any]) -> list[Metric]:
        """Both estimators, which of them is the headline, and what speaks against it."""
        labels = {"reference": reference}
        return [
            self._estimate(name, kl.k1, estimator="k1", labels={"estimator": "k1"}, **common),
            self._estimate(name, kl.k3, estimator="k3", labels={"estimator": "k3"}, **common),
            self._estimate("kl_headline", kl.headline, estimator=kl.estimator, labels=labels, **common),
            self._one("kl_conflict", float(kl.conflict), n=kl.k1.n, labels=labels),
            self._one("kl_clamped", kl.clamped_share, n=kl.tokens, labels=labels),
        ]

    def _staleness(self, version: int, sampled: Sequence[int]) -> list[Metric]:
        """How far the versions that sampled lie behind the one that training starts from."""
        if not sampled:
            return []
        behind = version - np.asarray(sampled, dtype=float)
        figures = {"mean": behind.mean(), "p95": np.quantile(behind, 0.95), "max": behind.max()}
        return [self._one("staleness", float(v), n=len(sampled), labels={"stat": stat}) for stat, v in figures.items()]

    def _learn_of(self, steps: Iterable[str], figures: Iterable[str]) -> None:
        """Metrics of the algorithm or the learner that nobody has declared: recorded without a unit, and said once.

        It is a mistake in the algorithm, found by its contract tests, and no reason to end a run that may have cost days.
        """
        makers = dict.fromkeys(sorted(figures), per_iteration) | dict.fromkeys(sorted(steps), per_step)
        new = [
            make(name, "Reported by an algorithm and not declared", "1")
            for name, make in makers.items()
            if name not in self.catalogue
        ]
        for definition in new:
            self.tracker.note(
                f"{definition.name} is recorded without a unit: the algorithm reports it, and its `metrics` do not declare it"
            )
        self.catalogue = Catalogue((*self.catalogue, *new), self.catalogue.states)

    def _reports(self, name: str, origin: str) -> bool:
        """Whether this is a metric of that origin, and not another one of the same name, whose records it would take the place of."""
        right = self.catalogue[name].origin == origin
        if not right and name not in self._noted:
            self._noted.add(name)
            self.tracker.note(f"{name}, as the algorithm reports it, is not recorded: it is the name of another metric")
        return right

    def _log(self, iteration: int, *metrics: Metric) -> None:
        self.tracker.log([replace(m, iteration=iteration, attempt=self.attempt) for m in metrics])

    def _one(self, name: str, value: float, *, n: int = 1, labels: Mapping[str, str] | None = None) -> Metric:
        return self.catalogue.record(name, value, n=n, labels=labels)

    def _figure(self, figure: Figure) -> Metric:
        """With its interval: Wilson's of a share, 1.96 standard errors where one is given."""
        name, value, n, labels, se = figure
        if se is not None:
            return self._estimate(
                name, Estimate(value=value, low=value - Z * se, high=value + Z * se, se=se, n=n), labels=labels
            )
        if n > 1 and self.catalogue[name].unit == "ratio":
            return self._estimate(name, wilson([value] * n), labels=labels)
        return self._one(name, value, n=n, labels=labels)

    def _of(self, name: str, interval: Interval, **more: Any) -> Metric:
        """An estimate that was kept without its standard error."""
        value, low, high = interval["value"], interval["low"], interval["high"]
        return self.catalogue.record(name, value, n=interval["n"], ci_low=low, ci_high=high, **more)

    def _estimate(self, name: str, estimate: Estimate, **more: Any) -> Metric:
        return self.catalogue.record(
            name, estimate.value, n=estimate.n, se=estimate.se, ci_low=estimate.low, ci_high=estimate.high, **more
        )


def _interval(estimate: Estimate) -> Interval:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _headline(reward: Estimate, measured: evaluation.Measured) -> str:
    """What the console says about an iterate."""
    said = [f"reward {reward.value:.3f}"] if reward.n else []
    kl = measured.kl_ref
    said.append(f"KL to base {kl.headline.value:.2f} nats ({kl.estimator})")
    if kl.conflict:
        said.append(f"its two estimates disagree (k1 {kl.k1.value:.2f}, k3 {kl.k3.value:.2f})")
    if (base := measured.wins.get("base")) is not None:
        said.append(f"win rate vs base {base.value:.3f} [{base.low:.3f}, {base.high:.3f}]")
    return "  ".join(said)
