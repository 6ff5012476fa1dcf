"""Runs from Python: what a notebook does with them, while they run too; and docs/python-api.md as printed."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading

import documents
import pandas as pd
import pyarrow as pa
import pytest
from values import groups

import onlinerl
from onlinerl import Run, list_runs, load_config
from onlinerl.errors import ConfigError, OnlineRLError, StoreError
from onlinerl.stores import _journal, summary
from onlinerl.stores.directory import RunDirectory
from onlinerl.views import tables

ITERATIONS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_config):
    """A folder with a finished run that was started from Python."""
    folder = tmp_path_factory.mktemp("notebook")
    config = load_config(toy_config(folder), {"iterations": ITERATIONS, "runs": str(folder / "runs"), "algorithm.beta": 0.2})
    run = Run.start(config, quiet=True)
    assert run.path == folder / "runs/toy"
    return folder


@pytest.fixture
def run(folder):
    return Run.open(folder / "runs/toy")


def test_what_was_started_is_what_was_configured(run, folder):
    assert (run.name, run.status, run.iterations) == ("toy", "finished", [0, 1, 2])
    assert (run.config.algorithm["name"], run.config.algorithm["beta"]) == ("dpo", 0.2)
    assert repr(run) == f"Run({str(folder / 'runs/toy')!r}: finished, iterations 0, 1, 2)"
    assert [each.path for each in list_runs(folder / "runs")] == [run.path]


def test_a_damaged_run_does_not_hide_the_others(run, tmp_path):
    for name in ("damaged", "sound"):
        shutil.copytree(run.path, tmp_path / name)
    (tmp_path / "damaged/manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged is left out: .*manifest.json"):
        assert [each.name for each in list_runs(tmp_path)] == ["sound"]


def test_figures(run):
    assert run.summary() == summary.summarise(run.path)
    history = run.history()
    assert list(history.iteration) == [0, 1, 2]
    assert history.win_rate_value.notna().tolist() == [False, True, True]
    assert {"reward", "kl_ref", "phases_sample", "sync_bytes", "length"} <= {*history.columns}
    rewards = run.metrics("reward")
    assert list(rewards.name) == ["reward"] * 3
    assert list(rewards.value) == pytest.approx([row["reward"] for row in run.summary()["iterations"]])
    assert len(run.metrics()) > 50
    labelled = run.metrics()
    labelled = labelled[labelled.labels != ""]
    assert len(labelled) > 0
    assert labelled.labels.str.fullmatch(r"(\w+=\S+ ?)+").all()
    assert list(run.metrics("nothing").columns) == list(run.metrics("reward").columns)
    assert {*run.timeline().phase} >= {"sample", "train", "commit"}


def test_tables_agree_with_each_other_in_both_formats(run):
    assert {"rollouts", "verdicts", "pairs", "logprobs", "evaluation"} <= {*run.tables()}
    rollouts = run.table("rollouts", iteration=2)
    assert isinstance(rollouts, pd.DataFrame)
    assert len(rollouts) == 8
    assert (rollouts.iteration == 2).all()
    assert rollouts.texts.map(len).tolist() == [4] * 8
    every = run.table("rollouts")
    assert sorted({*every.iteration}) == [1, 2]
    pairs = run.table("pairs", iteration=2).merge(rollouts, on="prompt_id")
    assert len(pairs) > 0
    assert all(texts[chosen] == text for texts, chosen, text in zip(pairs.texts, pairs.chosen, pairs.chosen_text, strict=True))
    for name in run.tables():
        arrow, frame = run.table(name, format="arrow"), run.table(name)
        assert isinstance(arrow, pa.Table)
        assert arrow.column_names == list(frame.columns)
        assert arrow.num_rows == len(frame)
    assert run.table("rollouts", iteration=2, format="arrow").to_pylist() == rollouts.to_dict("records")


def test_samples_and_exports(run):
    assert run.samples(limit=1) == summary.samples(run.path, 2, 1)
    [own] = run.samples(0, limit=1, heldout=True)
    assert len(own["responses"]) == 1
    assert run.export_path() == run.path / "exports/0002"
    assert (run.export_path(2) / "logits.npy").exists()


def test_a_column_that_mixes_types_is_text_in_arrow():
    table = tables.converted([{"value": 1, "x": 0.5}, {"value": "one"}], "arrow")
    assert [json.loads(cell) for cell in table["value"].to_pylist()] == [1, "one"]
    assert table["x"].to_pylist() == [0.5, None]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda run: Run.open(run.path / "nothing"), "holds no run"),
        (lambda run: run.table("rolouts"), "no table 'rolouts'"),
        (lambda run: run.table("rollouts", format="polars"), "choose 'pandas' or 'arrow'"),
        (lambda run: run.export_path(9), "no export of iteration 9"),
        (lambda run: run.samples(9), "no samples of iteration 9"),
        (lambda run: run.resume("iterations=3"), "give a mapping"),
        (lambda run: run.resume({"sampling.temperature": 2.0}), "sampling.temperature"),
        (lambda run: load_config(run.path / "config.yaml", {"training.learning_rat": 1}), "learning_rate"),
    ],
)
def test_what_is_wrong_is_named(run, wrong, said):
    with pytest.raises(OnlineRLError) as caught:
        wrong(run)
    assert said in str(caught.value)
    assert caught.value.fix


def test_overrides_keep_their_types(run):
    file = run.path / "config.yaml"
    both = [{"name": "1e5", "iterations": 7, "prompts.reuse": True}, ["name='1e5'", "iterations=7", "prompts.reuse=true"]]
    first, second = (load_config(file, overrides) for overrides in both)
    assert first == second
    assert (first.name, first.iterations, first.prompts.reuse) == ("1e5", 7, True)
    with pytest.raises(ConfigError):
        load_config(file, {"iterations": "7"})


def test_without_pandas(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OnlineRLError, match=r"pandas is not installed\n  fix: pip install pandas, or ask for format='arrow'"):
        run.table("rollouts")
    assert run.table("rollouts", format="arrow").num_rows == 16


def test_a_thread_is_refused_before_anything_is_done(run):
    caught: list[BaseException] = []

    def resume() -> None:
        try:
            run.resume({"iterations": 9})
        except OnlineRLError as error:
            caught.append(error)

    thread = threading.Thread(target=resume)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
    assert run.config.iterations == ITERATIONS


def test_a_run_is_read_while_another_process_works_on_it_and_resumed_when_that_is_gone(toy_config, warm_cli, tmp_path):
    log = tmp_path / "events.jsonl"
    config = toy_config(tmp_path, {"oracle.name": "python", "oracle.function": "hooks.judge", "iterations": 1})
    process, _ = warm_cli.start(
        "run", config, log=log, wait=["judge", 14]
    )  # 1 question at the start, 10 of the base model, 8 labels
    warm_cli.wait_for(log, "waiting")
    run = Run.open(tmp_path / "runs/toy")
    assert run.status == "running"
    assert len(run.table("rollouts", 1)) == 8
    assert len(run.table("verdicts", 1)) < 8, "only what is durable"
    assert run.history().status.tolist() == ["promoted", "running"]
    assert len(run.samples(limit=8)) == 8
    with pytest.raises(StoreError, match="is in use by process"):
        run.resume()
    process.kill()
    process.join()
    assert run.status == "interrupted"
    assert warm_cli("resume", run.path, log=log).returncode == 0
    assert run.status == "finished"
    assert len(run.table("verdicts", 1)) == 8


def test_a_table_is_seen_whole_while_it_is_completed(tmp_path, monkeypatch):
    """The journal is looked for, and gone by the time it is read: the Parquet file is there by then."""
    manifest = {"name": "demo", "config_digest": "x", "fingerprint": {}}
    with RunDirectory.create(tmp_path / "demo", config_yaml="", manifest=manifest) as store:
        table = store.groups(1, "rollouts")
        table.append(groups(2))
        original = _journal.read

        def late(path):
            monkeypatch.setattr(_journal, "read", original)
            table.seal()
            return original(path)

        monkeypatch.setattr(_journal, "read", late)
        assert len(Run.open(store.path).table("rollouts", 1)) == 2
        assert table.sealed


def test_the_package_offers_what_it_says():
    stub = (documents.ROOT / "onlinerl/__init__.pyi").read_text()
    assert re.findall(r"as (\w+)$", stub, flags=re.MULTILINE) == sorted(onlinerl.__all__)
    assert all(getattr(onlinerl, name) for name in onlinerl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        onlinerl.Trainer  # noqa: B018


def test_the_document_runs_as_printed(sandbox, capsys):
    document = documents.ROOT / "docs/python-api.md"
    names: dict[str, object] = {}
    blocks = documents.scripts(document)
    assert len(blocks) == 9
    for block in blocks:
        documents.execute(document, block, names)
    said = capsys.readouterr().out
    assert "finished" in said
    assert "from-python (dpo)" in said
    listed = {line.split("|")[1].strip(" `") for line in document.read_text().splitlines() if line.startswith("| `")}
    assert {"rollouts", "verdicts", "logprobs", "pairs"} <= listed
    of_others = {"replay_logprobs", "selection", "anchors`, `anchor_verdicts"}  # tables that this run has no use for
    assert listed <= {*Run.open("runs/from-python").tables(), "evaluation`, `evaluation_verdicts", *of_others}
