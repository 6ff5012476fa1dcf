"""From what happened to figures with error bars: the only place that names metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onlinerl.controller import evaluation
from onlinerl.controller.statistics import Divergence, Estimate, bootstrap, wilson
from onlinerl.protocols import Tracker
from onlinerl.types import Failure, Group, Judged, Metric, SelfTest, SyncReport, Verdict


@dataclass
class Reporter:
    """Turns results into Metric records and sends them to the tracker."""

    tracker: Tracker
    attempt: int = 0

    def phase(self, iteration: int, phase: str, seconds: float, record: Mapping[str, Any]) -> None:
        """Exclusive wall time of a phase."""
        self._log(iteration, self._one("phase_seconds", seconds, "s", labels={"phase": phase}))

    def sampled(self, iteration: int, groups: Sequence[Group]) -> None:
        """What was generated."""
        rollouts = [r for g in groups for r in g.rollouts]
        texts = [len({r.text for r in g.rollouts}) / len(g.rollouts) for g in groups]
        self._log(
            iteration,
            self._one("generated_tokens", float(sum(len(r.token_ids) for r in rollouts)), "tokens", n=len(rollouts)),
            self._one("prompts_sampled", float(len(groups)), "prompts"),
            self._estimate("unique_ratio", bootstrap(texts), "ratio", n_min=200),
        )

    def labelled(
        self, iteration: int, groups: Sequence[Group], results: Mapping[str, Verdict | Failure], judged: Sequence[Judged]
    ) -> None:
        """What the oracle said."""
        failed = sum(isinstance(r, Failure) for r in results.values())
        spread = [float(np.std(j.verdict.scores)) for j in judged if j.verdict.scores is not None]
        metrics = [
            self._one("oracle_calls", float(len(results) - failed), "calls", labels={"status": "ok"}),
            self._one("oracle_calls", float(failed), "calls", labels={"status": "failed"}),
        ]
        if spread:
            metrics.append(self._estimate("zero_spread", wilson([float(s < 1e-6) for s in spread]), "ratio", n_min=200))
            metrics.append(self._estimate("reward_std_group", bootstrap(spread), "reward", n_min=200))
        self._log(iteration, *metrics)

    def self_test(self, result: SelfTest) -> None:
        """What the step-0 self-test found."""
        gaps = ", ".join(f"stored {name} {gap:.1e}" for name, gap in result.stored_gaps.items())
        self.tracker.note(
            f"self-test: loss {result.loss:.6f} with policy = reference ({result.stored_loss:.6f} as stored), KL {result.repeat_kl:.1e}; "
            f"per token off by: {gaps}{', ' if gaps else ''}base model {result.base_gap:.1e}"
        )

    def trained(
        self,
        iteration: int,
        steps: Sequence[Mapping[str, float]],
        tokens: int,
        dropped: Mapping[str, int],
        items: int,
        useful: int,
        groups: int,
    ) -> None:
        """What the learner reported, averaged over the iteration's steps."""
        metrics = [
            self._one("trained_tokens", float(tokens), "tokens"),
            self._one("pairs_per_prompt", items / max(1, groups), "ratio", n=groups),
            self._one("pair_yield", useful / max(1, groups), "ratio", n=groups),
            *(self._one("pairs_dropped", float(n), "pairs", labels={"reason": r}) for r, n in dropped.items()),
        ]
        for name in sorted({k for step in steps for k in step}):
            values = [step[name] for step in steps if name in step and math.isfinite(step[name])]
            if values:
                metrics.append(self._estimate(name, bootstrap(values), "", estimator="mean over steps"))
        self._log(iteration, *metrics)

    def synced(self, iteration: int, report: SyncReport) -> None:
        """How the weights travelled."""
        self._log(
            iteration,
            self._one("weight_sync_seconds", report.seconds, "s"),
            self._one("weight_sync_bytes", float(report.bytes), "bytes"),
            self._one("weight_sync_ok", float(report.proved), "bool"),
            self._one("weight_sync_canary", report.canary_nats, "nats/token"),
        )

    def evaluated(
        self,
        iteration: int,
        now: evaluation.Evaluated,
        base_kl: Divergence,
        prev_kl: Divergence,
        wins: Mapping[str, Estimate],
        gap: evaluation.Mismatch,
    ) -> dict[str, Any]:
        """Held-out figures. Returns the record that `show` reads."""
        reward, length, cut = evaluation.reward(now), evaluation.length(now), evaluation.truncated(now)
        n_min = evaluation.N_MIN
        oracle_version = next((v.oracle_version for v in now.verdicts.values() if isinstance(v, Verdict)), None)
        common: dict[str, Any] = {"set": "heldout", "policy_version": iteration, "oracle_version": oracle_version}
        metrics = [
            self._estimate("reward", reward, "reward", n_min=n_min["reward"], labels={"oracle": "proxy"}, **common),
            self._estimate("length", length, "tokens", n_min=400, **common),
            self._estimate("truncated", cut, "ratio", n_min=400, **common),
        ]
        for name, kl in (("kl_ref", base_kl), ("kl_prev", prev_kl)):
            for estimator in ("k1", "k3"):
                estimate = getattr(kl, estimator)
                labels = {"estimator": estimator}
                metrics.append(
                    self._estimate(
                        name, estimate, "nats/sequence", n_min=n_min["kl"], estimator=estimator, labels=labels, **common
                    )
                )
        for opponent, estimate in wins.items():
            labels = {"opponent": opponent, "control": "raw"}
            metrics.append(
                self._estimate(
                    "win_rate", estimate, "ratio", n_min=n_min["win_rate"], estimator="wilson", labels=labels, **common
                )
            )
        for stat in ("mean", "p99", "max"):
            metrics.append(self._one("logp_mismatch", getattr(gap, stat), "nats/token", n=gap.tokens, labels={"stat": stat}))
        metrics.append(self._one("logp_mismatch_k3", gap.k3, "nats/token", n=gap.tokens))
        self._log(iteration, *metrics)
        base = wins.get("base")
        said = f"reward {reward.value:.3f}  KL to base {base_kl.headline:.2f} nats"
        if base is not None:
            said += f"  win rate vs base {base.value:.3f} [{base.low:.3f}, {base.high:.3f}]"
        self.tracker.note(said)
        return {
            "reward": reward.value,
            "reward_interval": [reward.low, reward.high],
            "kl_ref": base_kl.headline,
            "kl_prev": prev_kl.headline,
            "kl_ref_k1": base_kl.k1.value,
            "win_rate": None if base is None else {"value": base.value, "low": base.low, "high": base.high, "n": base.n},
            "win_rate_prev": None if "prev" not in wins else wins["prev"].value,
            "length": length.value,
            "truncated": cut.value,
            "logp_mismatch": gap.mean,
        }

    def _log(self, iteration: int, *metrics: Metric) -> None:
        from dataclasses import replace

        self.tracker.log([replace(m, iteration=iteration, attempt=self.attempt) for m in metrics])

    @staticmethod
    def _one(name: str, value: float, unit: str, n: int = 1, labels: Mapping[str, str] | None = None) -> Metric:
        return Metric(name=name, value=value, unit=unit, iteration=0, n=n, labels=labels or {})

    @staticmethod
    def _estimate(
        name: str,
        estimate: Estimate,
        unit: str,
        *,
        n_min: int = 1,
        estimator: str = "mean",
        labels: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Metric:
        return Metric(
            name=name,
            value=estimate.value,
            unit=unit,
            iteration=0,
            n=estimate.n,
            se=estimate.se,
            ci_low=estimate.low,
            ci_high=estimate.high,
            estimator=estimator,
            insufficient=estimate.n < n_min,
            labels=labels or {},
            **more,
        )
