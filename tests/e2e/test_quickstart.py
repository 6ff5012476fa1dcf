"""The quickstart on the real model and the real parts, cut down to one small iteration."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recorded import disagreements

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no models/SmolLM2-135M-Instruct: run `make fetch-model`"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run: its directory and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "onlinerl.cli", "run", "configs/quickstart.yaml", f"runs={runs}"]
    small = [
        "iterations=1",
        "prompts.per_iteration=8",
        "evaluation.prompts=12",
        "sampling.max_new_tokens=24",
        "engine.threads=1",  # other tests run beside it
        "learner.threads=1",
        "metrics.prometheus_port=0",
    ]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "quickstart", done.stdout


def metrics(directory: Path, name: str, **labels: str) -> list[float]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [r["value"] for r in records if r["name"] == name and labels.items() <= r["labels"].items()]


def test_what_is_shown(run):
    directory, _ = run
    shown = subprocess.run(
        [sys.executable, "-m", "onlinerl.cli", "show", str(directory), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    base, last = json.loads(shown.stdout)["iterations"]
    assert base["sync"]["proved"] is True
    assert last["sync"]["proved"] is True
    width = {"bfloat16": 2, "float32": 4}[yaml.safe_load((directory / "config.yaml").read_text())["engine"]["dtype"]]
    assert last["sync"]["bytes"] == width * 134515008  # every parameter once; the tied output matrix not twice
    assert last["samples"] == 32
    assert last["oracle_calls"] == 8 + 12
    assert base["kl_ref"] == 0
    assert 0 < last["kl_ref"] < 50
    assert last["win_rate"]["n"] == 12


def test_before_the_first_step_policy_and_reference_agree(run):
    """The DPO loss is ln 2 and the KL 0; a gap would have stopped the run."""
    _, out = run
    line = next(text for text in out.splitlines() if text.startswith("self-test"))
    assert f"loss {math.log(2):.6f}" in line
    assert "KL 0.0e+00" in line


def test_engine_and_learner_agree(run):
    """On the same tokens with the same weights, in both iterations."""
    directory, _ = run
    gaps, k3 = metrics(directory, "logp_mismatch", stat="mean"), metrics(directory, "logp_mismatch_k3")
    assert len(gaps) == len(k3) == 2
    assert max(gaps) < 0.06
    assert max(k3) < 0.01
    assert 0 < max(metrics(directory, "weight_sync_canary")) < 0.1


def test_every_figure_is_what_the_catalogue_says(run):
    """Those of the real learner and of the algorithm's loss as well."""
    directory, out = run
    assert disagreements(directory, "dpo") == []
    assert metrics(directory, "grad_norm")
    assert metrics(directory, "ranking_accuracy")
    assert "is recorded without a unit" not in out


def test_the_export_is_an_ordinary_model(run):
    directory, _ = run
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = directory / "exports" / "0001"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
