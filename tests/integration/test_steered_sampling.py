"""Runs on real vLLM whose groups hold more than what a policy samples freely: responses that begin with a stored answer, and responses of a
mixture of policy and reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ANSWER = "the actor was nice and the plot was superb"
WEIGHT, TEMPERATURE, MAX_NEW = 0.375, 0.7, 10
CASES = {
    "nash_md": {"name": "nash_md", "mixture_coef": WEIGHT, "tau": 0.01},
    "dr_po": {"name": "dr_po", "p_reset": 0.7, "mask_value": False, "kl_in": "reward"},
}


def run_of(folder: Path, model: Path, name: str, **more: Any) -> Path:
    """The directory of a run of two iterations that came to its end."""
    (folder / "separates.py").write_text(
        "import zlib\n\n\ndef judge(groups):\n    return [[zlib.crc32(r.encode()) / 2**32 for r in g['responses']] for g in groups]\n"
    )
    words = ["old", "new", "long", "short", "slow", "fast", "dark", "light"]
    openings = [{"text": f"the film was {word} and the story", "reference_answer": ANSWER} for word in words]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, openings)))
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": f"the music {w} the camera"}) for w in ("of", "and")))
    config = {
        "name": name,
        "runs": str(folder / "runs"),
        "model": str(model),
        "iterations": 2,
        "algorithm": CASES[name],
        "oracle": {"name": "python", "function": "separates.judge"},
        "prompts": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "per_iteration": 4,
        },
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": MAX_NEW, "temperature": TEMPERATURE},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "engine": {"kv_cache_gib": 0.1, "dtype": "float32", "max_num_seqs": 8},
        "learner": {"name": "torch", "dtype": "float32"},
        "cluster": {"device": "cpu"},
        "metrics": {"prometheus": False},
        "checkpoints": {"min_free_gib": 0},
        **more,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "onlinerl.cli", "run", str(file)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "runs" / name


def forced(models: list[tuple[float, Any]], before: list[int], tokens: list[int]) -> np.ndarray:
    """Log-probs f32[T] of a weighted sum of the models' logits, at the temperature."""
    ids = torch.tensor([[*before, *tokens]])
    with torch.no_grad():
        logits = sum(weight * model(input_ids=ids).logits[0, len(before) - 1 : -1] for weight, model in models)
    return torch.log_softmax(logits / TEMPERATURE, dim=-1)[torch.arange(len(tokens)), tokens].numpy()


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rollouts(run: Path, iteration: int) -> list[dict[str, Any]]:
    with RunDirectory.open(run) as opened:
        rows: list[dict[str, Any]] = opened.read(iteration, "rollouts")
        return rows


@pytest.mark.long
def test_the_mixture_is_that_of_the_policy_which_vllm_samples_and_the_base_model(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_llama, "nash_md")
    base, policy = loaded(tiny_llama), loaded(run / "exports/0001")
    for row in rollouts(run, 2):
        assert row["sources"] == ["policy", "policy", "mixture"]
        assert row["policy_versions"] == [1, 1, 1]
        for source, tokens, logprobs in zip(row["sources"], row["token_ids"], row["logprobs"], strict=True):
            models = [(1.0, policy)] if source == "policy" else [(1 - WEIGHT, policy), (WEIGHT, base)]
            said = forced(models, row["prompt_token_ids"], list(tokens))
            np.testing.assert_allclose(logprobs, said, atol=1e-3)
    apart = [
        forced([(1.0, policy)], row["prompt_token_ids"], list(row["token_ids"][2])) - np.array(row["logprobs"][2])
        for row in rollouts(run, 2)
    ]
    assert max(abs(each).max() for each in apart) > 1e-2, "or the policy is the mixture"
    assert all(row["sync"]["proved"] for row in summarise(run)["iterations"])


@pytest.mark.long
def test_vllm_goes_on_from_a_stored_answer_and_the_learner_agrees(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_llama, "dr_po")
    policy, tokenizer = loaded(run / "exports/0001"), AutoTokenizer.from_pretrained(tiny_llama)
    begun = 0
    with RunDirectory.open(run) as opened:
        answers = {prompt.id: prompt.answer_ids for prompt in opened.prompts("train") or ()}
        known = {row["prompt_id"]: row for row in opened.read(2, "logprobs")}
    for row in rollouts(run, 2):
        (prefix,) = {tuple(each) for each in row["prefix_ids"]}
        begun += bool(prefix)
        assert prefix == answers[row["prompt_id"]][: len(prefix)]
        for k, (tokens, logprobs, text) in enumerate(zip(row["token_ids"], row["logprobs"], row["texts"], strict=True)):
            before = [*row["prompt_token_ids"], *prefix]
            np.testing.assert_allclose(logprobs, forced([(1.0, policy)], before, list(tokens)), atol=1e-3)
            assert text.split() == tokenizer.decode([*prefix, *tokens], skip_special_tokens=True).split()
            old = known[row["prompt_id"]]["old_logprobs"][k]
            np.testing.assert_allclose(old[len(prefix) :], logprobs, atol=1e-3)
            assert len(old) == len(prefix) + len(tokens)
    assert begun > 0
    assert all(row["sync"]["proved"] for row in summarise(run)["iterations"])
