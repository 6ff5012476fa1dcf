"""A run that an earlier version stored, every key under its old name, is shown, read and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from older import with_old_keys

from onlinerl import Run, synonyms
from onlinerl.stores import _files
from onlinerl.stores.summary import summarise

EVERYWHERE = {
    "training.batch_size": 4,
    "training.lr_scheduler_type": "linear",
    "training.warmup_ratio": 0.25,
    "engine.max_num_seqs": 5,
    "learner.attn_implementation": "eager",
}
POLICY_GRADIENT = {"algorithm.kl_coef": 0.02, "algorithm.importance_sampling_cap": 3.0}
OWN = {
    "ppo": {**POLICY_GRADIENT, "algorithm.clip_range": 0.3, "algorithm.clip_range_value": 0.3},
    "grpo": {**POLICY_GRADIENT, "algorithm.clip_range_low": 0.1, "algorithm.clip_range_high": 0.3},
    "sppo": {"algorithm.pairs": "all"},
}


def test_every_renamed_key_is_tried():
    assert {*EVERYWHERE, *(key for own in OWN.values() for key in own)} == set(synonyms.RENAMED.values())


@pytest.mark.parametrize("algorithm", OWN)
def test_a_run_with_the_old_keys_opens_and_goes_on(toy_config, onlinerl, tmp_path, algorithm):
    keys = {"algorithm.name": algorithm, **EVERYWHERE, **OWN[algorithm]}
    assert onlinerl("run", toy_config(tmp_path / "whole", keys, iterations=2))[0] == 0
    assert onlinerl("run", toy_config(tmp_path / "parts", keys, iterations=1))[0] == 0
    run = tmp_path / "parts/runs/toy"
    written = with_old_keys(run)
    assert written == {old for old, new in synonyms.RENAMED.items() if new in keys}
    before = [path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()]

    assert onlinerl("show", run)[0] == 0
    opened = Run.open(run)
    assert (opened.config.training.batch_size, opened.config.engine.max_num_seqs) == (4, 5)
    for key, value in OWN[algorithm].items():
        assert opened.config.algorithm[key.partition(".")[2]] == value
    assert [path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()] == before, "reading changes nothing"

    code, message = onlinerl("resume", run, "iterations=2", "training.items_per_step=8")
    assert (code, "training.items_per_step: was renamed" in message) == (2, True), message
    code, message = onlinerl("resume", run, "iterations=2", "training.batch_size=8")
    assert (code, "training.batch_size: was 4 when the run started and is now 8" in message) == (2, True), message
    code, message = onlinerl("resume", run, "iterations=2")
    assert code == 0, message
    assert np.array_equal(*(np.load(tmp_path / half / "runs/toy/exports/0002/logits.npy") for half in ("whole", "parts")))
    assert len(summarise(run)["iterations"]) == 3
    assert old_keys(run) == set(), "what it is kept with has today's keys"
    assert _files.read_json(run / "manifest.json")["format"] == _files.FORMAT
    assert onlinerl("resume", run, "iterations=3")[0] == 0


def old_keys(run: Path) -> set[str]:
    stored = yaml.safe_load((run / "config.yaml").read_text())
    return {old for old in synonyms.RENAMED if old.partition(".")[2] in stored.get(old.partition(".")[0], {})}
