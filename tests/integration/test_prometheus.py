"""The shipped dashboard, scrape configuration and alert rules work with a real Prometheus that scrapes the real exporter."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from onlinerl.trackers.prometheus import TABLE, PrometheusTracker
from onlinerl.types import Metric

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DASHBOARD = json.loads((DASHBOARDS / "onlinerl.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the program promtool (part of prometheus)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def iteration(number: int) -> list[Metric]:
    """What one iteration of a small run logs."""

    def one(name, value, interval=None, **labels):
        low, high = interval or (None, None)
        return Metric(
            name=name, value=value, unit="", iteration=number, n=100, ci_low=low, ci_high=high, insufficient=True, labels=labels
        )

    return [
        one("prompts_sampled", 64.0),
        one("generated_tokens", 2048.0),
        one("trained_tokens", 4096.0),
        one("oracle_calls", 63.0, kind="sentiment", status="ok"),
        one("oracle_calls", 1.0, kind="sentiment", status="failed"),
        one("zero_spread", 0.1, (0.0, 0.2)),
        one("pair_yield", 0.8, (0.7, 0.9)),
        one("pairs_dropped", 3.0, reason="tie"),
        *(one("phase_seconds", s, phase=p) for p, s in (("sample", 2.0), ("label", 0.5), ("train", 3.0), ("sync", 0.2))),
        one("loss", 0.6),
        one("grad_norm", 1.5),
        one("lr", 1e-6),
        one("weight_sync_seconds", 0.2),
        one("weight_sync_bytes", 5e8),
        one("weight_sync_ok", 1.0),
        one("weight_sync_canary", 1e-4),
        one("reward", 0.5, (0.4, 0.6), oracle="proxy"),
        one("length", 24.0),
        one("truncated", 0.05),
        *(one(name, 1.5, (1.0, 2.0), estimator=e) for name in ("kl_ref", "kl_prev") for e in ("k1", "k3")),
        *(one("win_rate", 0.6, (0.5, 0.7), opponent=o, control="raw") for o in ("base", "prev")),
        *(one("logp_mismatch", 0.01, stat=s) for s in ("mean", "p99", "max")),
        one("logp_mismatch_k3", 1e-4),
    ]


class Server:
    """A Prometheus server with our configuration, adapted to the exporter's port."""

    def __init__(self, folder: Path, target_port: int) -> None:
        config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
        assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:9470"], "the default port"
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target_port}"]
        config["rule_files"] = [str(DASHBOARDS / name) for name in config["rule_files"]]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, endpoint: str, **parameters: str):
        url = f"http://{self.address}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.loads(reply.read())["data"]

    def query(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)["result"]

    def wait_for(self, expression: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                if self.query(expression):
                    return
            except (urllib.error.URLError, ConnectionError):
                pass  # still starting
            time.sleep(0.25)
        raise AssertionError(f"no data for {expression} after {timeout} s:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Has scraped two iterations, some seconds apart, of a run that is now sampling."""
    exporter = PrometheusTracker("demo", port=0, oracle_kinds=["sentiment"], drop_reasons=["tie"])
    server = None
    try:
        server = Server(tmp_path_factory.mktemp("prometheus"), exporter.port)
        server.wait_for('onlinerl_generated_tokens_total{run="demo"} == 0')
        for number in (1, 2):
            exporter.phase_started(number, "sample", 64, "prompts")
            exporter.log(iteration(number))
            server.wait_for(f'onlinerl_generated_tokens_total{{run="demo"}} == {2048 * number}')
        yield server
    finally:
        if server is not None:
            server.stop()
        exporter.close()


def substituted(expression: str) -> str:
    """As Grafana sends it."""
    return expression.replace("$__rate_interval", "1m").replace("$run", "demo")


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{t}-{i}" for i, (t, _) in enumerate(QUERIES)])
def test_every_query_of_the_dashboard_returns_data(server, title, expression):
    found = server.query(substituted(expression))
    assert found, f"{title}: {expression}"
    assert all(series["value"][1] != "NaN" for series in found if "bound" not in series["metric"]), (title, found)


@needs_prometheus
def test_figures_arrive_with_their_values(server):
    def value(expression):
        (series,) = server.query(expression)
        return float(series["value"][1])

    assert value('onlinerl_kl_nats{run="demo",reference="initial",estimator="k3"}') == 1.5
    assert value('onlinerl_win_rate_bound_ratio{run="demo",opponent="base",bound="lower"}') == 0.5
    assert value('onlinerl_oracle_calls_total{run="demo",status="failed"}') == 2
    assert value("rate(onlinerl_generated_tokens_total[1m])") > 0
    assert value('onlinerl_phase{run="demo",phase="sample"}') == 1


@needs_prometheus
def test_the_run_variable_of_the_dashboard_lists_the_run(server):
    variable = next(v for v in DASHBOARD["templating"]["list"] if v["name"] == "run")
    assert variable["definition"] == "label_values(onlinerl_build_info, run)"
    assert server.get("label/run/values", **{"match[]": "onlinerl_build_info"}) == ["demo"]


@needs_prometheus
def test_the_alert_rules_load_and_a_healthy_run_raises_none(server):
    deadline = time.monotonic() + 30
    while (health := _rule_health(server)) != {"ok"} and time.monotonic() < deadline:
        time.sleep(0.25)  # "unknown" until the first evaluation
    assert health == {"ok"}
    assert server.query('ALERTS{run="demo"}') == []


def _rule_health(server: Server) -> set[str]:
    return {rule["health"] for group in server.get("rules")["groups"] for rule in group["rules"]}


def test_the_dashboard_and_the_rules_name_only_series_that_exist():
    own = {"iteration", "phase", "last_progress_timestamp_seconds", "metric_insufficient", "build_info"}
    known = {s.name for s in TABLE} | {s.bounds for s in TABLE if s.bounds} | {f"onlinerl_{name}" for name in own}
    known |= {f"onlinerl_phase_duration_seconds_{part}" for part in ("sum", "count")}
    rules = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]
    for expression in [e for _, e in QUERIES] + [rule["expr"] for rule in rules]:
        words = "".join(c if c.isalnum() or c == "_" else " " for c in expression).split()
        assert {w for w in words if w.startswith("onlinerl_")} <= known, expression


@needs_promtool
def test_promtool_accepts_the_files():
    subprocess.run(["promtool", "check", "rules", DASHBOARDS / "alerts.yml"], check=True, capture_output=True)
    subprocess.run(["promtool", "check", "config", DASHBOARDS / "prometheus.yml"], check=True, capture_output=True)


# alert -> (series with their values each minute, the metric whose `insufficient` keeps it silent)
CALLS = 'onlinerl_oracle_calls_total{run="r",kind="k",status="%s"}'
FIRING = {
    "OnlineRLTruncated": ({'onlinerl_finish_ratio{run="r",reason="length"}': "0.3x60"}, "truncated"),
    "OnlineRLSamplerMismatch": ({'onlinerl_logprob_mismatch_k3_nats{run="r"}': "0.02x60"}, "logp_mismatch_k3"),
    "OnlineRLLowPairYield": ({'onlinerl_pair_yield_ratio{run="r"}': "0.05x60"}, "pair_yield"),
    "OnlineRLOracleErrors": ({CALLS % "ok": "0+9x60", CALLS % "failed": "0+1x60"}, None),
    "OnlineRLStalled": ({'onlinerl_last_progress_timestamp_seconds{run="r",role="controller"}': "0x60"}, None),
}


@needs_promtool
@pytest.mark.parametrize("alert", FIRING)
def test_each_alert_fires_when_it_should_and_not_on_too_few_prompts(alert, tmp_path):
    rules = {r["alert"]: r for r in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]}
    assert set(rules) == set(FIRING)
    only = tmp_path / "alerts.yml"
    # Without annotations: promtool compares them too, and they are prose.
    kept = {k: v for k, v in rules[alert].items() if k != "annotations"}
    only.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [kept]}]}))
    series, doubtful = FIRING[alert]
    identity = {"role": "controller"} if alert == "OnlineRLStalled" else {}
    identity |= {"reason": "length"} if alert == "OnlineRLTruncated" else {}
    fired = [{"exp_labels": {"run": "r", "severity": rules[alert]["labels"]["severity"], **identity}}]

    def case(extra, expected):
        values = [{"series": name, "values": text} for name, text in {**series, **extra}.items()]
        tests = [{"eval_time": "45m", "alertname": alert, "exp_alerts": expected}]
        return {"interval": "1m", "input_series": values, "alert_rule_test": tests}

    cases = [case({}, fired)]
    if doubtful:
        cases.append(case({f'onlinerl_metric_insufficient{{run="r",name="{doubtful}"}}': "1x60"}, []))
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(only)], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
