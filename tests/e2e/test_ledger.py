"""What a run pays for its labels: as much as was foretold, never twice, never more than it may; and what can be asked about them later."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("aiohttp")

from judges import GARBAGE, JudgeServer, judging
from older import as_before_the_ledger
from preference_rows import taste, write_rows
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything, pairs, weights

from onlinerl.api import Run

TRIAL = ("What is 2 + 2?", "It was bad, the answer is 7.", "It was good.")
"""What is asked at every start."""


@pytest.fixture
def server():
    with judging() as found:
        yield found


@pytest.fixture
def config(toy_config, tmp_path, server):
    def make(**more: Any) -> Any:
        judge = {"oracle.name": "judge_pair", "oracle.base_url": f"{server.url}/v1", "oracle.model": "judge"}
        return toy_config(tmp_path, {**judge, "iterations": 2, "metrics.prometheus": False, **more})

    return make


def asked(server: JudgeServer) -> Counter[str]:
    """Every question, without those of a start."""
    texts = [body["messages"][0]["content"] for body in server.asked]
    return Counter(text for text in texts if not any(trial in text for trial in TRIAL))


def ledger(warm_cli: Any, run: Path, *options: str) -> dict[str, Any]:
    done = warm_cli("labels", run, "--json", *options)
    assert done.returncode == 0, done.message
    return json.loads(done.stdout)


def total(found: dict[str, Any], name: str) -> float:
    return found["starts"][name] + sum(row[name] for row in found["costs"])


@pytest.mark.parametrize("name", ["judge_pair", "judge_score"])
def test_calls_and_money_are_those_that_check_foretells(config, warm_cli, tmp_path, server, name):
    file = config(**{"oracle.name": name, "oracle.price_per_request": 0.25})
    said = warm_cli("check", file)
    foretold = re.search(r"(\d+) for the whole run.*about \$(\d+\.\d\d) at most", said.stdout)
    assert foretold is not None, said.message
    server.asked.clear()
    assert warm_cli("run", file).returncode == 0
    found = ledger(warm_cli, tmp_path / "runs/toy")
    assert total(found, "calls") == len(server.asked)
    saved = sum(row["saved_calls"] for row in found["costs"])
    assert int(foretold[1]) == len(server.asked) + saved
    assert float(foretold[2]) == total(found, "usd") + sum(row["saved_usd"] for row in found["costs"])
    assert total(found, "usd") == len(server.asked) / 4


def test_labels_of_reused_responses_are_foretold_as_known_and_paid_once(config, warm_cli, tmp_path, server):
    """Half of the prompts are sampled anew, so half as many questions follow in the second and third iteration."""
    knobs = {"algorithm.name": "optune", "selection.name": "regenerate", "prompts.reuse": True, "prompts.per_iteration": 40}
    file = config(**knobs, **{"oracle.name": "judge_score", "oracle.price_per_request": 0.25, "iterations": 3})
    said = warm_cli("check", file)
    foretold = re.search(r"(\d+) for the whole run.*about \$(\d+\.\d\d) at most", said.stdout)
    assert foretold is not None, said.message
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    found = ledger(warm_cli, tmp_path / "runs/toy")
    assert total(found, "calls") == len(server.asked)
    each, reused = 4, 2 * 20
    equal = sum(row["saved_calls"] for row in found["costs"]) - each * reused
    assert int(foretold[1]) == len(server.asked) + equal, "but for texts that were the same as before"
    assert int(foretold[1]) == each * (40 + 2 * 20) + 4 * HELDOUT + 3, "three at the start"
    assert float(foretold[2]) == int(foretold[1]) / 4


def test_calls_and_money_of_oracles_that_ask_others_are_foretold_too(toy_config, warm_cli, tmp_path, server):
    judge = {"base_url": f"{server.url}/v1", "model": "judge", "price_per_request": 0.25}
    members = {
        "pairs": {"name": "swapped", "base": {"name": "judge_pair", "query_plan": "all_pairs_random_order", **judge}},
        "quality": {"name": "judge_score", **judge},
    }
    keys = {
        "oracle.name": "composite",
        "oracle.combine": "vote",
        "oracle.members": members,
        "iterations": 2,
        "metrics.prometheus": False,
    }
    file, run = toy_config(tmp_path, keys), tmp_path / "runs/toy"
    said = warm_cli("check", file)
    foretold = re.search(r"(\d+) for the whole run.*about \$(\d+\.\d\d) at most", said.stdout)
    assert foretold is not None, said.message
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    found = ledger(warm_cli, run)
    saved = sum(row["saved_calls"] for row in found["costs"])
    assert (total(found, "calls"), int(foretold[1])) == (len(server.asked), len(server.asked) + saved)
    assert total(found, "usd") == len(server.asked) / 4
    assert float(foretold[2]) == total(found, "usd") + sum(row["saved_usd"] for row in found["costs"])
    before = len(server.asked)
    assert warm_cli("resume", run, "iterations=3").returncode == 0
    assert total(ledger(warm_cli, run), "calls") == len(server.asked) > before


def counted(warm_cli: Any, run: Path) -> int:
    """Questions that a run has put, and those that it did not need to because they were known."""
    found = ledger(warm_cli, run)
    return int(total(found, "calls")) + sum(row["saved_calls"] for row in found["costs"])


@pytest.mark.parametrize(
    ("knobs", "bound"),
    [
        ({"expensive_below": 1.0}, ""),
        ({"expensive_below": 0.0, "audit": 0.0}, ""),
        ({"expensive_below": 0.8}, "at most "),
        ({"expensive_below": 1.0, "budget_groups": 7}, "at most "),
    ],
)
def test_calls_of_an_oracle_that_asks_another_as_needed_are_foretold_as_a_bound(
    toy_config, warm_cli, tmp_path, server, knobs, bound
):
    """It is exact where the other one is always asked, or never."""
    judge = {"base_url": f"{server.url}/v1", "model": "judge", "price_per_request": 0.25}
    cheap = {"name": "judge_score", "preference_temperature": 0.2, **judge}
    oracle = {"name": "router", "cheap": cheap, "expensive": {"name": "judge_pair", **judge}, **knobs}
    keys = {f"oracle.{key}": value for key, value in oracle.items()}
    file, run = toy_config(tmp_path, {**keys, "iterations": 2, "metrics.prometheus": False}), tmp_path / "runs/toy"
    said = warm_cli("check", file)
    foretold = re.search(
        rf"oracle: {bound}\d+ requests .* {bound}(\d+) for the whole run.*about \$(\d+\.\d\d) at most", said.stdout
    )
    assert foretold is not None, said.message
    assert ("oracle: at most" in said.stdout) == bool(bound)
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    found, most = counted(warm_cli, run), int(foretold[1])
    assert len(server.asked) <= found
    assert found < most if bound else found == most, (found, most)
    assert found / 4 <= float(foretold[2])


def test_calls_of_people_and_the_oracle_beside_them_are_foretold_as_a_bound(toy_config, warm_cli, tmp_path, server):
    """Nobody answers here, so the other oracle judges everything; people might have answered as well."""
    ai = {"name": "judge_pair", "base_url": f"{server.url}/v1", "model": "judge"}
    keys = {"oracle.name": "human", "oracle.ai": ai, "oracle.pairs_per_group": 2, "iterations": 2, "metrics.prometheus": False}
    file, run = toy_config(tmp_path, keys), tmp_path / "runs/toy"
    said = warm_cli("check", file)
    foretold = re.search(r"oracle: at most 14 requests for 4 responses .* at most (\d+) for the whole run", said.stdout)
    assert foretold is not None, said.message
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    found = counted(warm_cli, run)
    assert found == int(foretold[1]) - 2 * PROMPTS * 2 - 3 * HELDOUT - 1, "but for what people did not say"


def test_a_run_stops_before_the_question_that_is_too_much_and_goes_on_with_more(config, warm_cli, tmp_path, server):
    assert warm_cli("run", config()).returncode == 0
    whole, uninterrupted = asked(server), everything(tmp_path / "runs/toy", 2)
    (tmp_path / "runs").rename(tmp_path / "first")
    server.asked.clear()
    file, run = config(**{"ledger.max_calls": 50, "oracle.max_concurrent": 8}), tmp_path / "runs/toy"
    assert "ledger.max_calls is 50, and the run may need" in warm_cli("check", file).stdout
    server.asked.clear()
    stopped = warm_cli("run", file)
    assert stopped.returncode == 1, stopped.message
    assert "error: budget: ledger.max_calls: 50 calls of 50 calls are spent" in stopped.stderr
    assert len(server.asked) == 50
    refused = warm_cli("resume", run)
    assert refused.returncode == 2, refused.message
    assert "ledger.max_calls" in refused.stderr
    assert len(server.asked) == 50, "not even a trial question"
    more = warm_cli("resume", run, "ledger.max_calls=90")
    assert more.returncode == 1, more.message
    assert len(server.asked) == 90
    assert warm_cli("resume", run, "ledger.max_calls=9000").returncode == 0
    assert asked(server) == whole
    found = everything(run, 2)
    assert (found["pairs"], found["weights"]) == (uninterrupted["pairs"], uninterrupted["weights"])
    assert total(ledger(warm_cli, run), "calls") == len(server.asked)


@pytest.mark.parametrize("limit", [{"ledger.max_usd": 0.5}, {"ledger.max_tokens": 40_000}])
def test_money_and_tokens_are_never_more_than_allowed(config, warm_cli, tmp_path, server, limit):
    price = {"oracle.price_per_million_tokens": {"input": 10.0, "output": 20.0}}
    done = warm_cli("run", config(**limit, **price))
    assert done.returncode == 1, done.message
    ((key, most),) = limit.items()
    assert key in done.stderr
    found = ledger(warm_cli, tmp_path / "runs/toy")
    assert 0 < total(found, key.removeprefix("ledger.max_")) <= most


def test_a_budget_that_nobody_counts_is_refused_before_anything_starts(config, warm_cli, tmp_path):
    done = warm_cli("check", config(**{"ledger.max_usd": 5}))
    assert done.returncode == 2, done.message
    assert "ledger.max_usd: is set, and judge_pair has no price" in done.stderr


def test_another_run_pays_for_nothing_that_is_known(config, warm_cli, tmp_path, server):
    assert warm_cli("run", config()).returncode == 0
    server.asked.clear()
    done = warm_cli("run", config(**{"name": "again", "ledger.reuse_from": str(tmp_path / "runs")}))
    assert done.returncode == 0, done.message
    assert "labels are known, of this run and of those in" in done.stdout
    assert not asked(server)
    first, again = tmp_path / "runs/toy", tmp_path / "runs/again"
    for t in (1, 2):
        assert pairs(again, t) == pairs(first, t)
        assert weights(again, t).tolist() == weights(first, t).tolist()
    before, now = ledger(warm_cli, first), ledger(warm_cli, again)
    assert sum(row["calls"] for row in now["costs"]) == 0
    assert sum(row["saved_calls"] for row in now["costs"]) == sum(row["calls"] + row["saved_calls"] for row in before["costs"])
    assert now["audit"] == before["audit"]


def test_without_being_asked_for_other_runs_are_not_looked_at(config, warm_cli, server):
    assert warm_cli("run", config(iterations=1)).returncode == 0
    first = asked(server)
    server.asked.clear()
    assert warm_cli("run", config(iterations=1, name="again")).returncode == 0
    assert asked(server) == first


@pytest.mark.parametrize("number", [2, 3])
def test_killed_with_a_function_of_ones_own_nothing_is_asked_twice(toy_config, warm_cli, tmp_path, number):
    file = toy_config(tmp_path, {**COUNTED, "oracle.groups_per_call": 1, "iterations": 2})
    log = tmp_path / "log"
    assert warm_cli("run", file, log=log, kill=["judge", number]).returncode == -signal.SIGKILL
    assert warm_cli("resume", tmp_path / "runs/toy", log=log).returncode == 0
    groups = Counter(json.dumps(one) for event in events(log) if event["kind"] == "judge" for one in event["asked"])
    twice = {group: n for group, n in groups.items() if n > 1 and " It was good." not in group}
    assert sum(n - 1 for n in twice.values()) <= 1, "but for the one that died with the process"


def test_another_oracle_judges_what_was_sampled_and_goes_on_where_it_was_killed(toy_config, warm_cli, tmp_path, server):
    assert warm_cli("run", toy_config(tmp_path, {"iterations": 2, "metrics.prometheus": False})).returncode == 0
    run = tmp_path / "runs/toy"
    before = everything(run, 2)
    command = ("relabel", run, "oracle.name=judge_pair", f"oracle.base_url={server.url}/v1", "oracle.model=judge")
    process, out = warm_cli.start(*command, "oracle.max_requests=1")
    server.instead = lambda n, body: os.kill(process.pid, signal.SIGKILL) if n == 70 else None
    assert warm_cli.finish(process, out).returncode == -signal.SIGKILL
    server.instead = lambda n, body: None
    done = warm_cli(*command)
    assert done.returncode == 0, done.message
    assert "agree on" in done.stdout
    questions = asked(server)
    assert questions.total() == 2 * PROMPTS * 12 + 1
    assert sum(n - 1 for n in questions.values()) >= 1
    server.asked.clear()
    assert warm_cli(*command).returncode == 0
    assert not asked(server)
    assert everything(run, 2) == before, "the run is as it was"
    found = ledger(warm_cli, run)
    assert total(found, "calls") >= 2 * PROMPTS * 12
    (agreement,) = found["agreement"]
    assert agreement["agreement"]["low"] <= agreement["agreement"]["value"] <= agreement["agreement"]["high"]
    assert len(agreement["oracle_versions"]) == 2
    assert [row["labels"] for row in found["costs"] if row["phase"] == "relabel"] == [PROMPTS, PROMPTS]
    assert ledger(warm_cli, run, "--oracle", "judge")["agreement"] == []


def test_a_judge_that_loses_its_replies_stops_relabel_which_goes_on_when_it_is_repaired(toy_config, warm_cli, tmp_path, server):
    assert warm_cli("run", toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False})).returncode == 0
    run = tmp_path / "runs/toy"
    command = (
        "relabel",
        run,
        "oracle.name=judge_pair",
        f"oracle.base_url={server.url}/v1",
        "oracle.model=judge",
        "oracle.retries=0",
    )
    gone: list[str] = []

    def lossy(n: int, body: Any) -> Any:
        if n <= 5 or n % 3:
            return None
        gone.append(body["messages"][0]["content"])
        return GARBAGE

    server.instead = lossy
    stopped = warm_cli(*command, "oracle.max_requests=1")
    assert stopped.returncode == 1, stopped.message
    assert "replies failed (" in stopped.stderr
    server.instead = lambda n, body: None
    done = warm_cli(*command)
    assert done.returncode == 0, done.message
    (iteration,) = (line for line in done.stdout.splitlines() if line.startswith("iteration 1: "))
    assert "failed" not in iteration
    answered = asked(server) - Counter(gone)
    assert sum(n - 1 for n in answered.values()) <= 1, "but for the one that was under way when it stopped"
    assert answered.total() >= PROMPTS * 12


def test_an_oracle_agrees_with_itself(toy_config, warm_cli, tmp_path):
    (tmp_path / "brevity.py").write_text("def judge(groups):\n    return [[-len(r) for r in g['responses']] for g in groups]\n")
    own = {"oracle.name": "python", "oracle.function": f"{tmp_path}/brevity.py:judge", "metrics.prometheus": False}
    assert warm_cli("run", toy_config(tmp_path, {**own, "iterations": 1})).returncode == 0
    done = warm_cli("relabel", tmp_path / "runs/toy", "oracle.revision=two")
    assert done.returncode == 0, done.message
    (agreement,) = ledger(warm_cli, tmp_path / "runs/toy")["agreement"]
    assert (agreement["agreement"]["value"], agreement["kappa"]) == (1, 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["iterations=9"], "iterations: is not read here"),
        (["--iteration", "7"], "choose one of 1"),
        (["oracle.nme=x"], "oracle.nme"),
        (["oracle.name=math_verifier"], "have no reference answer"),
        (["ledger.max_usd=3"], "ledger.max_usd: is set, and sentiment has no price"),
    ],
)
def test_what_relabel_cannot_do_it_refuses(toy_config, warm_cli, tmp_path, keys, says):
    assert warm_cli("run", toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False})).returncode == 0
    done = warm_cli("relabel", tmp_path / "runs/toy", *keys)
    assert done.returncode == 2, done.message
    assert says in done.stderr


def test_all_labels_with_what_they_are_about_as_one_file(config, warm_cli, tmp_path, server):
    server.bias = 30.0
    assert warm_cli("run", config(**{"oracle.read_from": "text"})).returncode == 0
    run, file = tmp_path / "runs/toy", tmp_path / "labels.parquet"
    done = warm_cli("labels", run, "--export", file)
    assert done.returncode == 0, done.message
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 2 * PROMPTS + 3 * HELDOUT
    row = next(row for row in rows if (row["iteration"], row["table"]) == (2, "verdicts"))
    assert len(row["responses"]) == len(row["seeds"]) == len(row["policy_versions"]) == 4
    assert [line.count(None) for line in row["preferences"]] == [1, 1, 1, 1], "both orders of each pair"
    assert row["calls"] == 12
    assert server.words in row["raw"]
    assert (row["run"], row["run_seed"], row["annotator"]) == ("toy", 0, "judge_pair:judge")
    compared = next(row for row in rows if (row["iteration"], row["table"]) == (2, "comparisons_0001"))
    assert compared["policy_versions"] == [2, 1]
    assert Run.open(run).labels(1).shape == (PROMPTS + HELDOUT, len(rows[0]))
    (audit,) = ledger(warm_cli, run)["audit"]
    assert (audit["flip_rate"]["value"], audit["first_slot_rate"]["value"]) == (1, 1)
    assert audit["tie_rate"]["value"] == 1
    assert audit["flip_rate"]["low"] == audit["flip_rate"]["high"] == 1
    shown = warm_cli("labels", run)
    assert "flip rate 100.0%" in shown.stdout, shown.message


def test_sql_finds_what_was_asked_of_the_labels(config, warm_cli, tmp_path, server):
    assert warm_cli("run", config()).returncode == 0
    run = tmp_path / "runs/toy"
    costs = 'SELECT iteration, "table", count(*) AS labels, sum(calls) AS calls FROM labels GROUP BY ALL ORDER BY ALL'
    done = warm_cli("labels", run, "--query", costs, "--json")
    assert done.returncode == 0, done.message
    rows = json.loads(done.stdout)["rows"]
    assert sum(row["labels"] for row in rows) == 2 * PROMPTS + 3 * HELDOUT
    assert sum(row["calls"] for row in rows) == sum(row["calls"] for row in ledger(warm_cli, run)["costs"])
    assert {"iteration": 2, "table": "verdicts", "labels": PROMPTS, "calls": 12 * PROMPTS} in rows
    assert Run.open(run).query(costs, format="arrow").to_pylist() == rows
    chosen = "SELECT count(*) FILTER (raw[1] IS NOT NULL) AS words FROM labels"
    assert warm_cli("labels", run, "--query", chosen, "--iteration", 7).stdout.split() == ["words", "0"]
    shown = warm_cli(
        "labels",
        run,
        "--query",
        "SELECT '[1/0]' AS word, 0.5 AS half, 1.0 / 0 AS none, DATE '2026-01-02' AS day, 10 ** 25 AS many",
    )
    assert shown.stdout.split() == ["word", "half", "none", "day", "many", "[1/0]", "0.5", "-", "2026-01-02", "1e+25"]
    written = tmp_path / "pairs.csv"
    done = warm_cli("labels", run, "--query", f"COPY (SELECT prompt_id FROM labels) TO '{written}'")
    assert done.returncode == 0, done.message
    assert len(written.read_text().splitlines()) == 2 * PROMPTS + 3 * HELDOUT + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--query", "SELEC 1"], ["query: DuckDB cannot answer it: Parser Error", "DESCRIBE labels"]),
        (["--query", "SELECT nothing FROM labels"], ["not found in FROM clause", "DESCRIBE labels"]),
        (["--query", "SELECT list_max(calls) FROM labels"], ["query: DuckDB cannot answer it"]),
        (["--query", "SELECT prompt::INT FROM labels"], ["Conversion Error"]),
        (["--query", ""], ["query: the statement finds no rows"]),
        (["--query", "SELECT 1", "--export", "x.parquet"], ["--export: is given with --query"]),
    ],
)
def test_what_is_no_question_is_refused(toy_config, warm_cli, tmp_path, options, says):
    assert warm_cli("run", toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False})).returncode == 0
    done = warm_cli("labels", tmp_path / "runs/toy", *options)
    assert done.returncode == 2, done.message
    for word in says:
        assert word in done.message


def test_a_run_of_the_version_before_goes_on_and_is_shown(config, warm_cli, tmp_path, server):
    file, run = config(**{"oracle.max_requests": 1}), tmp_path / "runs/toy"
    assert warm_cli("run", file).returncode == 0
    whole, uninterrupted = asked(server), everything(run, 2)
    (tmp_path / "runs").rename(tmp_path / "first")
    server.asked.clear()
    process, out = warm_cli.start("run", file)
    server.instead = lambda n, body: os.kill(process.pid, signal.SIGKILL) if n == 40 else None
    assert warm_cli.finish(process, out).returncode == -signal.SIGKILL
    server.instead = lambda n, body: None
    as_before_the_ledger(run)
    assert ledger(warm_cli, run)["costs"][0]["calls"] > 0
    assert warm_cli("resume", run, "ledger.max_calls=9000").returncode == 0
    assert sum((asked(server) - whole).values()) == 1, "what died with the process"
    found = everything(run, 2)
    assert (found["pairs"], found["weights"]) == (uninterrupted["pairs"], uninterrupted["weights"])


def test_known_pairs_are_foretold_too_and_are_asked_again_although_they_are_known(config, warm_cli, tmp_path, server):
    data = write_rows(tmp_path / "anchors.jsonl", taste(10))
    anchors = {"anchors.data": data, "anchors.apply_chat_template": False, "anchors.every": 1, "anchors.min_accuracy": 0.0}
    file = config(**{"oracle.price_per_request": 0.25, **anchors})
    said = warm_cli("check", file)
    foretold = re.search(r"60 for pairs whose better response is known.* (\d+) for the whole run", said.stdout)
    assert foretold is not None, said.message
    server.asked.clear()
    assert warm_cli("run", file).returncode == 0
    found = ledger(warm_cli, tmp_path / "runs/toy")
    assert total(found, "calls") == len(server.asked)
    assert int(foretold[1]) == len(server.asked) + sum(row["saved_calls"] for row in found["costs"])
    examined = [row for row in found["costs"] if row["phase"] == "examine"]
    assert [(row["labels"], row["calls"], row["saved_calls"]) for row in examined] == [(10, 20, 0)] * 3
