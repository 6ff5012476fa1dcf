"""A real model behind `vllm serve` as the judge: what it says in its log-probs, and not in what it writes, is the verdict."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.network import free_port
from onlinerl.oracles._judge.base import Judge
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Prompt, Query, Verdict

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
RESPONSES = ("Paris is the capital of France.", "I do not know, perhaps it is London.", "France has no capital.")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not MODEL.is_dir(), reason="`onlinerl fetch-model` has not been run"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    port = free_port("127.0.0.1")
    options = {"model": MODEL, "served-model-name": "judge", "host": "127.0.0.1", "port": port, "dtype": "float32"}
    limits = {"max-model-len": 1024, "max-num-seqs": 4}
    command = [
        sys.executable,
        "-m",
        "onlinerl.engines.openai.server",
        *(f"--{k}={v}" for k, v in {**options, **limits}.items()),
    ]
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    process = subprocess.Popen([*command, "--enforce-eager"], env={**os.environ, **own, "ONLINERL_DIE_WITH_PARENT": "1"})
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                with urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def judged(url: str, **knobs: object) -> tuple[Judge, Verdict]:
    knobs = {"base_url": url, "model": "judge", "rationale": False, "request_timeout_s": 300.0, **knobs}
    oracle = component({"name": "judge_pair", **knobs}, "oracle", "oracles", Oracle)
    try:
        oracle.open()
        prompt = Prompt(id="p", text="What is the capital of France?", token_ids=(1,))
        (verdict,) = oracle.ask([Query(prompt=prompt, responses=RESPONSES)])
        assert isinstance(verdict, Verdict), verdict
        return oracle, verdict
    finally:
        oracle.close()


@pytest.mark.parametrize("written", ["json_schema", "text"])
def test_the_verdict_is_that_of_the_model_s_own_logits_in_both_orders(served: str, written: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    oracle, verdict = judged(served, response_format=written, read_from="logprobs")

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    labels = [tokenizer.encode(label, add_special_tokens=False) for label in "AB"]
    assert all(len(tokens) == 1 for tokens in labels)
    expected = np.full((3, 3), np.nan)
    prompt = Prompt(id="p", text="What is the capital of France?", token_ids=(1,))
    oracle.open()
    for (i, j), (question,) in oracle._questions(prompt, RESPONSES).items():
        messages = [{"role": "user", "content": question.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text += '{"verdict": "' if written == "json_schema" else ""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(ids).logits[0, -1].double()
        expected[i, j] = float(logits[labels[0][0]] - logits[labels[1][0]])
    oracle.close()
    found = np.array(verdict.log_odds)
    print(written, found, expected, verdict.raw)
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(found[off], expected[off], atol=0.02)
    np.testing.assert_allclose(verdict.matrix()[off], (1 / (1 + np.exp(-(expected - expected.T) / 2)))[off], atol=0.01)
    assert verdict.cost.calls == 6
    assert verdict.cost.tokens_out > 0


def test_a_score_is_an_expectation(served: str) -> None:
    prompt = Prompt(id="p", text="What is the capital of France?", token_ids=(1,))
    knobs = {
        "base_url": served,
        "model": "judge",
        "rationale": False,
        "request_timeout_s": 300.0,
        "response_format": "json_schema",
    }
    oracle = component({"name": "judge_score", **knobs}, "oracle", "oracles", Oracle)
    try:
        oracle.open()
        (verdict,) = oracle.ask([Query(prompt=prompt, responses=RESPONSES)])
    finally:
        oracle.close()
    assert isinstance(verdict, Verdict), verdict
    print(verdict)
    assert all(1 < score < 5 for score in verdict.scores)
    assert any(score != round(score) for score in verdict.scores)
