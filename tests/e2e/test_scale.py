"""What arrives together is written with one flush of the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from onlinerl.engines.toy import ToyEngine
from onlinerl.learners.toy import ToyLearner
from onlinerl.types import Group, Rollout, SelfTest, UpdateReport

SAMPLES, TOKENS, TOGETHER = 8, 96, 16
FEW, MANY = 64, 320


@pytest.fixture(autouse=True)
def cheap_parts(monkeypatch):
    """Engine and learner that do next to nothing, so that what is measured is the controller."""
    rng = np.random.default_rng(0)
    logprobs = tuple(map(float, rng.normal(-2, 1, TOKENS).astype(np.float32)))

    def generate(self, requests, sampling):
        for start in range(0, len(requests), TOGETHER):
            yield [
                Group(prompt=one.prompt, rollouts=tuple(response(self, seed, sampling) for seed in one.seeds))
                for one in requests[start : start + TOGETHER]
            ]

    def response(engine, seed, sampling):
        return Rollout(
            token_ids=tuple((seed + n) % 40 for n in range(TOKENS)),
            logprobs=logprobs,
            text=f"answer {seed}",
            finish_reason="stop",
            policy_version=engine.version,
            sampler=sampling,
            seed=seed,
        )

    def update(self, steps, rates):
        for items, _ in zip(steps, rates, strict=True):
            assert all(len(s.response_ids) == TOKENS for item in items for s in item.sequences)
            yield UpdateReport(steps=1, tokens=1, metrics=({"loss": 0.5},))

    nothing = SelfTest(
        loss=0.0,
        repeat_kl=0.0,
        stored_loss=0.0,
        stored_loss_slope=1e9,
        stored_gaps={},
        noise=0.0,
        stored_tilts={},
        base_gap=0.0,
    )
    monkeypatch.setattr(ToyEngine, "generate", generate)
    monkeypatch.setattr(ToyLearner, "logprobs", lambda self, sequences, **_: [np.float32(logprobs) for _ in sequences])
    monkeypatch.setattr(ToyLearner, "update", update)
    monkeypatch.setattr(ToyLearner, "self_test", lambda self, items, base_model: nothing)
    monkeypatch.setattr("onlinerl.controller.self_test.FORMULA", 1e9)


@pytest.fixture
def config_of(toy_config, tmp_path, oracle):
    """Makes the configuration of a run with so many groups."""
    judge = oracle("return [[float(sum(map(ord, r))) for r in q['responses']] for q in queries]")

    def make(groups: int, **overrides: object) -> Path:
        folder = tmp_path / str(groups)
        folder.mkdir()
        for name, first, count in (("train", 0, groups), ("heldout", groups, 4)):
            lines = (json.dumps({"id": f"p{i}", "text": f"the film {i} was"}) for i in range(first, first + count))
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        more = {
            "iterations": 1,
            "prompts.train": str(folder / "train.jsonl"),
            "prompts.heldout": str(folder / "heldout.jsonl"),
            "prompts.per_iteration": groups,
            "sampling.samples_per_prompt": SAMPLES,
            "sampling.max_new_tokens": TOKENS,
            "evaluation.prompts": 4,
            "evaluation.max_mismatch_k3": 1e9,
            "training.batch_size": 16,
            "metrics.prometheus": False,
        }
        return toy_config(folder, {**more, **judge, **overrides})

    return make


def test_what_arrives_together_is_flushed_together(config_of, onlinerl, monkeypatch):
    """Per group a tenth of a flush of the disk for what is sampled, one for what is judged, and one for all else."""
    flushes = [0]

    def counted(descriptor, original=os.fsync):
        flushes[-1] += 1
        original(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    for groups in (FEW, MANY):
        assert onlinerl("run", config_of(groups))[0] == 0
        flushes.append(0)
    few, many, _ = flushes
    assert many - few < 0.3 * (MANY - FEW)
