"""A real model behind `vllm serve` as the judge: what it says in its log-probs, and not in what it writes, is the verdict."""

from __future__ import annotations

import itertools
import json
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
from onlinerl.oracles._judge.endpoint import digest
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


PROMPT = Prompt(id="p", text="What is the capital of France?", token_ids=(1,))


def opened(url: str, name: str, **knobs: object) -> Judge:
    spec = {"name": name, "base_url": url, "model": "judge", "rationale": False, "request_timeout_s": 300.0, **knobs}
    oracle = component(spec, "oracle", "oracles", Oracle)
    oracle.open()
    return oracle


@pytest.mark.parametrize("written", ["json_schema", "text"])
def test_the_verdict_is_that_of_the_model_s_own_logits_in_both_orders(served: str, tmp_path: Path, written: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    oracle = opened(served, "judge_pair", response_format=written, read_from="logprobs")
    oracle.remember(tmp_path)
    (verdict,) = oracle.ask([Query(prompt=PROMPT, responses=RESPONSES)])
    asked = {cell: oracle._body(question, 3) for cell, (question,) in oracle._questions(PROMPT, RESPONSES).items()}
    oracle.close()
    assert isinstance(verdict, Verdict), verdict

    replies = {line["key"]: line["tokens"] for line in map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    first, second = (tokenizer.encode(label, add_special_tokens=False)[0] for label in "AB")
    expected = np.full((3, 3), np.nan)
    for cell, body in asked.items():
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        text += "".join(said for said, _ in itertools.takewhile(lambda token: not token[1], replies[digest(body)]))
        with torch.inference_mode():
            logits = model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0, -1].double()
        expected[cell] = float(logits[first] - logits[second])
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(np.array(verdict.log_odds)[off], expected[off], atol=0.02)
    np.testing.assert_allclose(verdict.matrix()[off], (1 / (1 + np.exp(-(expected - expected.T) / 2)))[off], atol=0.01)
    assert verdict.cost.calls == 6
    assert verdict.cost.tokens > verdict.cost.tokens_out > 0


def test_a_score_is_an_expectation(served: str) -> None:
    oracle = opened(served, "judge_score", response_format="json_schema")
    (verdict,) = oracle.ask([Query(prompt=PROMPT, responses=RESPONSES)])
    oracle.close()
    assert isinstance(verdict, Verdict), verdict
    assert all(1 < score < 5 for score in verdict.scores)
    assert any(score != round(score) for score in verdict.scores)


# --- a server of its own ---


@pytest.fixture(scope="module")
def own() -> Iterator[Judge]:
    spec = {"name": "judge_pair", "model": str(MODEL), "max_model_len": 1024, "dtype": "float32", "rationale": False}
    oracle = component({**spec, "request_timeout_s": 300.0, "max_requests": 4, "retries": 2}, "oracle", "oracles", Oracle)
    oracle.open()
    yield oracle
    oracle.close()


def test_a_server_of_its_own_says_what_one_that_is_there_says(own: Judge, served: str) -> None:
    query = Query(prompt=PROMPT, responses=RESPONSES)
    there = opened(served, "judge_pair")
    (verdict,), (same,) = own.ask([query]), there.ask([query])
    there.close()
    assert isinstance(verdict, Verdict), verdict
    assert isinstance(same, Verdict), same
    np.testing.assert_allclose(verdict.log_odds, same.log_odds, atol=0.02)
    assert verdict.annotator == "judge_pair:SmolLM2-135M-Instruct"


@pytest.mark.long
def test_a_server_that_is_killed_is_started_again_and_leaves_no_process(own: Judge) -> None:
    import psutil

    assert own._own is not None
    server = own._own._server
    before = psutil.Process(server._process.pid)
    family = [before, *before.children(recursive=True)]
    before.kill()
    (verdict,) = own.ask([Query(prompt=PROMPT, responses=RESPONSES[:2])])
    assert isinstance(verdict, Verdict), verdict
    assert server._process.pid != before.pid
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left, "what a killed server had started"
    family = [psutil.Process(server._process.pid), *psutil.Process(server._process.pid).children(recursive=True)]
    own.close()
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
    assert not Path(server.socket).parent.exists()
