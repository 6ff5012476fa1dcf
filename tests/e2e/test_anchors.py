"""A run that examines its oracle by pairs whose better response is known, before anything is pushed and again later."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from preference_rows import taste, write_rows
from toy_runs import events, weights

from onlinerl.protocols.store import ANCHORS
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Group, Prompt, Rollout, Sampling

PAIRS = 40
JUDGE = """
import json, os, pathlib

GOOD = ("good", "great", "lovely")

def judge(queries):
    said = []
    for prompt, responses in queries_of(queries):
        with open(LOG, "a") as log:
            log.write(json.dumps([prompt, list(responses)]) + "\\n")
        if pathlib.Path(KILL).exists() and len(open(LOG).readlines()) == 25:
            os.kill(os.getpid(), 9)
        if pathlib.Path(SILENT).exists() and " poor" in responses:
            raise ValueError("nothing to say")
        sign = -1 if pathlib.Path(TURNED).exists() else 1
        said.append([sign * sum(response.count(word) for word in GOOD) for response in responses])
    return said

def queries_of(queries):
    return [(query["prompt"], query["responses"]) for query in queries]
"""


@pytest.fixture
def run(toy_config, warm_cli, tmp_path):
    """Runs, resumes or checks with a judge that likes good words, or their opposite while there is a file `turned`."""
    (tmp_path / "taste.py").write_text(
        f"LOG, TURNED, KILL, SILENT = {[str(tmp_path / name) for name in ('asked', 'turned', 'kill', 'silent')]!r}\n" + JUDGE
    )
    data = write_rows(tmp_path / "anchors.jsonl", taste(PAIRS))

    def command(name: str, *overrides: str, keys: dict[str, Any] | None = None, **spec: Any) -> Any:
        config = toy_config(
            tmp_path,
            {
                "oracle.name": "python",
                "oracle.function": "taste.judge",
                "oracle.groups_per_call": 4,
                "iterations": 2,
                "metrics.prometheus": False,
                "anchors.data": data,
                "anchors.apply_chat_template": False,
                **(keys or {}),
            },
        )
        return warm_cli(name, tmp_path / "runs/toy" if name != "run" and name != "check" else config, *overrides, **spec)

    return command


@pytest.fixture
def groups_of_words():
    def response(place: int, source: str) -> Rollout:
        return Rollout(
            token_ids=(),
            logprobs=(),
            text=source,
            finish_reason="stop",
            policy_version=-1,
            sampler=Sampling(),
            seed=place,
            source=source,
        )

    prompts = [Prompt(id=f"anchor-{i}", text=f"which {i}", token_ids=(i, 1)) for i in range(5)]
    return [Group(prompt=prompt, rollouts=(response(0, "chosen"), response(1, "rejected"))) for prompt in prompts]


def asked(folder: Path) -> list[tuple[str, ...]]:
    """What the judge was asked about known pairs, each time."""
    lines = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    words = {" good", " great", " lovely"}
    return [(prompt, *responses) for prompt, responses in lines if len(responses) == 2 and words & {*responses}]


def records(run: Path, *numbers: int) -> list[dict[str, Any]]:
    with RunDirectory.open(run) as opened:
        return [opened.phases(t)["examine"] for t in numbers]


def figures(run: Path, name: str) -> list[tuple[int, float]]:
    return [(r["iteration"], r["value"]) for r in read_metrics(run / "metrics.jsonl") if r["name"] == name]


def test_it_is_examined_once_before_anything_is_pushed(run, tmp_path):
    done = run("run", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert "the oracle is right about 1.000 [0.912, 1.000] of 40 pairs" in re.sub(r"\s+", " ", done.stdout)
    assert len(asked(tmp_path)) == len({*asked(tmp_path)}) == PAIRS
    toy = tmp_path / "runs/toy"
    assert [record["asked"] for record in records(toy, 0, 1, 2)] == [PAIRS, 0, 0]
    assert figures(toy, "anchor_accuracy")[0] == (0, 1.0)
    assert figures(toy, "anchor_agreement") == []
    marks = [event["kind"] for event in events(tmp_path / "log")]
    assert marks.index("after 0 examine") < marks.index("before 0 sync")


def test_training_is_as_without(run, tmp_path, toy_config, warm_cli):
    assert run("run").returncode == 0
    with_them = weights(tmp_path / "runs/toy", 2)
    assert run("run", "--fresh", keys={"anchors.data": None, "anchors.apply_chat_template": None}).returncode == 0
    assert (weights(tmp_path / "runs/toy", 2) == with_them).all()


def test_one_that_is_wrong_stops_the_run_before_anything_is_sampled_and_is_repaired(run, tmp_path):
    (tmp_path / "turned").touch()
    done = run("run")
    assert done.returncode == 1
    assert "anchors.min_accuracy" in done.stderr
    toy = tmp_path / "runs/toy"
    with RunDirectory.open(toy) as opened:
        assert opened.iterations() == [0]
        assert "sync" not in opened.phases(0)
    assert figures(toy, "anchor_accuracy")[0] == (0, 0.0), "said before the run ends"
    again = run("resume", "anchors.min_accuracy=0")
    assert again.returncode == 0, again.message
    assert len(asked(tmp_path)) == PAIRS, "what it has said is kept"


def test_one_that_is_wrong_about_a_source_stops_the_run(run, tmp_path):
    """Right about half of all, which 55 % may be; wrong about all of one source."""
    rows = taste(2 * PAIRS)
    for row in rows:
        if row["source"] == "odd":
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data = write_rows(tmp_path / "half.jsonl", rows)
    done = run("run", keys={"anchors.data": data, "anchors.min_accuracy": 0.55})
    assert done.returncode == 1
    assert "anchors.min_accuracy_by_source" in done.stderr
    assert "of 40 pairs of the source odd" in re.sub(r"\s+", " ", done.stderr)
    again = run("resume", "anchors.min_accuracy_by_source=0")
    assert again.returncode == 0, again.message


def test_what_changes_while_the_version_stays_is_seen(run, tmp_path):
    """A judge behind the same name that turns round after the first examination."""
    spec = {"keys": {"anchors.every": 1, "anchors.min_accuracy": 0.0}}
    stopped = run("run", log=tmp_path / "log", kill=["after 0 commit", 1], **spec)
    assert stopped.returncode == -signal.SIGKILL
    (tmp_path / "turned").touch()
    done = run("resume")
    assert done.returncode == 0, done.message
    toy = tmp_path / "runs/toy"
    assert figures(toy, "anchor_agreement") == [(1, 0.0), (2, 0.0)]
    shown = [row["examined"] for row in summarise(toy)["iterations"]]
    assert [(row["accuracy"]["value"], row["agreement"]) for row in shown] == [(1.0, None), (0.0, 0.0), (0.0, 0.0)]
    assert shown[0]["accuracy_by_source"].keys() == {"even", "odd"}
    assert [record["asked"] for record in records(toy, 0, 1, 2)] == [PAIRS] * 3
    assert len(asked(tmp_path)) == 3 * PAIRS


def test_it_stops_later_too(run, tmp_path):
    stopped = run("run", log=tmp_path / "log", kill=["after 0 commit", 1], keys={"anchors.every": 2})
    assert stopped.returncode == -signal.SIGKILL
    (tmp_path / "turned").touch()
    done = run("resume")
    assert done.returncode == 1
    assert "right about 0.000" in done.stderr
    with RunDirectory.open(tmp_path / "runs/toy") as opened:
        assert opened.phase_done(1, "commit")
        assert "sample" not in opened.phases(2)


@pytest.mark.parametrize("schedule", [{}, {"stream": True, "evaluate_beside": True}, {"stream": True, "max_lag": 1}])
def test_in_every_schedule(run, tmp_path, schedule):
    done = run("run", keys={"anchors.every": 1, **{f"schedule.{key}": value for key, value in schedule.items()}})
    assert done.returncode == 0, done.message
    assert [record["asked"] for record in records(tmp_path / "runs/toy", 0, 1, 2)] == [PAIRS] * 3


def killed_and_resumed(run: Any, tmp_path: Path, **spec: Any) -> None:
    assert run("run", keys={"anchors.every": 1}, **spec).returncode == -signal.SIGKILL
    (tmp_path / "anchors.jsonl").unlink()  # the run has its own
    (tmp_path / "kill").unlink(missing_ok=True)
    done = run("resume", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert [record["asked"] for record in records(tmp_path / "runs/toy", 0, 1, 2)] == [PAIRS] * 3


@pytest.mark.parametrize("moment", [["before 0 examine", 1], ["after 0 examine", 1], ["before 2 examine", 1]])
def test_killed_it_asks_nothing_twice(run, tmp_path, moment):
    killed_and_resumed(run, tmp_path, log=tmp_path / "log", kill=moment)
    assert len(asked(tmp_path)) == 3 * PAIRS


def test_killed_within_a_call_only_that_one_is_asked_again(run, tmp_path):
    (tmp_path / "kill").touch()
    killed_and_resumed(run, tmp_path)
    assert 3 * PAIRS < len(asked(tmp_path)) <= 3 * PAIRS + 4


def test_pairs_that_were_kept_by_half_are_kept_again(toy_config, tmp_path, groups_of_words):
    """Killed between the two steps in which a start keeps them."""
    with RunDirectory.create(tmp_path / "run", config_yaml="", manifest={}) as store:
        store.groups(0, ANCHORS).append(groups_of_words[:3])
        assert store.anchors() == []
        store.keep_anchors(groups_of_words)
        store.keep_prompts(train=[], heldout=[], anchors=[group.prompt for group in groups_of_words])
        store.keep_anchors(groups_of_words)
        assert store.anchors() == groups_of_words


@pytest.mark.parametrize("table", ["prompts/anchors.parquet", "iterations/0000/anchors.parquet"])
def test_damage_to_the_kept_pairs_is_noticed(run, tmp_path, table):
    assert run("run").returncode == 0
    (part,) = (tmp_path / "runs/toy" / table).glob("*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    done = run("resume", "iterations=3")
    assert done.returncode != 0
    assert "anchors" in done.stderr


def test_one_that_says_nothing_of_them_and_pairs_of_one_length(run, tmp_path):
    """No figure is made of nothing, and the record is readable all the same."""
    rows = [{"prompt": f"the {i}", "chosen": " good", "rejected": " poor"} for i in range(PAIRS)]
    write_rows(tmp_path / "anchors.jsonl", rows)
    assert run("run").returncode == 0
    (record,) = records(tmp_path / "runs/toy", 0)
    assert record["figures"]["length_bias"]["shorter_is_better"]["value"] is None
    (tmp_path / "silent").touch()
    done = run("run", "--fresh", keys={"anchors.min_accuracy": 1.0, "max_failed_labels": 1.0, "iterations": 1})
    assert done.returncode == 0, done.message
    assert "has said nothing of the pairs" in done.stdout
    (record,) = records(tmp_path / "runs/toy", 0)
    assert (record["failures"], record["figures"]["accuracy"]["n"]) == (PAIRS, 0)
    assert figures(tmp_path / "runs/toy", "anchor_ece") == []


def test_check_says_how_they_were_read_and_refuses_what_cannot_be(run, tmp_path):
    said = run("check")
    assert said.returncode == 0, said.message
    assert f"anchors.data: {PAIRS} comparisons" in said.stdout
    (tmp_path / "anchors.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    refused = run("check")
    assert refused.returncode == 2
    assert "anchors.columns.rejected" in refused.stderr
    gone = run("check", keys={"anchors.data": str(tmp_path / "nowhere.jsonl")})
    assert gone.returncode == 2
    assert "anchors.data" in gone.stderr


def test_labels_name_them_and_what_they_have_cost(run, tmp_path, warm_cli):
    assert run("run").returncode == 0
    found = json.loads(warm_cli("labels", tmp_path / "runs/toy", "--json").stdout)
    (row,) = [row for row in found["costs"] if row["phase"] == "examine"]
    assert (row["iteration"], row["labels"]) == (0, PAIRS)
    file = tmp_path / "labels.parquet"
    assert warm_cli("labels", tmp_path / "runs/toy", "--export", file).returncode == 0
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(file).to_pylist() if row["table"] == "anchor_verdicts"]
    assert len(rows) == PAIRS
    assert all(len(row["responses"]) == 2 and row["prompt"] for row in rows)
