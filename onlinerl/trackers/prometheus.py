"""Live figures for Prometheus: one declarative table from the controller's metrics to `onlinerl_*` series.

Differences from a plain reading of metrics.jsonl: counters add up what each record reports; a figure measured on too few prompts
is exported with its real value and `onlinerl_metric_insufficient{name=...}` is 1 beside it, so that small demonstrations show
something and alert rules can tell. Names that are not in the table are not exported.
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from onlinerl import __version__, graph
from onlinerl.errors import ConfigError
from onlinerl.protocols.tracker import Tracker
from onlinerl.trackers._discovery import Discovery
from onlinerl.types import Metric

__all__ = ["PrometheusTracker", "totals"]

ROLE = "controller"
STATUSES = ("ok", "failed")
REJECTED = ("logprob", "abort")
STATES = ("running", "finished", "failed", "interrupted")
PORTS = 100
"""How many ports to try, from the configured one on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """How one metric of the controller is exported."""

    metric: str
    """`Metric.name`."""
    name: str
    """Name in Prometheus; counters end in `_total`."""
    help: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """Label -> its value if the metric does not carry it; None: the metric must carry it. Other labels are dropped."""
    bounds: str | None = None
    """Name of a gauge with an added label `bound` (lower, upper) for the confidence interval."""


_KL = "KL divergence of the policy from an earlier one, per sequence"
TABLE: tuple[Series, ...] = (
    Series(
        metric="kl_ref", name="onlinerl_kl_nats", help=_KL, labels={"reference": "initial", "estimator": "k3", "stat": "mean"}
    ),
    Series(
        metric="kl_prev",
        name="onlinerl_kl_nats",
        help=_KL,
        labels={"reference": "prev_iter", "estimator": "k3", "stat": "mean"},
    ),
    Series(
        metric="kl_conflict",
        name="onlinerl_kl_conflict",
        help="1 if the estimates k1 and k3 of a KL divergence disagree",
        labels={"reference": None},
    ),
    Series(
        metric="kl_clamped",
        name="onlinerl_kl_clamped_ratio",
        help="Share of tokens whose log-ratio was clamped in a KL divergence",
        labels={"reference": None},
    ),
    Series(metric="kl_forward", name="onlinerl_kl_forward_nats", help="KL divergence of the base model from the policy"),
    Series(metric="entropy_token", name="onlinerl_entropy_nats", help="Entropy of the policy per token, from its samples"),
    Series(
        metric="reward",
        name="onlinerl_reward",
        help="Oracle score on the held-out prompts",
        labels={"oracle": "proxy", "stat": "mean"},
        bounds="onlinerl_reward_bound",
    ),
    Series(
        metric="win_rate",
        name="onlinerl_win_rate_ratio",
        help="Share of held-out prompts won against an opponent",
        labels={"opponent": "base", "control": "raw"},
        bounds="onlinerl_win_rate_bound_ratio",
    ),
    Series(metric="length", name="onlinerl_response_length_tokens", help="Tokens per response", labels={"stat": "mean"}),
    Series(
        metric="truncated",
        name="onlinerl_finish_ratio",
        help="Share of responses by finish reason",
        labels={"reason": "length"},
    ),
    Series(
        metric="phase_seconds",
        name="onlinerl_phase_seconds",
        help="Wall time of the latest run of a phase",
        labels={"phase": None},
    ),
    Series(
        metric="phase_seconds",
        name="onlinerl_phase_duration_seconds",
        help="Wall time of a phase",
        kind="histogram",
        labels={"phase": None},
    ),
    Series(
        metric="prompts_sampled", name="onlinerl_prompts_sampled_total", help="Prompts sampled for training", kind="counter"
    ),
    Series(metric="generated_tokens", name="onlinerl_generated_tokens_total", help="Tokens generated", kind="counter"),
    Series(metric="trained_tokens", name="onlinerl_trained_tokens_total", help="Tokens trained on, all epochs", kind="counter"),
    Series(
        metric="oracle_calls",
        name="onlinerl_oracle_calls_total",
        help="Groups judged, by oracle and outcome",
        kind="counter",
        labels={"kind": "oracle", "status": "ok"},
    ),
    Series(
        metric="oracle_failed",
        name="onlinerl_oracle_failed_ratio",
        help="Share of the latest groups of a phase that the oracle could not judge",
        labels={"phase": None},
    ),
    Series(
        metric="pairs_dropped",
        name="onlinerl_pairs_dropped_total",
        help="Candidate pairs not trained on",
        kind="counter",
        labels={"reason": None},
    ),
    Series(metric="pair_yield", name="onlinerl_pair_yield_ratio", help="Share of prompts with at least one pair"),
    Series(
        metric="rollouts_rejected",
        name="onlinerl_rollouts_rejected_total",
        help="Training responses thrown away",
        kind="counter",
        labels={"reason": None},
    ),
    Series(
        metric="rollouts_truncated",
        name="onlinerl_rollouts_truncated_ratio",
        help="Share of training responses that hit the length limit",
    ),
    Series(
        metric="idle_iterations",
        name="onlinerl_idle_iterations",
        help="Iterations in a row that gave nothing to learn",
    ),
    Series(metric="zero_spread", name="onlinerl_zero_spread_ratio", help="Share of groups whose responses all score the same"),
    Series(
        metric="weight_sync_seconds", name="onlinerl_weight_sync_seconds", help="Wall time of the latest push and its proof"
    ),
    Series(metric="weight_sync_bytes", name="onlinerl_weight_sync_bytes", help="Bytes of weights of the latest push"),
    Series(
        metric="tracker_failures",
        name="onlinerl_tracker_failures",
        help="Calls to a tracker that failed, in this process",
        labels={"tracker": None},
    ),
    Series(metric="weight_sync_ok", name="onlinerl_weight_sync_ok", help="1 if the latest push was proved to have arrived"),
    Series(
        metric="weight_sync_failures",
        name="onlinerl_weight_sync_failures_total",
        help="Pushes that failed or could not be proved to have arrived",
        kind="counter",
    ),
    Series(
        metric="weight_sync_canary",
        name="onlinerl_weight_sync_canary_nats",
        help="|log-prob difference| between learner and engine on the canary of the latest push",
    ),
    Series(
        metric="logp_mismatch",
        name="onlinerl_logprob_mismatch_nats",
        help="|log-prob difference| between learner and engine at equal weights",
        labels={"stat": "mean"},
    ),
    Series(
        metric="logp_mismatch_k3", name="onlinerl_logprob_mismatch_k3_nats", help="KL divergence of the learner from the engine"
    ),
    Series(metric="loss", name="onlinerl_loss", help="Training loss, as last reported"),
    Series(metric="grad_norm", name="onlinerl_grad_norm", help="Gradient norm, as last reported"),
    Series(
        metric="skipped_steps",
        name="onlinerl_skipped_steps",
        help="Optimizer steps of the latest iteration that were skipped because a gradient was not finite",
    ),
    Series(metric="learning_rate", name="onlinerl_learning_rate", help="Learning rate, as last reported"),
    Series(metric="lr", name="onlinerl_learning_rate", help="Learning rate, as last reported"),
)

_BUCKETS = (1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000)


class PrometheusTracker(Tracker):
    """Serves the figures of one run at `http://<host>:<port>/metrics`. Every series carries the label `run`.

    Args:
        run: name of the run.
        host: address to listen on.
        port: port to listen on, or the next free one after it; 0 takes any free one. `port` tells which.
        oracle_kinds: values of the label `kind` of `oracle_calls`, whose counters start at 0.
        drop_reasons: values of the label `reason` of `pairs_dropped`, whose counters start at 0.
        discovery: folder in which Prometheus finds the run, see `_discovery`; None writes no files.
        advertised: address that a scraper reaches `host` at, if that is not `host` itself.

    Raises:
        ConfigError: if no port is free, the address is not one of this machine, or the folder cannot be written.
    """

    def __init__(
        self,
        run: str,
        *,
        host: str = "127.0.0.1",
        port: int = 9470,
        oracle_kinds: Sequence[str] = ("oracle",),
        drop_reasons: Sequence[str] = (),
        discovery: Path | None = None,
        advertised: str | None = None,
    ) -> None:
        self._run = run
        self._registry = CollectorRegistry()
        self._collectors: dict[str, Any] = {}
        self._declare()
        self._start_at_zero(oracle_kinds, drop_reasons)
        self._show_state("running")
        self._server, self._thread = _serve(host, port, self._registry)
        self.port: int = self._server.server_port
        self._discovery: Discovery | None = None
        if discovery is not None:
            try:
                self._discovery = Discovery(discovery, run, f"{advertised or host}:{self.port}")
                self._discovery.started()
            except OSError as error:
                self.close()
                raise ConfigError(
                    f"{discovery} cannot be written: {error.strerror}",
                    field="runs",
                    fix="choose another directory, or set metrics.prometheus=false",
                ) from error

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Show that the phase is running."""
        self._child("onlinerl_iteration").set(iteration)
        self._show_phase(phase, running=True)

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """Note that the run is alive."""
        self._child("onlinerl_last_progress_timestamp_seconds", role=ROLE).set(time.time())

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Show that it is not running any more."""
        self._show_phase(phase, running=False)
        if phase == "commit":
            self._child("onlinerl_iteration_end_timestamp_seconds").set(time.time())

    def log(self, metrics: Iterable[Metric]) -> None:
        """Export the metrics that the table knows."""
        for metric in metrics:
            self._child("onlinerl_attempt").set(metric.attempt)
            for series in (s for s in TABLE if s.metric == metric.name):
                self._export(series, metric)

    def counters(self) -> dict[str, float]:
        """All counters as {series: value}, for `restore`."""
        return {
            _text(sample.name, {k: v for k, v in sample.labels.items() if k != "run"}): sample.value
            for family in self._registry.collect()
            if family.type == "counter"
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def restore(self, counters: Mapping[str, float]) -> None:
        """Let counters continue where an earlier process stopped; keys as given by `counters` or `totals`, unknown ones are ignored."""
        for text, value in counters.items():
            for family in text_string_to_metric_families(f"{text} {value}\n"):
                for sample in family.samples:
                    if sample.name in self._collectors and value > 0:
                        self._child(sample.name, **sample.labels).inc(value)

    def ended(self, state: str) -> None:
        """Export how the run ended, and leave it where it survives this process."""
        self._show_state(state)
        if self._discovery is not None:
            # All is over for good in a finished run: an alert about its last figures would never go away.
            kept = None if state != "finished" else ["onlinerl_run_state", "onlinerl_build_info", "onlinerl_iteration"]
            figures = self._registry if kept is None else self._registry.restricted_registry(kept)
            with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
                self._discovery.ended(state, generate_latest(figures))

    def close(self) -> None:
        """Stop serving. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def _declare(self) -> None:
        own: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("onlinerl_build_info", "Version of onlinerl", ("version",)),
            ("onlinerl_iteration", "Iteration being worked on", ()),
            ("onlinerl_attempt", "How often the run was resumed", ()),
            ("onlinerl_iteration_end_timestamp_seconds", "When the latest iteration was committed", ()),
            ("onlinerl_last_progress_timestamp_seconds", "When something last moved", ("role",)),
            ("onlinerl_run_state", "1 for the state that the run is in", ("state",)),
            ("onlinerl_phase", "1 for every phase that is running", ("role", "phase")),
            ("onlinerl_metric_insufficient", "1 if the latest value was measured on too few prompts to be trusted", ("name",)),
        )
        for name, text, labels in own:
            self._collectors[name] = Gauge(name, text, ("run", *labels), registry=self._registry)
        # Named after what was not finite; excluded from every figure, never replaced by 0.
        nonfinite = "onlinerl_nonfinite_total"
        self._collectors[nonfinite] = Counter(
            nonfinite, "Values that were NaN or infinite", ("run", "reason"), registry=self._registry
        )
        for series in TABLE:
            labels = ("run", *series.labels)
            if series.name not in self._collectors:  # several metrics may share a name and differ in a label
                self._collectors[series.name] = _collector(series, labels, self._registry)
            if series.bounds:
                text = f"{series.help}: 95 % interval"
                self._collectors[series.bounds] = Gauge(series.bounds, text, (*labels, "bound"), registry=self._registry)

    def _start_at_zero(self, oracle_kinds: Sequence[str], drop_reasons: Sequence[str]) -> None:
        # A counter that first appears with a value above 0 has no rate at that point.
        self._child("onlinerl_build_info", version=__version__).set(1)
        for series in TABLE:
            if series.kind == "counter" and not series.labels:
                self._child(series.name)
        for kind in oracle_kinds:
            for status in STATUSES:
                self._child("onlinerl_oracle_calls_total", kind=kind, status=status)
        for reason in REJECTED:
            self._child("onlinerl_rollouts_rejected_total", reason=reason)
        for reason in drop_reasons:
            self._child("onlinerl_pairs_dropped_total", reason=reason)
        for phase in graph.NAMES:
            self._show_phase(phase, running=False)

    def _show_phase(self, phase: str, *, running: bool) -> None:
        self._child("onlinerl_phase", role=ROLE, phase=phase).set(running)
        self._child("onlinerl_last_progress_timestamp_seconds", role=ROLE).set(time.time())

    def _show_state(self, current: str) -> None:
        for state in STATES:
            self._child("onlinerl_run_state", state=state).set(state == current)

    def _export(self, series: Series, metric: Metric) -> None:
        self._child("onlinerl_metric_insufficient", name=metric.name).set(metric.insufficient)
        labels = _labels(series, metric.labels)
        if labels is None:
            return
        if not math.isfinite(metric.value):
            self._child("onlinerl_nonfinite_total", reason=metric.name).inc()
        child = self._child(series.name, **labels)
        if series.kind == "gauge":
            child.set(metric.value)
        elif math.isfinite(metric.value) and metric.value >= 0:
            (child.inc if series.kind == "counter" else child.observe)(metric.value)
        if series.bounds:
            for bound, value in (("lower", metric.ci_low), ("upper", metric.ci_high)):
                self._child(series.bounds, **labels, bound=bound).set(math.nan if value is None else value)

    def _child(self, name: str, /, **labels: str) -> Any:
        return self._collectors[name].labels(run=self._run, **labels)


def _serve(host: str, port: int, registry: CollectorRegistry) -> tuple[Any, Any]:
    """Listen on the port or, if other runs of this machine have it, on the next free one."""
    for candidate in range(port, min(port + PORTS, 65536)):
        try:
            return start_http_server(candidate, host, registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError(
                f"cannot listen on {host}:{candidate}: {error.strerror}",
                field="metrics.prometheus_host",
                fix="use an address of this machine, and a port that this user may open",
            ) from error
    raise ConfigError(
        f"port {port} of {host} and the {PORTS - 1} after it are in use",
        field="metrics.prometheus_port",
        fix="choose another port, 0 for any free one, or set metrics.prometheus=false",
    )


def totals(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Counters as the records of metrics.jsonl add up to, for `PrometheusTracker.restore` after a resume."""
    counters = {s.metric: s for s in TABLE if s.kind == "counter"}
    sums: dict[str, float] = {}
    for record in records:
        series, value = counters.get(record["name"]), record["value"]
        labels = _labels(series, record["labels"]) if series else None
        if series and labels is not None and value is not None and value >= 0:
            key = _text(series.name, labels)
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _labels(series: Series, given: Mapping[str, str]) -> dict[str, str] | None:
    """The labels of a metric's series; None if it lacks one that it must carry."""
    labels = {label: given.get(label, default) for label, default in series.labels.items()}
    return {k: str(v) for k, v in labels.items()} if None not in labels.values() else None


def _text(name: str, labels: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    inside = ",".join(f'{k}="{quoted(v)}"' for k, v in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


def _collector(series: Series, labels: Sequence[str], registry: CollectorRegistry) -> Any:
    if series.kind == "histogram":
        return Histogram(series.name, series.help, labels, buckets=_BUCKETS, registry=registry)
    return (Counter if series.kind == "counter" else Gauge)(series.name, series.help, labels, registry=registry)
