"""A sweep on the toy parts: stopped and killed in the middle, resumed, and bit for bit what single runs give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything

from onlinerl import preflight
from onlinerl.config import CheckpointConfig
from onlinerl.engines.toy import Toy
from onlinerl.learners.toy import ToySync
from onlinerl.stores import labelled
from onlinerl.stores.directory import RunDirectory

ROOT = Path(__file__).parents[2]
FAILED, REFUSED, REQUEUE = 1, 2, 75
NAMES = ["dpo-seed0", "dpo-seed1", "grpo-seed0", "grpo-seed1"]
SENTIMENT = {"oracle.name": "sentiment", "oracle.function": None, "oracle.groups_per_call": None}
AXES = {"algorithm": ["dpo", "grpo"], "seed": [0, 1]}


@pytest.fixture
def sweep_file(toy_config, tmp_path):
    """Makes a sweep of two iterations in the test's folder; arguments are its keys, dotted ones and None as for `toy_config`."""

    def make(overrides: dict | None = None, **keys: object) -> Path:
        toy_config(tmp_path, {**COUNTED, "iterations": 2, **(overrides or {})}, file="base.yaml")
        tree = {"base": "base.yaml", "name": "both", "axes": AXES, **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return make


def asked(log: Path) -> int:
    """Groups that were judged, without the question at each start."""
    return sum(len(event["asked"]) for event in events(log) if event["kind"] == "judge" and "It was good" not in str(event))


def single(name: str, toy_config, warm_cli, tmp_path) -> Path:
    """The same combination as a run of its own."""
    algorithm, seed = name.split("-seed")
    keys = {**COUNTED, "algorithm.name": algorithm, "seed": int(seed), "iterations": 2}
    config = toy_config(tmp_path, keys, name=name, runs=str(tmp_path / "alone"), file=f"{name}.yaml")
    done = warm_cli("run", config, log=tmp_path / f"{name}.log")
    assert done.returncode == 0, done.message
    return tmp_path / "alone" / name


def test_killed_and_stopped_in_the_middle_it_is_bit_for_bit_what_single_runs_give(sweep_file, toy_config, warm_cli, tmp_path):
    file, folder = sweep_file(), tmp_path / "runs/both"
    logs = [tmp_path / f"log{i}" for i in range(4)]
    killed = warm_cli("sweep", file, log=logs[0], kill=["update", 2])  # in the second iteration of the first run
    assert killed.returncode == -9
    stopped = warm_cli("sweep", file, log=logs[1], stop=["update", 2])  # in the first iteration of the second one
    assert stopped.returncode == REQUEUE, stopped.message
    assert "start it again: the sweep goes on where it was" in stopped.stderr
    partly = json.loads(warm_cli("show", folder, "--json").stdout)
    assert [run["status"] for run in partly["runs"]] == ["finished", "not started", "interrupted", "not started"]
    done = warm_cli("sweep", file, log=logs[2])
    assert done.returncode == 0, done.message
    assert [run["status"] for run in json.loads(warm_cli("show", folder, "--json").stdout)["runs"]] == ["finished"] * 4
    again = warm_cli("sweep", file, log=logs[3])
    assert again.returncode == 0, again.message
    assert not logs[3].exists(), "nothing was left to do"
    for name in NAMES:
        alone = single(name, toy_config, warm_cli, tmp_path)
        assert everything(folder / name, 2) == everything(alone, 2), name
    # What the base model answers is asked once for each seed, and nothing twice; some iterates say what others have said.
    known = [row for name in NAMES for row in labelled.rows(folder / name) if row["iteration"] > 0 and row["reused_from"]]
    assert sum(map(asked, logs[:3])) + len(known) == len(NAMES) * 2 * (PROMPTS + HELDOUT) + 2 * HELDOUT


def test_its_table_and_its_plot(sweep_file, warm_cli, tmp_path, monkeypatch):
    done = warm_cli("sweep", sweep_file(), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    folder = tmp_path / "runs/both"
    found = json.loads(warm_cli("sweep", "sweep.yaml", "--show", "--json").stdout)
    assert found["sweep"] == "both"
    assert [run["name"] for run in found["runs"]] == NAMES
    for run in found["runs"]:
        report = json.loads(warm_cli("show", folder / run["name"], "--json").stdout)
        last = report["iterations"][-1]
        assert (run["iterations"], run["reward"], run["kl_ref"]) == (2, last["reward"], last["kl_ref"])
        assert run["win_rate"] == last["win_rate"]
        with RunDirectory.open(folder / run["name"]) as opened:
            tokens = sum(len(ids) for t in (1, 2) for row in opened.read(t, "rollouts") for ids in row["token_ids"])
            assert run["tokens"] == tokens
        assert run["seconds"] > 0
        assert [row["iteration"] for row in run["history"]] == [0, 1, 2]
    # The second algorithm takes the verdicts on the base model over.
    assert [run["labels"] for run in found["runs"]] == [2 * (PROMPTS + HELDOUT) + extra for extra in (HELDOUT, HELDOUT, 0, 0)]
    shown = warm_cli("show", folder)
    assert all(name in shown.stdout for name in NAMES)
    assert "win rate vs base" in shown.stdout
    assert str(folder / "sweep.svg") in shown.stdout
    drawing = (folder / "sweep.svg").read_text()
    ElementTree.fromstring(drawing)
    for word in ("dpo", "grpo", "frontier", "KL (nats), spaced by its square root", "iteration", "win rate"):
        assert f">{word}<" in drawing
    written_into_the_documents(folder, found["runs"], monkeypatch)


def written_into_the_documents(folder: Path, runs: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_figures

    place = folder.parent
    monkeypatch.setattr(readme_figures, "ROOT", place)
    (place / "docs").mkdir()
    (place / "docs/results.md").write_text((ROOT / "docs/results.md").read_text())
    readme_figures.main("sweep", str(folder))
    results = (place / "docs/results.md").read_text()
    for run in runs:
        assert (
            f"| `{run['name']}` | {run['history'][0]['reward']:.2f} | {run['reward']:.2f} | {run['kl_ref']:.1f} | " in results
        )
    assert (place / "docs/both.svg").read_text() == (folder / "sweep.svg").read_text()


def test_a_run_that_fails_is_recorded_and_tried_again(sweep_file, warm_cli, tmp_path):
    file, folder = sweep_file(axes={"algorithm": ["dpo", "grpo"]}), tmp_path / "runs/both"
    # dpo's first question about its rollouts is not answered: 1 is the trial of the check, 2 that of the run, 3 to 5 the base model's.
    failed = warm_cli("sweep", file, log=tmp_path / "log0", down=["judge", 6])
    assert failed.returncode == FAILED, failed.message
    found = json.loads(warm_cli("show", folder, "--json").stdout)
    assert [run["status"] for run in found["runs"]] == ["failed", "finished"]
    assert found["runs"][0]["state"].startswith("failed: oracle")
    assert "dpo: failed: oracle" in failed.stdout
    again = warm_cli("sweep", file, log=tmp_path / "log1")
    assert again.returncode == 0, again.message
    assert "run 1 of 1" in again.stdout
    assert [run["status"] for run in json.loads(warm_cli("show", folder, "--json").stdout)["runs"]] == ["finished"] * 2


def test_one_that_failed_and_was_resumed_by_itself_counts_as_failed_no_more(sweep_file, warm_cli, tmp_path):
    file = sweep_file(axes={"algorithm": ["dpo", "grpo"]})
    failed = warm_cli("sweep", file, log=tmp_path / "log0", down=["judge", 6])
    assert failed.returncode == FAILED, failed.message
    resumed = warm_cli("resume", tmp_path / "runs/both/dpo", log=tmp_path / "log1")
    assert resumed.returncode == 0, resumed.message
    again = warm_cli("sweep", file, log=tmp_path / "log2")
    assert again.returncode == 0, again.message
    assert not (tmp_path / "log2").exists(), "nothing was left to do"


# --- what is refused before anything starts ---


def test_everything_that_is_refused_is_said_at_once(sweep_file, warm_cli, tmp_path):
    keys = {"axes": {"algorithm": ["dpo", "grpo", "ppo"], "pairing": ["best_worst", None]}}
    done = warm_cli("sweep", sweep_file(SENTIMENT, **keys))
    assert done.returncode == REFUSED, done.message
    assert "2 of 6 combinations cannot run" in done.stderr
    assert "grpo-best_worst:\n    pairing: grpo trains no pairs" in done.stderr
    assert "ppo-best_worst:\n    pairing: ppo trains no pairs" in done.stderr
    assert not list((tmp_path / "runs/both").glob("*/manifest.json"))
    left = warm_cli("sweep", sweep_file(SENTIMENT, **keys, exclude_refused=True), "--check")
    assert left.returncode == 0, left.message
    assert "grpo-best_worst is left out: pairing: grpo trains no pairs" in left.stdout
    assert "both: 4 runs in" in left.stdout


def test_prompts_without_what_one_algorithm_needs_are_left_out_for_it_alone(sweep_file, warm_cli):
    file = sweep_file(SENTIMENT, axes={"algorithm": ["dpo", "spin"]}, exclude_refused=True)
    left = warm_cli("sweep", file, "--check")
    assert left.returncode == 0, left.message
    assert re.search(r"spin is left out: prompts\.train: .* no reference answer, which the algorithm needs", left.stdout)
    assert "both: 1 runs in" in left.stdout


@pytest.mark.parametrize("first", ["dpo", "upo"])
def test_what_an_oracle_does_not_give_is_found_before_the_first_run(sweep_file, warm_cli, first):
    """It is asked once, and its answer is held against every algorithm."""
    algorithms = [first, "upo" if first == "dpo" else "dpo", "constrained"]
    file = sweep_file(SENTIMENT, axes={"algorithm": algorithms}, exclude_refused=True)
    left = warm_cli("sweep", file, "--check")
    assert left.returncode == 0, left.message
    assert "upo is left out: oracle.name: sentiment as configured judges each pair once" in left.stdout


def test_an_oracle_is_asked_once_about_all_runs(sweep_file, warm_cli, tmp_path):
    assert warm_cli("sweep", sweep_file(), "--check", log=tmp_path / "log").returncode == 0
    questions = [event for event in events(tmp_path / "log") if event["kind"] == "judge"]
    assert len(questions) == 1, "a question may cost money"


def test_prompts_that_serve_nobody_are_never_left_out(sweep_file, warm_cli):
    file = sweep_file(SENTIMENT, axes={"prompts.heldout": ["heldout.jsonl", "gone.jsonl"]}, exclude_refused=True)
    done = warm_cli("sweep", file, "--check")
    assert done.returncode == REFUSED, done.message
    assert "1 of 2 combinations cannot run" in done.stderr
    assert "gone.jsonl" in done.stderr


def test_a_disk_that_would_be_full_before_the_last_run_is_said_before_the_first(sweep_file, onlinerl, tmp_path, monkeypatch):
    half = shutil.disk_usage(tmp_path).free // 2
    monkeypatch.setattr(preflight.Checked, "kept_bytes", property(lambda self: half))
    code, message = onlinerl("sweep", sweep_file({**SENTIMENT, "iterations": 1}, axes={"algorithm": ["dpo", "grpo"]}))
    assert code == REFUSED
    assert "checkpoints.when_finished: the runs that are left will keep" in message
    assert not list((tmp_path / "runs/both").glob("*/manifest.json"))
    assert onlinerl("sweep", sweep_file({**SENTIMENT, "iterations": 1}, axes={"algorithm": ["dpo"]}))[0] == 0
    assert onlinerl("sweep", sweep_file({**SENTIMENT, "iterations": 1}, axes={"algorithm": ["dpo", "grpo"]}))[0] == 0, (
        "one is left"
    )


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, 2 * 20 + 4 * 3),
        ({"exports": "last"}, 2 * 20 + 2 * 3),
        ({"keep": 9, "exports": "best"}, 4 * 20 + 3 * 3),
        ({"when_finished": "remove"}, 4 * 3),
        ({"when_finished": "remove", "exports": "last"}, 3),
        ({"when_finished": "remove", "exports": "best"}, 2 * 3),
    ],
)
def test_what_a_run_leaves_on_the_disk_is_known_before(keys, kept):
    config = SimpleNamespace(checkpoints=CheckpointConfig(**keys), iterations=4)
    checked = SimpleNamespace(config=config, state_bytes=23, export_bytes=3)
    assert preflight.Checked.kept_bytes.fget(checked) == kept


def test_what_was_left_out_is_in_the_table(sweep_file, warm_cli, tmp_path):
    keys = {"axes": {"algorithm": ["dpo", "grpo"], "pairing": ["ranked"]}, "exclude_refused": True}
    done = warm_cli("sweep", sweep_file({"iterations": 1}, **keys), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    found = json.loads(warm_cli("show", tmp_path / "runs/both", "--json").stdout)
    assert [run["name"] for run in found["runs"]] == ["dpo-ranked"]
    assert found["refused"]["grpo-ranked"].startswith("pairing: grpo trains no pairs")


def test_a_changed_sweep_says_what_changed(sweep_file, warm_cli, tmp_path):
    axes = {"algorithm": ["dpo"]}
    assert warm_cli("sweep", sweep_file({"iterations": 1}, axes=axes), log=tmp_path / "log").returncode == 0
    other = warm_cli("sweep", sweep_file({"iterations": 1}, axes=axes, set={"training.learning_rate": 0.1}))
    assert other.returncode == REFUSED
    assert "dpo:\n    training.learning_rate: was 0.2 when the run started and is now 0.1" in other.stderr
    assert "give the changed sweep another name" in other.stderr
    more = warm_cli("sweep", sweep_file(axes={"algorithm": ["ipo"]}, set={"iterations": 2}), log=tmp_path / "log")
    assert more.returncode == 0, more.message
    assert "not in the sweep any more, and left as they are: dpo" in more.stdout
    longer = warm_cli("sweep", sweep_file(axes=axes, set={"iterations": 3}), log=tmp_path / "log")
    assert longer.returncode == 0, longer.message
    assert "changed: iterations=3 from now on, in dpo" in longer.stdout
    found = json.loads(warm_cli("show", tmp_path / "runs/both", "--json").stdout)
    assert [(run["name"], run["iterations"]) for run in found["runs"]] == [("dpo", 3)]


def test_two_sweeps_of_one_name_do_not_run_at_once(sweep_file, warm_cli, tmp_path):
    file = sweep_file()
    first = warm_cli.start("sweep", file, log=tmp_path / "log", wait=["update", 1])
    warm_cli.wait_for(tmp_path / "log", "waiting")
    second = warm_cli("sweep", file)
    assert second.returncode == REFUSED, second.message
    assert "is in use by process" in second.stderr
    first[0].kill()


# --- what stays up ---


def test_the_engine_stays_up_and_nothing_of_it_leaks(sweep_file, onlinerl, tmp_path, monkeypatch):
    opened = []

    def open_(self, *arguments, original=Toy.open):
        opened.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(Toy, "open", open_)
    pushed = []

    def push(self, version, model="policy", original=ToySync.push):
        pushed.append(version)
        return original(self, version, model)

    monkeypatch.setattr(ToySync, "push", push)
    code, message = onlinerl("sweep", sweep_file(SENTIMENT))
    assert code == 0, message
    assert len(opened) == 1, "one engine for all four runs"
    assert pushed == [0, 1, 2] * 4, "each begins by giving it all weights"


def test_weights_of_the_run_before_are_noticed(sweep_file, onlinerl, tmp_path, monkeypatch):
    """Planted: the first push of the second run does not reach the engine, which still holds what the first run has trained."""
    pushes = []

    def push(self, version, model="policy", original=ToySync.push):
        pushes.append(version)
        if len(pushes) != 4:
            return original(self, version, model)
        self._write, kept = lambda weights, version: None, self._write
        try:
            return original(self, version, model)
        finally:
            self._write = kept

    monkeypatch.setattr(ToySync, "push", push)
    code, message = onlinerl("sweep", sweep_file(SENTIMENT, axes={"algorithm": ["dpo", "ipo"]}))
    assert code == FAILED, message
    record = json.loads((tmp_path / "runs/both/sweep.json").read_text())
    assert record["failed"] == {"ipo": "sync: sync: the engine does not hold the learner's weights"}
