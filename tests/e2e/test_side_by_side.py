"""Phases that run side by side: that they do, that the run is the same one, and how such a run ends when a phase fails."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from values import label

from onlinerl.controller.phases import annotate
from onlinerl.engines.toy import ToyEngine
from onlinerl.learners.toy import ToyLearner
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

FAILED = 1
AS_BY_DEFAULT = {"schedule.stream": None, "schedule.evaluate_beside": None}
SCORES = "return [[float(len(set(r.split()))) for r in q['responses']] for q in queries]"
PATIENCE_S = 30


@pytest.fixture
def engine(monkeypatch):
    """Lets a test wait, or fail, in the middle of a sampling phase: `hold["sample" or "answer"]` is called before its last group."""
    hold: dict[str, object] = {}

    def generate(self, requests, sampling, original=ToyEngine.generate):
        requests = list(requests)
        phase = "answer" if len(requests[0].seeds) == 1 else "sample"
        for i, [group] in enumerate(original(self, requests, sampling)):
            if i == len(requests) - 1 and phase in hold:
                hold[phase](self.version)
            yield [group]

    monkeypatch.setattr(ToyEngine, "generate", generate)
    return hold


def waits_for(event: threading.Event):
    def wait(version: int) -> None:
        assert event.wait(PATIENCE_S), "nothing ran beside it"

    return wait


def test_labels_follow_the_rollouts(toy_config, onlinerl, oracle, tmp_path, monkeypatch, engine):
    asked = threading.Event()
    engine["sample"] = waits_for(asked)
    config = toy_config(tmp_path, {**AS_BY_DEFAULT, **oracle(SCORES), "iterations": 1})
    from onlinerl import oracle_calls

    def ask(oracle, queries, inbox, original=oracle_calls._ask):
        if any(len(query.responses) == 4 for query in queries):
            asked.set()
        original(oracle, queries, inbox)

    monkeypatch.setattr(oracle_calls, "_ask", ask)
    code, message = onlinerl("run", config)
    assert code == 0, message


def test_log_probs_follow_the_labels(toy_config, onlinerl, tmp_path, monkeypatch, engine):
    scored = threading.Event()
    engine["sample"] = waits_for(scored)
    monkeypatch.setattr(annotate, "STREAMED", 2)

    def logprobs(self, sequences, original=ToyLearner.logprobs, **options):
        if options["model"] == "policy" and len(sequences) == 4:  # two pairs
            scored.set()
        return original(self, sequences, **options)

    monkeypatch.setattr(ToyLearner, "logprobs", logprobs)
    code, message = onlinerl("run", toy_config(tmp_path, {**AS_BY_DEFAULT, "iterations": 1}))
    assert code == 0, message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        phases = run.phases(1)
        assert phases["annotate"]["began"] < phases["sample"]["ended"]
        assert len(run.read(1, "logprobs")) == 8


def test_the_next_iteration_samples_beside_an_evaluation(toy_config, onlinerl, tmp_path, engine):
    sampling = threading.Event()
    engine["sample"] = lambda version: sampling.set()

    def wait(version: int) -> None:
        if 0 <= version < 2:  # the last iterate has nobody beside it
            assert sampling.wait(PATIENCE_S), "nothing ran beside it"
            sampling.clear()

    engine["answer"] = wait
    code, message = onlinerl("run", toy_config(tmp_path, {**AS_BY_DEFAULT, "iterations": 2}))
    assert code == 0, message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        for t in (1, 2):
            assert run.phases(t)["sample"]["began"] < run.phases(t - 1)["answer"]["ended"]
            assert {v for row in run.read(t, "rollouts") for v in row["policy_versions"]} == {t - 1}
            assert {v for row in run.read(t, "evaluation") for v in row["policy_versions"]} == {t}


@pytest.mark.parametrize("algorithm", ["dpo", "grpo", "ppo", "sppo"])
def test_it_is_the_same_run(toy_config, onlinerl, oracle, tmp_path, monkeypatch, algorithm):
    """Bit for bit, whatever was worked on at the same time, and in whatever order things arrived."""
    monkeypatch.setattr(annotate, "STREAMED", 3)
    seen = {}
    for name, schedule in (("turns", {}), ("beside", {**AS_BY_DEFAULT, "oracle.max_concurrent": 3})):
        keys = {"algorithm.name": algorithm, "iterations": 2, **oracle(SCORES), "oracle.groups_per_call": 2, **schedule}
        code, message = onlinerl("run", toy_config(tmp_path, keys, name=name, file=f"{name}.yaml"))
        assert code == 0, message
        path = tmp_path / "runs" / name
        with RunDirectory.open(path) as run:
            tables = {
                (t, table): sorted(json.dumps(row) for row in run.read(t, table))
                for t in (1, 2)
                for table in ("rollouts", "logprobs", "pairs", "evaluation")
            }
            scores = {row["prompt_id"]: row["scores"] for t in (1, 2) for row in run.read(t, "verdicts")}
        weights = [np.load(path / "exports" / f"{t:04d}" / "logits.npy").tolist() for t in (1, 2)]
        rows = [{k: row[k] for k in ("reward", "kl_ref", "kl_prev", "win_rate")} for row in summarise(path)["iterations"]]
        seen[name] = tables, scores, weights, rows
    assert seen["beside"] == seen["turns"]


def test_a_failure_ends_what_runs_beside_it(toy_config, onlinerl, tmp_path, engine, oracle):
    """The oracle cannot go on while the engine samples: the run ends at once, with the oracle's error, and keeps what is there."""
    began = time.monotonic()

    def hang(version: int) -> None:
        time.sleep(2 * PATIENCE_S if version == 0 else 0)

    engine["sample"] = hang
    body = (
        "from onlinerl.errors import OracleError\n"
        "if len(queries[0]['responses']) == 4:\n"
        "    judge.labels = getattr(judge, 'labels', 0) + 1\n"
        "    if judge.labels == 7:\n"
        "        raise OracleError('no credit left', field='oracle', fix='pay')\n" + SCORES
    )
    few = {"evaluation.prompts": 4, "prompts.per_iteration": 8, "oracle.groups_per_call": 1}
    code, message = onlinerl("run", toy_config(tmp_path, {**AS_BY_DEFAULT, **oracle(body), **few}))
    assert code == FAILED
    assert "no credit left" in message
    assert time.monotonic() - began < 2 * PATIENCE_S, "it waited for the engine"
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        assert len(run.read(1, "rollouts")) == 7, "what was sampled is kept"
        assert len(run.read(1, "verdicts")) == 6, "what was paid for is kept"
        assert list(run.phases(1)) == []


def test_what_a_stopped_phase_still_says_is_not_written(tmp_path):
    """A thread cannot be ended: it may come back when another process has the run."""
    run = RunDirectory.create(tmp_path / "r", config_yaml="", manifest={"name": "r", "config_digest": "x", "fingerprint": {}})
    table = run.labels(1, "verdicts")
    table.append([label(1, 1.0)])
    run.close()
    from onlinerl.errors import StoreError

    def checkpoint() -> None:
        with run.staged("checkpoints", 1) as path:
            (path / "weights").write_text("of a run that was stopped")

    for write in (
        checkpoint,
        lambda: run.write_config("name: other\n"),
        lambda: table.append([label(2, 1.0)]),
        table.seal,
        table.clear,
        lambda: run.finish_phase(1, "sample", {}),
        lambda: run.update_manifest(status="finished"),
    ):
        with pytest.raises(StoreError, match="is closed"):
            write()
    with RunDirectory.open(tmp_path / "r") as again:
        assert list(again.labels(1, "verdicts")) == [label(1, 1.0)]
        assert (again.config_yaml, again.artefacts("checkpoints")) == ("", [])


def test_a_group_that_the_oracle_failed_on_is_scored_after_the_repair(toy_config, onlinerl, oracle, tmp_path, monkeypatch):
    """Log-probs follow the labels, and the run stops for too many failures; the resume has verdicts, and log-probs of all of them."""
    monkeypatch.setattr(annotate, "STREAMED", 2)
    repaired = tmp_path / "repaired"
    body = (
        f"import os\nif len(queries[0]['responses']) == 4 and not os.path.exists({str(repaired)!r}):\n"
        "    judge.labels = getattr(judge, 'labels', 0) + 1\n"
        "    import time\n"
        f"    while judge.labels == 8 and not os.path.exists({str(tmp_path / 'runs/toy/iterations/0001/logprobs.0001.journal')!r}):\n"
        "        time.sleep(0.05)\n"
        "    if judge.labels in (1, 2, 8):\n"
        "        return [None]\n" + SCORES
    )
    keys = {**AS_BY_DEFAULT, **oracle(body), "oracle.groups_per_call": 1, "iterations": 1, "max_failed_labels": 0.3}
    keys["schedule.evaluate_beside"] = False  # the base model is measured before
    code, message = onlinerl("run", toy_config(tmp_path, keys))
    assert code == FAILED, message
    repaired.touch()
    code, message = onlinerl("resume", tmp_path / "runs/toy")
    assert code == 0, message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        assert len(run.read(1, "logprobs")) == 8
        assert all(row["reference_logprobs"] or row["old_logprobs"] for row in run.read(1, "logprobs"))


def test_what_a_resume_would_ask_for_again_is_not_judged_before(toy_config, onlinerl, tmp_path, monkeypatch):
    """A group of which the engine rejected a response may still be replaced: its old verdict would be that of other responses."""
    judged: list[str] = []
    verdicts = tmp_path / "runs/toy/iterations/0001"

    def generate(self, requests, sampling, original=ToyEngine.generate):
        requests = list(requests)
        for i, [group] in enumerate(original(self, requests, sampling)):
            if len(group.rollouts) == 4 and i == 0:
                group = replace(group, rollouts=group.rollouts[1:], rejected=("logprob",))
            if len(requests[0].seeds) == 4 and i == len(requests) - 1:
                deadline = time.monotonic() + PATIENCE_S
                while time.monotonic() < deadline and len(judged) < len(requests) - 2:
                    judged[:] = TableFiles(verdicts, "verdicts").ids()
                judged.append(f"not {requests[0].prompt.id}" if requests[0].prompt.id not in judged else "too early")
            yield [group]

    monkeypatch.setattr(ToyEngine, "generate", generate)
    code, message = onlinerl("run", toy_config(tmp_path, {**AS_BY_DEFAULT, "iterations": 1}))
    assert code == 0, message
    assert len(judged) == 7, "the others are judged meanwhile"
    assert judged[-1].startswith("not ")
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        assert len(run.read(1, "verdicts")) == 8
