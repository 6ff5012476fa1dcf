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

from onlinerl.trackers.prometheus import PrometheusTracker
from onlinerl.types import Metric

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DASHBOARD = json.loads((DASHBOARDS / "onlinerl.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]

NODE_EXPORTER = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
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
        one("learning_rate", 1e-6),
        one("weight_sync_seconds", 0.2),
        one("weight_sync_bytes", 5e8),
        one("weight_sync_ok", 1.0),
        one("oracle_failed", 1 / 64, phase="label"),
        one("oracle_replies_failed", 1 / 640, phase="label", kind="all"),
        one("skipped_steps", 0.0),
        one("weight_sync_canary", 1e-4),
        one("reward", 0.5, (0.4, 0.6), oracle="proxy"),
        one("length", 24.0),
        one("truncated", 0.05),
        *(one(name, 1.5, (1.0, 2.0), estimator=e) for name in ("kl_ref", "kl_prev") for e in ("k1", "k3")),
        *(one("win_rate", 0.6, (0.5, 0.7), opponent=o, control="raw") for o in ("base", "prev")),
        one("component_score", 0.4, (0.3, 0.5), component="watch"),
        one("component_win_rate", 0.55, (0.45, 0.65), component="watch"),
        *(one("logp_mismatch", 0.01, stat=s) for s in ("mean", "p99", "max")),
        one("logp_mismatch_k3", 1e-4),
    ]


class Server:
    """A Prometheus server with our configuration, adapted to another place of the runs, and node_exporter if it is installed."""

    def __init__(self, folder: Path, runs: Path) -> None:
        config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (found,) = config["scrape_configs"][0]["file_sd_configs"]
        assert found["files"] == ["../runs/.prometheus/*.json"], "where the default `runs` is"
        found |= {"files": [str(runs / ".prometheus" / "*.json")], "refresh_interval": "1s"}
        self.processes: list[subprocess.Popen] = []
        self.log = folder / "log"
        if NODE_EXPORTER is not None:
            address = f"127.0.0.1:{free_port()}"
            scrape = {"job_name": "node", "honor_labels": True, "static_configs": [{"targets": [address]}]}
            config["scrape_configs"].append(scrape)
            options = ["--collector.disable-defaults", "--collector.textfile", f"--web.listen-address={address}"]
            (runs / ".prometheus").mkdir(parents=True, exist_ok=True)
            self._start([NODE_EXPORTER, *options, f"--collector.textfile.directory={runs / '.prometheus'}"])
        rules = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())
        for rule in rules["groups"][0]["rules"]:  # how long something must last is for promtool, whose time is virtual
            rule.pop("for", None)
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        config_file, data = f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"
        self.process = self._start(["prometheus", config_file, data, f"--web.listen-address={self.address}"])

    def _start(self, command: list[str]) -> subprocess.Popen:
        with self.log.open("ab") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        return self.processes[-1]

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
        for process in self.processes:
            process.kill()
            process.wait(timeout=10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Has scraped two iterations, some seconds apart, of a run that is now sampling."""
    runs = tmp_path_factory.mktemp("runs")
    found = {"discovery": runs / ".prometheus"}
    exporter = PrometheusTracker("demo", port=0, oracle_kinds=["sentiment"], drop_reasons=["tie"], **found)
    server = None
    try:
        server = Server(tmp_path_factory.mktemp("prometheus"), runs)
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


@needs_promtool
def test_promtool_accepts_the_files():
    subprocess.run(["promtool", "check", "rules", DASHBOARDS / "alerts.yml"], check=True, capture_output=True)
    subprocess.run(["promtool", "check", "config", DASHBOARDS / "prometheus.yml"], check=True, capture_output=True)


DOUBTFUL = 'onlinerl_metric_insufficient{run="r",name="%s"}'
ORACLE = 'onlinerl_oracle_failed_ratio{run="r",phase="label"}'
SAME = 'onlinerl_anchor_agreement_bound_ratio{run="r",bound="upper"}'
CUT = 'onlinerl_finish_ratio{run="r",reason="length"}'
UP = 'up{job="onlinerl",run="r",run_state="%s"}'
STATE = 'onlinerl_run_state{run="r",state="%s"}'
LAST = 'onlinerl_last_progress_timestamp_seconds{run="r",role="controller"}'
REPLICAS = 'onlinerl_replicas{run="r",state="%s"}'
LEAST = 'onlinerl_replicas_least{run="r"}'
LOST = 'onlinerl_replica_deaths_total{run="r",reason="died"}'
K3 = 'onlinerl_logprob_mismatch_k3_nats{run="r"}'
# alert -> (series with their values each minute, labels of the alert besides run and severity, does it fire after 45 and 90 minutes?)
CASES = [
    ("OnlineRLRunFailed", {UP % "failed": "0x90"}, {}, (True, True)),
    ("OnlineRLRunFailed", {STATE % "failed": "1x90", STATE % "running": "0x90"}, {}, (True, True)),
    ("OnlineRLRunFailed", {STATE % "failed": "0x90", UP % "running": "1x90"}, {}, (False, False)),
    ("OnlineRLRunDied", {UP % "running": "1x60 0x40", 'onlinerl_build_info{run="r"}': "1x60 stale"}, {}, (False, True)),
    ("OnlineRLRunDied", {UP % "running": "1x90", 'onlinerl_build_info{run="other"}': "1x90"}, {}, (True, True)),
    ("OnlineRLRunDied", {UP % "running": "1x90", 'onlinerl_build_info{run="r"}': "1x90"}, {}, (False, False)),
    ("OnlineRLRunDied", {UP % "failed": "0x90"}, {}, (False, False)),
    ("OnlineRLRunNotResumed", {UP % "interrupted": "0x90"}, {}, (False, True)),
    ("OnlineRLRunNotResumed", {STATE % "interrupted": "1x90"}, {}, (False, True)),
    ("OnlineRLNoRun", {"up{job='onlinerl',run='r'}": "1x60"}, None, (False, True)),
    ("OnlineRLStalled", {LAST: "0x90", STATE % "running": "1x90"}, {"role": "controller"}, (True, True)),
    ("OnlineRLStalled", {LAST: "0x90", STATE % "running": "0x90"}, {"role": "controller"}, (False, False)),
    ("OnlineRLPushFailed", {'onlinerl_weight_sync_ok{run="r"}': "1x60 0x40"}, {}, (False, True)),
    (
        "OnlineRLFleetTooSmall",
        {REPLICAS % "serving": "2x60 0x40", REPLICAS % "dead": "0x60 2x40", LEAST: "1x90", STATE % "running": "1x90"},
        {},
        (False, True),
    ),
    (
        "OnlineRLFleetTooSmall",
        {REPLICAS % "serving": "1x90", REPLICAS % "dead": "1x90", LEAST: "1x90", STATE % "running": "1x90"},
        {},
        (False, False),
    ),
    ("OnlineRLFleetTooSmall", {REPLICAS % "serving": "0x90", LEAST: "1x90", STATE % "running": "0x90"}, {}, (False, False)),
    ("OnlineRLReplicaLost", {LOST: "0x70 1x30"}, {}, (False, True)),
    ("OnlineRLReplicaLost", {LOST: "2x90"}, {}, (False, False)),
    ("OnlineRLSamplerMismatch", {K3: "0.001x60 0.02x40"}, {}, (False, True)),
    ("OnlineRLSamplerMismatch", {K3: "0.02x90", DOUBTFUL % "logp_mismatch_k3": "1x90"}, {}, (False, False)),
    ("OnlineRLSkippedSteps", {'onlinerl_skipped_steps{run="r"}': "0x60 1x40"}, {}, (False, True)),
    ("OnlineRLOracleErrors", {ORACLE: "0.04x60 0.06x40"}, {"phase": "label"}, (False, True)),
    ("OnlineRLOracleDrift", {SAME: "0.99x60 0.9x40"}, {"bound": "upper"}, (False, True)),
    ("OnlineRLOracleDrift", {SAME: "0.9x90", DOUBTFUL % "anchor_agreement": "1x90"}, {"bound": "upper"}, (False, False)),
    ("OnlineRLBudget", {'onlinerl_budget_spent_ratio{run="r",kind="usd"}': "0.5x60 0.95x40"}, {"kind": "usd"}, (False, True)),
    ("OnlineRLTruncated", {CUT: "0.1x60 0.3x40"}, {"reason": "length"}, (False, True)),
    ("OnlineRLTruncated", {CUT: "0.3x90", DOUBTFUL % "truncated": "1x90"}, {"reason": "length"}, (False, False)),
    ("OnlineRLLowPairYield", {'onlinerl_pair_yield_ratio{run="r"}': "0.5x60 0.05x40"}, {}, (False, True)),
    (
        "OnlineRLLowPairYield",
        {'onlinerl_pair_yield_ratio{run="r"}': "0x90", DOUBTFUL % "pair_yield": "1x90"},
        {},
        (False, False),
    ),
]


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path):
    rules = {r["alert"]: r for r in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]}
    fires = {alert for alert, *_, when in CASES if any(when)}
    assert set(rules) == fires
    only = tmp_path / "alerts.yml"
    # Without annotations: promtool compares them too, and they are prose.
    kept = [{k: v for k, v in rule.items() if k != "annotations"} for rule in rules.values()]
    only.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": kept}]}))
    tests = []
    for alert, series, labels, when in CASES:
        own = {"run": "r", **labels} if labels is not None else {"job": "onlinerl"}
        fired = [{"exp_labels": {**own, "severity": rules[alert]["labels"]["severity"]}}]
        expected = [
            {"eval_time": time, "alertname": alert, "exp_alerts": fired if fire else []}
            for time, fire in zip(("45m", "90m"), when, strict=True)
        ]
        values = [{"series": name, "values": text} for name, text in series.items()]
        tests.append({"interval": "1m", "input_series": values, "alert_rule_test": expected})
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(only)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- real runs ---


def test_a_failed_push_is_exported_before_it_ends_the_run_and_counted_after_a_resume(toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, iterations=1)
    assert warm_cli("run", config, log=tmp_path / "log", broken="push").returncode == 1
    left = (tmp_path / "runs" / ".prometheus" / "toy.prom").read_text()
    assert 'onlinerl_weight_sync_ok{run="toy"} 0.0' in left
    assert 'onlinerl_weight_sync_failures_total{run="toy"} 1.0' in left
    assert 'onlinerl_run_state{run="toy",state="failed"} 1.0' in left
    assert warm_cli("resume", tmp_path / "runs" / "toy", log=tmp_path / "log", broken="push").returncode == 1
    left = (tmp_path / "runs" / ".prometheus" / "toy.prom").read_text()
    assert 'onlinerl_weight_sync_failures_total{run="toy"} 2.0' in left


@needs_prometheus
@pytest.mark.skipif(NODE_EXPORTER is None, reason="needs the program node_exporter (Debian: prometheus-node-exporter)")
def test_runs_side_by_side_are_found_and_every_failure_is_an_alert(toy_config, warm_cli, tmp_path):
    """Two runs at once, of which one is killed; and one that fails in each way whose last figure nobody could have scraped."""
    runs, port = tmp_path / "runs", free_port()
    server = Server(tmp_path, runs)

    def config(name: str, **more: object) -> Path:
        own = {"name": name, "metrics.prometheus_port": port, "iterations": 1, "oracle.name": "python"}
        return toy_config(tmp_path, {**own, "oracle.function": "hooks.judge", **more}, file=f"{name}.yaml")

    def alert(name: str, run: str) -> str:
        return f'ALERTS{{alertname="OnlineRL{name}",alertstate="firing",run="{run}"}}'

    try:
        server.wait_for("absent(up{job='onlinerl'})")
        # The first answer to what was sampled is where they wait: one judgement before it tries the oracle.
        waiting = {name: (tmp_path / f"{name}.log") for name in ("one", "two")}
        alive = {n: warm_cli.start("run", config(n), log=log, wait=["judge", 2]) for n, log in waiting.items()}
        for log in waiting.values():
            warm_cli.wait_for(log, "waiting")
        for name in alive:
            server.wait_for(
                f'up{{run="{name}",run_state="running"}} == 1 and on (run) onlinerl_run_state{{state="running"}} == 1'
            )
        (ports,) = server.query('count(count by (instance) (up{job="onlinerl"}))')
        assert ports["value"][1] == "2"
        assert server.query('onlinerl_build_info{exported_run!=""} or onlinerl_build_info{run_state!=""}') == []
        assert not server.query('ALERTS{alertname=~"OnlineRLRun.*"}')
        said = "".join((tmp_path / f"{out}stdout").read_text() for _, out in alive.values())
        assert f"metrics: http://127.0.0.1:{port}/metrics" in said
        assert f"/metrics (port {port} is taken)" in said

        alive["one"][0].kill()
        alive["two"][0].terminate()
        for process, _ in alive.values():
            process.join(30)
        for broken in ("push", "logprobs", "step"):
            more = {"training.max_skipped_steps": 0} if broken == "step" else {}
            ended = warm_cli("run", config(broken, **more), log=tmp_path / f"{broken}.log", broken=broken)
            assert ended.returncode == 1, ended.message
        ended = warm_cli("run", config("silent", max_failed_labels=0.0), log=tmp_path / "silent.log", down=["judge", 2])
        assert ended.returncode == 1, ended.message
        assert warm_cli("run", config("good"), log=tmp_path / "good.log").returncode == 0

        server.wait_for(alert("RunDied", "one"))
        server.wait_for(alert("RunNotResumed", "two"))
        for run, name in (
            ("push", "PushFailed"),
            ("logprobs", "SamplerMismatch"),
            ("step", "SkippedSteps"),
            ("silent", "OracleErrors"),
        ):
            server.wait_for(alert("RunFailed", run))
            server.wait_for(alert(name, run))
        server.wait_for('onlinerl_run_state{run="good",state="finished"} == 1')
        server.wait_for('absent(up{run="good"})')  # a run that has finished is not looked for any more
        server.wait_for('absent(ALERTS{run="good"})')
    finally:
        server.stop()
