"""The auxiliary loss of routers on real ranks: its gradient is that of one process, whatever ranks hold which share of what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from transformers import MixtralConfig, MixtralForCausalLM

from onlinerl.algorithms.weighted_sft import WeightedSft
from onlinerl.learners._policy import Policy
from onlinerl.ops.batching import collate, step_units
from onlinerl.types import TrainItem, TrainSequence

pytestmark = pytest.mark.engine
WEIGHT = 0.5
CASES = [
    {"kind": "experts", "stage": "torch", "budget": 16, "recompute": False},
    {"kind": "experts", "stage": 0, "budget": 1000, "recompute": False},
    {"kind": "experts", "stage": 2, "budget": 16, "recompute": True},
    {"kind": "experts", "stage": 3, "budget": 16, "recompute": False},
]


def items() -> list[TrainItem]:
    """Three, so that one of two ranks has a micro-batch of nothing."""
    rng = np.random.default_rng(0)
    drawn = [[tuple(rng.integers(3, 50, n).tolist()) for n in both] for both in ((3, 4), (5, 6), (2, 7))]
    return [
        TrainItem(prompt_id=str(n), sequences=(TrainSequence(prompt_ids=prompt, response_ids=response),), weight=1.0 + n)
        for n, (prompt, response) in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("mixture")
    MixtralForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    job = {"model": str(mixture), "algorithm": WeightedSft(), "items": items(), "weight": WEIGHT, "cases": CASES}
    return run_ranks(Path(__file__).with_name("experts_process.py"), 2, job, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def expected(mixture: Path) -> dict[str, np.ndarray]:
    """Of the loss in one batch, plus what transformers says of the same batch."""
    model = MixtralForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    policy, algorithm, batch = Policy(model).eval(), WeightedSft(), collate(items())
    loss = algorithm.loss(policy(batch), batch).total / step_units(items(), algorithm.unit)
    mask_BS = batch.sequence_mask_BS.long()
    aux = model(input_ids=batch.tokens_BS, attention_mask=mask_BS, output_router_logits=True).aux_loss
    (loss + WEIGHT * aux).backward()
    return {n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for n, p in policy.named_parameters()}


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]["stage"]))
def test_the_gradient_is_that_of_one_process(answers: list[dict[str, Any]], expected: dict[str, np.ndarray], case: int) -> None:
    answer = answers[case]
    assert "error" not in answer, answer["error"]
    found = answer["gradients"]
    assert found.keys() == expected.keys()
    assert (answer["micro"] > 1) == (CASES[case]["budget"] == 16)
    gap = sum(((found[n].astype(np.float64) - expected[n]) ** 2).sum() for n in expected)
    assert np.sqrt(gap / sum((g**2).sum() for g in expected.values())) < 1e-4
