"""Runs whose labels people give: exactly those are trained on, nobody is waited for who need not be, and nothing is lost in a kill."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from people import answering, longer, said, until
from toy_runs import HELDOUT, PROMPTS, events, figures, pairs, weights

from onlinerl.people.queue import QUESTIONS, Question, Queue
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics

AI = {"name": "sentiment"}


@pytest.fixture
def config(toy_config, tmp_path):
    def make(**oracle: Any) -> Path:
        keys = {f"oracle.{key}": value for key, value in {"name": "human", "undo_s": 0.0, **oracle}.items()}
        path: Path = toy_config(tmp_path, {**keys, "iterations": 2, "metrics.prometheus": False})
        return path

    return make


def shorter(question: Question) -> Any:
    return {"left": "right", "right": "left"}.get(longer(question), "tie")


def asked(run: Path) -> list[Question]:
    queue = Queue(run / "oracle")
    queue.look()
    return queue.questions()


def raws(run: Path, table: str = "verdicts") -> list[dict[str, Any]]:
    """What the verdicts of all iterations say of who gave them."""
    with RunDirectory.open(run) as opened:
        rows = [row for t in opened.iterations() for row in opened.read(t, table)]
    return [json.loads(row["raw"].splitlines()[0]) for row in rows if row["status"] == "ok"]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_run_is_trained_on_exactly_what_people_have_said(config, warm_cli, tmp_path, stream):
    run = tmp_path / "runs/toy"
    with answering(run / "oracle", shorter) as answered:
        done = warm_cli("run", config(max_wait_s=600), f"schedule.stream={stream}")
    assert done.returncode == 0, done.message
    assert len(answered) == 2 * PROMPTS
    better = {(q.left, q.right) if shorter(q) == "left" else (q.right, q.left) for q in answered if shorter(q) != "tie"}
    trained = [(one["chosen_text"], one["rejected_text"]) for t in (1, 2) for one in pairs(run, t)]
    assert set(trained) == better
    assert len(trained) == len(better)
    assert {said["by"] for said in raws(run)} == {"people"}
    values = {
        (r["iteration"], r["labels"]["state"]): r["value"]
        for r in read_metrics(run / "metrics.jsonl")
        if r["name"] == "people_questions"
    }
    assert values == {(1, "open"): 0, (1, "answered"): PROMPTS, (2, "open"): 0, (2, "answered"): 2 * PROMPTS}
    assert all(row["win_rate"] is None or row["win_rate"]["n"] == 0 for row in figures(run)["iterations"])


def test_a_run_goes_on_when_nobody_answers_and_late_answers_are_data(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    done = warm_cli("run", config(ai=AI))
    assert done.returncode == 0, done.message
    assert {said["by"] for said in raws(run)} == {"ai"}
    with answering(run / "oracle") as answered:
        until(lambda: len(answered) == 2 * PROMPTS, "all late questions answered")
    shown = warm_cli("people", run, "--json")
    found = json.loads(shown.stdout)
    assert (found["questions"], found["open"], found["answered"], found["late"]) == (16, 0, 16, 16), shown.message
    done = warm_cli("people", run, "--export", tmp_path / "people.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "people.jsonl").read_text().splitlines()]
    assert f"{len(rows)} comparisons are in" in done.stderr
    assert len(rows) == sum(longer(question) != "tie" for question in answered) > 0
    assert all(len(row["chosen"]) > len(row["rejected"]) and row["late"] for row in rows)
    before = weights(run, 2).tolist()
    assert warm_cli("resume", run).returncode == 4
    assert weights(run, 2).tolist() == before, "a label stays what it was"


def test_a_budget_is_shared_out_and_the_rest_is_for_the_other_oracle(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    with answering(run / "oracle"):
        done = warm_cli("run", config(ai=AI, max_wait_s=600, per_iteration=3))
    assert done.returncode == 0, done.message
    assert Counter(said["by"] for said in raws(run)) == {"people": 6, "ai": 2 * PROMPTS - 6}
    assert Counter(question.iteration for question in asked(run)) == {1: 3, 2: 3}


def test_people_compare_held_out_answers_where_they_are_to(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    with answering(run / "oracle"):
        done = warm_cli("run", config(ai=AI, max_wait_s=600, per_iteration=1, heldout="people"))
    assert done.returncode == 0, done.message
    assert any(question.heldout for question in asked(run))
    with RunDirectory.open(run) as opened:
        compared = opened.read(1, "comparisons_0000")
    assert len(compared) == HELDOUT
    assert figures(run)["iterations"][1]["win_rate"]["n"] == HELDOUT


def test_when_the_time_is_over_a_run_without_another_oracle_stops_and_goes_on_later(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    stopped = warm_cli("run", config(max_wait_s=0.2))
    assert stopped.returncode == 1, stopped.message
    assert "nobody has answered within 0.2 s" in stopped.stderr
    with answering(run / "oracle") as answered:
        until(lambda: len(answered) == len(asked(run)) > 0, "all questions answered while no run is there")
        done = warm_cli("resume", run, "oracle.max_wait_s=600")
    assert done.returncode == 0, done.message
    assert len(asked(run)) == 2 * PROMPTS
    assert {said["by"] for said in raws(run)} == {"people"}


@pytest.mark.parametrize("moment", [["generate", 12], ["before 1 label", 1], ["after 1 label", 1], ["save", 2]])
def test_killed_anywhere_no_verdict_of_people_is_lost_or_asked_for_again(config, warm_cli, tmp_path, moment):
    run, file = tmp_path / "runs/toy", config(max_wait_s=600)
    log = tmp_path / "log"
    with answering(run / "oracle", shorter) as answered:
        assert warm_cli("run", file, log=log, kill=moment).returncode == -signal.SIGKILL
        done = warm_cli("resume", run)
    assert done.returncode == 0, done.message
    assert events(log)
    assert len({question.id for question in answered}) == len(answered) == 2 * PROMPTS == len(asked(run))
    killed = [pairs(run, t) for t in (1, 2)], [weights(run, t).tolist() for t in (1, 2)]
    run.rename(tmp_path / "killed")
    with answering(run / "oracle", shorter):
        assert warm_cli("run", file).returncode == 0
    assert killed == ([pairs(run, t) for t in (1, 2)], [weights(run, t).tolist() for t in (1, 2)])


def test_killed_while_it_waits_it_finds_what_was_said_meanwhile(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    process, out = warm_cli.start("run", config(max_wait_s=600))
    until(lambda: (run / "oracle" / QUESTIONS).exists() and len(asked(run)) == PROMPTS, "the first questions")
    queue = Queue(run / "oracle")
    queue.look()
    queue.answer(said(queue.questions()[0], "left"))
    process.kill()
    warm_cli.finish(process, out)
    queue.answer(said(queue.questions()[1], "right"))
    with answering(run / "oracle") as answered:
        done = warm_cli("resume", run)
    assert done.returncode == 0, done.message
    assert len(answered) == 2 * PROMPTS - 2
    choices = [one["answers"][0]["choice"] for one in raws(run)]
    assert len(choices) == 2 * PROMPTS


def test_a_budget_of_calls_is_kept_to_and_goes_on_with_more(config, warm_cli, tmp_path):
    run, file = tmp_path / "runs/toy", config(max_wait_s=600)
    with answering(run / "oracle") as answered:
        stopped = warm_cli("run", file, "ledger.max_calls=10")
        assert stopped.returncode == 1, stopped.message
        assert "ledger.max_calls" in stopped.stderr
        assert len(asked(run)) == 10
        done = warm_cli("resume", run, "ledger.max_calls=16")
    assert done.returncode == 0, done.message
    assert len(answered) == 2 * PROMPTS


def test_check_says_how_much_people_are_asked_for_and_refuses_what_cannot_work(config, warm_cli):
    done = warm_cli("check", config(ai=AI, max_wait_s=3600, heldout="people", n_annotators=2))
    assert done.returncode == 0, done.message
    most = 2 * PROMPTS + 3 * HELDOUT
    assert (
        f"people: at most {PROMPTS} comparisons an iteration, with {3 * HELDOUT} of answers to held-out prompts {most} for"
        in done.stdout
    )
    assert "a question waits for people up to 3600 s; without an answer `ai` judges" in done.stdout
    assert "so many are needed" in done.stdout
    assert re.search(r"people: ", warm_cli("check", config(name="sentiment", undo_s=None)).stdout) is None
    refused = warm_cli("check", config())
    assert refused.returncode == 2
    assert "oracle.max_wait_s: is 0, so the run does not wait for people" in refused.stderr
    refused = warm_cli("check", config(max_wait_s=60, pairs_per_group=0))
    assert (refused.returncode, "oracle.pairs_per_group" in refused.stderr) == (2, True)


def test_inside_another_oracle_people_have_a_queue_too(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    inner = {"name": "human", "max_wait_s": 600.0, "undo_s": 0.0}
    file = config(name="router", undo_s=None, cheap=AI, expensive=inner, budget_groups=3)
    with answering(run / "oracle/expensive") as answered:
        done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    assert 0 < len(answered) <= 3
    assert json.loads(warm_cli("people", run, "--json").stdout)["answered"] == len(answered)


def test_people_judge_what_another_oracle_has_judged(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    assert warm_cli("run", config(name="sentiment", undo_s=None)).returncode == 0
    with answering(run / "oracle"):
        done = warm_cli("relabel", run, "oracle.name=human", "oracle.max_wait_s=600", "oracle.undo_s=0")
    assert done.returncode == 0, done.message
    assert "agree on" in done.stdout


def test_late_answers_train_a_reward_model(config, warm_cli, tmp_path, tiny_model):
    run = tmp_path / "runs/toy"
    assert warm_cli("run", config(ai=AI)).returncode == 0
    with answering(run / "oracle") as answered:
        until(lambda: len(answered) == 2 * PROMPTS, "all late questions answered")
    assert warm_cli("people", run, "--export", tmp_path / "people.jsonl").returncode == 0
    (tmp_path / "rm.yaml").write_text(
        f"name: rm\nmodel: {tiny_model}\npreferences: {{train: {tmp_path}/people.jsonl, heldout_share: 0.2, max_length: 128}}\n"
    )
    done = warm_cli("train-rm", tmp_path / "rm.yaml", "--check")
    assert done.returncode == 0, done.message


def test_a_signal_ends_a_run_that_waits_for_people_resumably(config, warm_cli, tmp_path):
    run = tmp_path / "runs/toy"
    process, out = warm_cli.start("run", config(max_wait_s=600))
    until(lambda: (run / "oracle" / QUESTIONS).exists() and len(asked(run)) == PROMPTS, "the first questions")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    stopped = warm_cli.finish(process, out)
    assert stopped.returncode == 75, stopped.message
    with answering(run / "oracle") as answered:
        done = warm_cli("resume", run)
    assert done.returncode == 0, done.message
    assert len(answered) == 2 * PROMPTS
