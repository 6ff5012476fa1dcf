"""Whole runs with a language model as the judge, which is a server of the test: what it is asked, and what reaches training."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
import zlib
from collections import Counter
from itertools import permutations
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from judges import CLOSED, GARBAGE, HALF_A_REPLY, JudgeServer, completion, judging, quality, shown
from toy_runs import PROMPTS, everything

from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Verdict

TRIAL = ("What is 2 + 2?", "It was bad, the answer is 7.", "It was good.")
"""What is asked at every start."""


@pytest.fixture
def server():
    with judging() as found:
        yield found


@pytest.fixture
def config(toy_config, tmp_path, server):
    def make(name: str = "judge_pair", **more: Any) -> Any:
        judge = {"oracle.name": name, "oracle.base_url": f"{server.url}/v1", "oracle.model": "judge", "oracle.retries": 2}
        return toy_config(tmp_path, {**judge, "iterations": 2, "metrics.prometheus": False, **more})

    return make


def asked(server: JudgeServer) -> list[str]:
    """Every question, without those of a start."""
    texts = [body["messages"][0]["content"] for body in server.asked]
    return [text for text in texts if not any(trial in text for trial in TRIAL)]


def figure(run: Any, name: str, iteration: int, **labels: str) -> dict[str, Any]:
    (record,) = [
        r for r in read_metrics(run / "metrics.jsonl") if (r["name"], r["iteration"], r["labels"]) == (name, iteration, labels)
    ]
    return record


def test_requests_are_foretold_where_a_model_judges_beside_the_judge(config, warm_cli, tmp_path, server, tiny_model):
    """Its weights are not loaded for that."""
    judge = {"name": "judge_score", "base_url": f"{server.url}/v1", "model": "judge"}
    likely = {"name": "followup", "path": str(tiny_model), "device": "cpu"}
    keys = {"oracle.base_url": None, "oracle.model": None, "oracle.retries": None, "iterations": 1}
    file = config("composite", **keys, **{"oracle.members": {"said": judge, "likely": likely}})
    said = warm_cli("check", file)
    assert said.returncode == 0, said.message
    foretold = re.search(r"oracle: 4 requests for 4 responses .* (\d+) for the whole run", said.stdout)
    assert foretold is not None, said.stdout
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    assert foretold[0] in done.stdout
    saved = sum(r["value"] for r in read_metrics(tmp_path / "runs/toy/metrics.jsonl") if r["name"] == "oracle_requests_saved")
    assert int(foretold[1]) == len(server.asked) + saved


@pytest.mark.parametrize(
    ("name", "knobs", "per_group"),
    [
        ("judge_pair", {"oracle.query_plan": "ring", "oracle.votes": 2, "oracle.temperature": 0.5}, 16),
        ("judge_score", {}, 4),
    ],
)
def test_the_requests_that_check_foretells_are_those_that_are_made(config, warm_cli, tmp_path, server, name, knobs, per_group):
    file = config(name, **knobs, **{"oracle.price_per_million_tokens": {"input": 1.0, "output": 2.0}})
    said = warm_cli("check", file)
    assert said.returncode == 0, said.message
    assert "Unclosed" not in said.stderr
    foretold = re.search(
        r"oracle: (\d+) requests for 4 responses .* (\d+) an iteration; .* (\d+) for the whole run", said.stdout
    )
    assert foretold is not None, said.stdout
    assert re.search(r"about \$\d+\.\d\d at most", said.stdout)
    server.asked.clear()
    done = warm_cli("run", file)
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    saved = sum(r["value"] for r in read_metrics(run / "metrics.jsonl") if r["name"] == "oracle_requests_saved")
    assert (int(foretold[1]), int(foretold[2])) == (per_group, PROMPTS * per_group)
    assert int(foretold[3]) == len(server.asked) + saved, "but for what was the same as before"
    assert figure(run, "oracle_requests", 1, phase="label")["value"] == PROMPTS * per_group
    evaluated = sum(figure(run, "oracle_requests", t, phase="measure")["value"] for t in (0, 1, 2) if name != "judge_pair" or t)
    assert evaluated == len(asked(server)) - 2 * PROMPTS * per_group
    tokens = {way: figure(run, "oracle_tokens", 1, phase="label", kind=way)["value"] for way in ("prompt", "completion")}
    assert figure(run, "oracle_usd", 1, phase="label")["value"] == pytest.approx(
        (tokens["prompt"] + 2 * tokens["completion"]) / 1e6
    )
    assert tokens["prompt"] > tokens["completion"] > 0


def test_killed_in_the_middle_of_a_group_nothing_is_paid_for_twice(config, warm_cli, tmp_path, server):
    file = config(**{"oracle.max_requests": 1})
    assert warm_cli("run", file).returncode == 0
    whole, uninterrupted = Counter(asked(server)), everything(tmp_path / "runs/toy", 2)
    server.asked.clear()
    (tmp_path / "runs").rename(tmp_path / "first")
    for at in (3 + 30, 4 + 30 + 3 + 20, 10**9):  # the question that is lost with the kill is asked again, no other
        command = ("resume", tmp_path / "runs/toy") if server.asked else ("run", file)
        process, out = warm_cli.start(*command)

        def strike(n: int, body: Any, at: int = at, pid: int | None = process.pid) -> None:
            if n == at and pid is not None:
                os.kill(pid, signal.SIGKILL)

        server.instead = strike
        ended = warm_cli.finish(process, out)
        assert ended.returncode == (0 if at == 10**9 else -signal.SIGKILL), ended.message
    twice = Counter(asked(server)) - whole
    assert sum(twice.values()) == 2
    assert not whole - Counter(asked(server))
    found = everything(tmp_path / "runs/toy", 2)
    for key in ("pairs", "weights"):
        assert found[key] == uninterrupted[key]
    assert figure(tmp_path / "runs/toy", "oracle_requests", 1, phase="label")["value"] == PROMPTS * 12


PATIENCE_S = 4.0


def hang() -> Any:
    time.sleep(PATIENCE_S + 2)
    return CLOSED


LASTING: list[tuple[Any, str]] = [
    (GARBAGE, "parse_fail"),
    ((200, completion('{"rationale": "", "verdict": "C"}'), {}), "parse_fail"),
    ((200, completion("both are fine"), {}), "parse_fail"),
    ((400, {"error": {"message": "too long"}}, {}), "refused"),
    (hang, "timeout"),
]
"""What a question gets at every try, and as what its reply counts."""
PASSING: list[Any] = [(429, "", {"Retry-After": "0"}), (500, "oops", {}), CLOSED, HALF_A_REPLY, hang]
"""What a question gets at its first try only."""


def way(first: str, second: str) -> int:
    """In which way the question about these two goes wrong, by the texts alone; from len(LASTING + PASSING) on in none."""
    return zlib.crc32(f"{first} before {second}".encode()) % 40


def said_of(texts: list[str]) -> tuple[Any, Counter[str]]:
    """[K][K]: what a judge says with whom nothing goes wrong, None where it is not to be heard; and how many are not, by kind."""
    cells: list[list[float | None]] = [[None] * len(texts) for _ in texts]
    lost: Counter[str] = Counter()
    for (i, first), (j, second) in permutations(enumerate(texts), 2):
        if (how := way(first, second)) < len(LASTING):
            lost[LASTING[how][1]] += 1
        else:
            gap = quality(first) - quality(second)
            cells[i][j] = 0.5 if gap == 0 else float(gap > 0)
    return cells, lost


def test_no_failure_of_the_judge_reaches_training(config, warm_cli, tmp_path, server):
    """A quarter of the questions goes wrong in every way there is, also by an answer that never comes. What may pass is asked again; the rest is
    unknown, nowhere a number, and all that is known is what a judge says with whom nothing goes wrong."""
    met: Counter[int] = Counter()
    tried: Counter[str] = Counter()

    def chaos(n: int, body: Any) -> Any:
        text = body["messages"][0]["content"]
        how = way(shown(text, "response_a"), shown(text, "response_b"))
        if any(trial in text for trial in TRIAL) or how >= len(LASTING) + len(PASSING):
            return None
        tried[text] += 1
        if how >= len(LASTING) and tried[text] > 1:
            return None
        met[how] += 1
        fault = LASTING[how][0] if how < len(LASTING) else PASSING[how - len(LASTING)]
        return fault() if callable(fault) else fault

    server.instead = chaos
    keys = {"oracle.read_from": "text", "oracle.request_timeout_s": PATIENCE_S, "max_failed_labels": 0.4}
    done = warm_cli("run", config(**keys))
    assert done.returncode == 0, done.message
    assert set(met) == set(range(len(LASTING) + len(PASSING))), "each way was met"
    run = tmp_path / "runs/toy"
    with RunDirectory.open(run) as store:
        tables = {t: [store.read(t, name) for name in ("rollouts", "verdicts", "pairs")] for t in (1, 2)}
        compared = [
            row for t in (1, 2) for name in {"comparisons_0000", f"comparisons_{t - 1:04d}"} for row in store.read(t, name)
        ]
    for t, (rollouts, verdicts, pairs) in tables.items():
        clean = {row["prompt_id"]: said_of(row["texts"]) for row in rollouts}
        matrices = {}
        for row in verdicts:
            cells, lost = clean[row["prompt_id"]]
            assert (row["status"], row["preferences"]) == ("ok", cells)
            assert {one["kind"]: one["count"] for one in row["failed_replies"]} == lost
            known = tuple(tuple(math.nan if cell is None else cell for cell in line) for line in cells)
            matrices[row["prompt_id"]] = Verdict(annotator="", oracle_version="", preferences=known).matrix()
        assert len(matrices) == PROMPTS
        assert pairs
        for pair in pairs:
            prob = matrices[pair["prompt_id"]][pair["chosen"], pair["rejected"]]
            assert pair["prob"] == prob > 0.5, "what is trained on was said by the judge"
        share = figure(run, "oracle_replies_failed", t, phase="label", kind="all")
        assert share["n"] == 12 * PROMPTS
        assert share["value"] == sum(lost.total() for _, lost in clean.values()) / share["n"] > 0
    for row in compared:
        cells = [cell for line in row["preferences"] or [] for cell in line]
        lost = sum(one["count"] for one in row["failed_replies"])
        assert set(cells) <= {None, 0.0, 0.5, 1.0}
        assert row["status"] != "ok" or row["reused_from"] or cells.count(None) == 2 + lost
    found = json.loads(warm_cli("labels", run, "--json").stdout)
    paid = found["starts"]["calls"] + sum(row["calls"] for row in found["costs"])
    assert paid == len(server.asked), "every try is counted, and none twice"


def test_a_judge_that_loses_its_replies_stops_the_run_which_goes_on_when_it_is_repaired(config, warm_cli, tmp_path, server):
    """Each group keeps enough replies for a verdict, so not one of them is a failure. What was answered is not paid for again."""
    gone: list[str] = []

    def lossy(n: int, body: Any) -> Any:
        if n <= 5 or n % 4:
            return None
        gone.append(body["messages"][0]["content"])
        return GARBAGE

    file = config(**{"oracle.retries": 0, "oracle.max_requests": 1, "iterations": 1})
    server.instead = lossy
    stopped = warm_cli("run", file)
    run = tmp_path / "runs/toy"
    assert stopped.returncode == 1, stopped.message
    assert re.search(r"(\d+) of (\d+) replies failed \(\1 parse_fail\); first parse_fail: prompt '", stopped.stderr), (
        stopped.stderr
    )
    assert "max_failed_labels" in stopped.stderr
    with RunDirectory.open(run) as store:
        rows = {row["prompt_id"]: row for row in store.read(1, "verdicts")}
    assert {row["status"] for row in rows.values()} == {"ok"}
    lost = sum(one["count"] for row in rows.values() for one in row["failed_replies"])
    share = figure(run, "oracle_replies_failed", 1, phase="label", kind="all")
    assert (share["value"], share["n"]) == (lost / (12 * len(rows)), 12 * len(rows))
    assert share["value"] > 0.1
    assert figure(run, "oracle_replies_failed", 1, phase="label", kind="parse_fail")["value"] == share["value"]
    server.instead = lambda n, body: None
    done = warm_cli("resume", run)
    assert done.returncode == 0, done.message
    answered = Counter(asked(server)) - Counter(gone)
    assert sum(n - 1 for n in answered.values()) <= 1, "but for the one that was under way when the run stopped"
    with RunDirectory.open(run) as store:
        latest = {row["prompt_id"]: row for row in store.read(1, "verdicts")}
    assert len(latest) == PROMPTS
    for row in latest.values():
        assert (row["questions"], row["failed_replies"]) == (12, [])
        assert sum(cell is not None for line in row["preferences"] for cell in line) == 12
    for kind in ("all", "parse_fail"):
        assert figure(run, "oracle_replies_failed", 1, phase="label", kind=kind)["value"] == 0
    found = warm_cli("labels", run, "--json")
    costs = json.loads(found.stdout)["costs"]
    assert sum(row["failed_replies"] for row in costs) == lost
    assert f"{lost} of {sum(row['questions'] for row in costs)} replies failed" in warm_cli("labels", run).stdout


def test_with_a_limit_of_its_own_a_run_goes_on_with_what_a_judge_still_says(config, warm_cli, tmp_path, server):
    def lossy(n: int, body: Any) -> Any:
        return GARBAGE if n > 5 and n % 4 == 0 else None

    server.instead = lossy
    keys = {"oracle.retries": 0, "iterations": 1, "max_failed_labels": 0.5, "schedule.stream": True}
    done = warm_cli("run", config(**keys))
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    assert 0.1 < figure(run, "oracle_replies_failed", 1, phase="label", kind="all")["value"] < 0.5
    with RunDirectory.open(run) as store:
        assert len(store.read(1, "verdicts")) == PROMPTS
        assert store.read(1, "pairs")


def test_a_judge_that_always_names_the_first_teaches_nothing(config, warm_cli, tmp_path, server):
    server.label = lambda first, second: "A"
    done = warm_cli("run", config(**{"oracle.read_from": "text", "iterations": 1}))
    assert done.returncode == 0, done.message
    assert "ties" in done.stdout
    run = tmp_path / "runs/toy"
    for name, value in (("swap_disagreement", 1), ("first_place_wins", 1), ("longer_wins", 0.5)):
        record = figure(run, name, 1)
        assert (record["value"], record["ci_low"], record["ci_high"]) == (value, value, value)
        assert record["n"] > 6 * (PROMPTS - 1)
    with RunDirectory.open(run) as store:
        assert store.read(1, "pairs") == []


def test_a_wrong_key_stops_before_anything_starts(config, warm_cli, server):
    server.instead = lambda n, body: (401, {"error": {"message": "who are you?"}}, {})
    done = warm_cli("run", config())
    assert done.returncode == 2, done.message
    assert "oracle.api_key_env: " in done.stderr
    assert "who are you?" in done.stderr
    assert len(server.asked) == 1
