"""Live figures for Prometheus: the series that the catalogue of metrics (onlinerl/metrics) has, with the values that are logged.

Differences from a plain reading of metrics.jsonl: counters add up what each record reports; a figure measured on too few prompts
is exported with its real value and `onlinerl_metric_insufficient{name=...}` is 1 beside it, so that small demonstrations show
something and alert rules can tell. Metrics without a series are not exported.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field

from onlinerl import __version__, graph
from onlinerl.errors import ConfigError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import Series
from onlinerl.network import outside_address
from onlinerl.protocols.tracker import Tracked, Tracker, TrackerConfig
from onlinerl.trackers._discovery import Discovery
from onlinerl.types import Metric

__all__ = ["Prometheus", "PrometheusTracker", "totals"]

ROLE = "controller"
STATES = ("running", "finished", "failed", "interrupted")
PORTS = 100
"""How many ports to try, from the configured one on."""
ANY = "0.0.0.0"
"""What no host means."""


_BUCKETS = (1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000)


class Prometheus(TrackerConfig):
    """Figures at an address that a scraper reads."""

    name: str = "prometheus"
    host: str = "127.0.0.1"
    """Address to listen on; a scraper on another machine needs one that it can reach, or 0.0.0.0."""
    port: int = Field(9470, ge=0, le=65535)
    """If another run has it, the next free one; 0 takes any."""

    def check(self) -> None:
        """The address is one of this machine, and the port one that this user may open."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host or ANY, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # another run has it: this one takes the next free port
                return
            wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            raise ConfigError(
                f"{self.host}:{self.port} cannot be listened on: {error.strerror}",
                field="metrics.prometheus_host" if wrong_host else "metrics.prometheus_port",
                fix=("give an address of this machine" if wrong_host else "choose another port, 0 for any free one")
                + ", or set metrics.prometheus=false",
            ) from None

    def open(self, run: Tracked) -> PrometheusTracker:
        """Serve, with counters that go on where an earlier attempt stopped, and say where."""
        advertised = outside_address() if self.host in (ANY, "::", "") else self.host
        exporter = PrometheusTracker(
            run.name,
            host=self.host,
            port=self.port,
            discovery=run.directory.parent / ".prometheus",
            advertised=advertised,
            catalogue=run.catalogue,
        )
        exporter.restore(totals(run.earlier, run.catalogue))
        taken = f" (port {self.port} is taken)" if self.port not in (0, exporter.port) else ""
        run.console.print(f"metrics: http://{advertised}:{exporter.port}/metrics{taken}", highlight=False)
        return exporter


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
        catalogue: what is exported; with what the algorithm of the run declares.

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
        catalogue: Catalogue = CATALOGUE,
    ) -> None:
        self._run = run
        self._catalogue = catalogue
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
        """Export the metrics that have a series."""
        for metric in metrics:
            self._child("onlinerl_attempt").set(metric.attempt)
            for series in self._catalogue[metric.name].series if metric.name in self._catalogue else ():
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
        for series in self._catalogue.exported():
            labels = ("run", *series.labels)
            if series.name not in self._collectors:  # several metrics may share a name and differ in a label
                self._collectors[series.name] = _collector(series, labels, self._registry)
            if series.bounds:
                text = f"{series.help}: 95 % interval"
                self._collectors[series.bounds] = Gauge(series.bounds, text, (*labels, "bound"), registry=self._registry)

    def _start_at_zero(self, oracle_kinds: Sequence[str], drop_reasons: Sequence[str]) -> None:
        # A counter that first appears with a value above 0 has no rate at that point.
        self._child("onlinerl_build_info", version=__version__).set(1)
        told = {"kind": oracle_kinds, "reason": drop_reasons}
        for definition, series in self._catalogue.series():
            if series.kind == "counter":
                known = [
                    definition.labels.get(label) or told.get(label) or filter(None, [default])
                    for label, default in series.labels.items()
                ]
                for values in product(*known):
                    self._child(series.name, **dict(zip(series.labels, values, strict=True)))
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
            return start_http_server(candidate, host or ANY, registry)
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


def totals(records: Iterable[Mapping[str, Any]], catalogue: Catalogue = CATALOGUE) -> dict[str, float]:
    """Counters as the records of metrics.jsonl add up to, for `PrometheusTracker.restore` after a resume."""
    counters = {definition.name: series for definition, series in catalogue.series() if series.kind == "counter"}
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
