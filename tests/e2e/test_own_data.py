"""Data as they are published, from a configuration of a few lines: what `data` shows of them, and a run on them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

ROOT = Path(__file__).parents[2]
REFUSED = 2
QUESTIONS = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(30)]


def ask(what):
    return {"role": "user", "content": what}


def answer(what):
    return {"role": "assistant", "content": what}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Questions with two that come again, one that is held out, and one that is far too long."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train = [*QUESTIONS[:20], *QUESTIONS[:2], QUESTIONS[20], {"question": "why " * 200, "answer": "#### 0"}]
    for name, rows in (("train", train), ("test", QUESTIONS[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompts.name": "dataset", "prompts.train": "train.jsonl", "prompts.heldout": "test.jsonl"}
    return {**keys, "prompts.max_tokens": 128, "prompts.per_iteration": 8, "evaluation.prompts": None}


FOREIGN = {
    "trl.jsonl": (
        [
            json.dumps({"prompt": [ask(what)], "chosen": [answer("Yes.")], "rejected": [answer("No.")]})
            for what in ("Is the sky blue?", "Is grass green?")
        ],
        "preferences (TRL)",
    ),
    "openrlhf.jsonl": ([json.dumps({"context_messages": [ask(what)]}) for what in ("Is it?", "Why?")], "OpenRLHF, as messages"),
    "own.csv": (["question,answer", "What is 2+2?,4", "What is 3+5?,8"], "questions"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats_are_known_from_five_lines(warm_cli, name, monkeypatch, tmp_path):
    """A newcomer's way: the quickstart's configuration, and one's own file; what is missing is said."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, form = FOREIGN[name]
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    five = [
        f"extends: {ROOT}/configs/quickstart.yaml",
        "name: mine",
        f"prompts: {{train: {tmp_path / name}, heldout: {tmp_path / name}}}",
    ]
    (tmp_path / "mine.yaml").write_text("\n".join(five))
    refused = warm_cli("data", tmp_path / "mine.yaml")
    assert refused.returncode == REFUSED
    assert "prompts.name=dataset reads" in refused.stderr
    five[2:] = [
        f"prompts: {{name: dataset, train: {tmp_path / name}, heldout: {tmp_path / name},",
        '  train_split: "train[:1]", heldout_split: "train[1:]"}',
    ]
    assert len(five) <= 5
    (tmp_path / "mine.yaml").write_text("\n".join(five))
    shown = warm_cli("data", tmp_path / "mine.yaml")
    assert shown.returncode == 0, shown.stderr
    assert f"prompts.train: 1 prompts of {tmp_path / name}, read as {form}" in shown.stdout
    assert "overlap: none" in shown.stdout


def test_data_shows_what_the_model_sees(toy_config, warm_cli, files, tmp_path):
    config = toy_config(tmp_path, files)
    shown = warm_cli("data", config, "--limit", "1")
    assert shown.returncode == 0, shown.stderr
    for part in (
        "21 prompts of",
        "read as questions; left out: 2 that come again, 1 that are held out",
        "prompts.train: 21 prompts (21 conversations, 0 texts to continue), 21 with a reference answer",
        "1 are longer than prompts.max_tokens, 128: a run refuses them",
        "prompts.heldout: 10 prompts",
        "reference answer: 'It is 0.\\n#### 0'",
        "overlap: none",
        "│",
    ):
        assert part in shown.stdout, part
    found = json.loads(warm_cli("data", config, "--limit", "2", "--json").stdout)
    assert found["train"]["shown"][0]["tokens"][:4] == ["user", ":", "[unk]", "is"]
    assert found["train"]["too_long"] == 1
    assert sum(count for _, count in found["train"]["histogram"]) == found["train"]["prompts"] == 21
    assert len(found["heldout"]["shown"]) == 2


def test_a_run_on_them_keeps_them(toy_config, warm_cli, files, tmp_path):
    config = toy_config(tmp_path, files)
    refused = warm_cli("run", config)
    assert refused.returncode == 2
    assert "prompts.filter_overlong_prompts=true" in refused.stderr
    lenient = ["prompts.filter_overlong_prompts=true", "iterations=1"]
    ran = warm_cli("run", config, *lenient)
    assert ran.returncode == 0, ran.stderr
    assert "prompts.train: 1 of 21 left out, longer than 128 tokens" in ran.stdout
    resumed = warm_cli("resume", tmp_path / "runs/toy", "iterations=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "has changed" not in resumed.stdout
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What is new?", "answer": "#### 1"}) + "\n")
    again = warm_cli("resume", tmp_path / "runs/toy", "prompts.reuse=true", "iterations=3")
    assert "prompts.train has changed since the run started: 1 added" in again.stdout


def test_of_a_model_that_is_not_here_the_words_are_shown(toy_config, warm_cli, files, tmp_path):
    shown = warm_cli("data", toy_config(tmp_path, {**files, "model": "org/not-here"}))
    assert shown.returncode == 0, shown.stderr
    assert "user: What is 0 plus 0?" in shown.stdout
    assert "org/not-here is not on this machine: nothing was rendered" in shown.stdout


def test_what_an_algorithm_adds_to_them_is_said(toy_config, warm_cli, files, tmp_path):
    shown = warm_cli("data", toy_config(tmp_path, {**files, "algorithm.name": "reward_augmented"}), "--limit", "0")
    assert shown.returncode == 0, shown.stderr
    assert "reward_augmented puts '" in shown.stdout


def test_prompts_in_both_files_are_counted(toy_config, warm_cli, files, tmp_path):
    shown = warm_cli(
        "data", toy_config(tmp_path, {**files, "prompts.heldout": "train.jsonl", "prompts.filter_duplicates": False})
    )
    assert "holds the same prompt as" in shown.stderr
