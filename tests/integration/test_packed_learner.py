"""The real learners with `learner.padding_free`, DeepSpeed and torch alone, against padded fp32 autograd in a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from transformers import AutoModelForCausalLM

from onlinerl.algorithms.aot import Aot
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.inpo import Inpo
from onlinerl.algorithms.kto import Kto
from onlinerl.algorithms.lipo_lambda import LipoLambda
from onlinerl.algorithms.ppo import Ppo
from onlinerl.algorithms.selm import Selm
from onlinerl.algorithms.sppo import Sppo
from onlinerl.algorithms.tdpo2 import Tdpo2
from onlinerl.controller import self_test
from onlinerl.learners._loading import ModelReader
from onlinerl.learners._policy import Policy
from onlinerl.learners._whole_step import first_pass
from onlinerl.ops.batching import collate, packed_tokens
from onlinerl.ops.pair_modifiers import weighed
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import TrainItem, TrainSequence

pytestmark = pytest.mark.engine

VOCABULARY = 128
TEMPERATURE = 0.8
BUDGETS = (60, 10_000)
"""Many rows, and one."""
BOUND = 1e-5
STAGES: tuple[int | str, ...] = (0, 1, 2, 3, "torch")
QUICK = {(1, "torch"), (2, 3)}
"""Ranks and ZeRO stage; `make test-long` runs all."""
CASES = [
    pytest.param(ranks, stage, marks=() if (ranks, stage) in QUICK else pytest.mark.long)
    for ranks in (1, 2)
    for stage in STAGES
]


def items(seed: int, count: int, size: int) -> list[TrainItem]:
    """Of `size` responses each, of very different lengths, with all that any of the losses reads."""
    rng = np.random.default_rng(seed)

    def sequence(score: float) -> TrainSequence:
        length = int(rng.integers(1, 24))
        around = lambda mean, spread: rng.normal(mean, spread, length).astype(np.float32)  # noqa: E731
        return TrainSequence(
            prompt_ids=tuple(map(int, rng.integers(3, VOCABULARY, int(rng.integers(1, 12))))),
            response_ids=tuple(map(int, rng.integers(3, VOCABULARY, length))),
            reference_logprobs=around(-5.5, 0.5),
            anchor_logprobs=around(-5.0, 0.5),
            old_logprobs=around(-5.0, 0.3),
            behavior_logprobs=around(-5.0, 0.3),
            advantages=around(0, 1),
            values=around(0, 1),
            returns=around(0, 1),
            score=score,
            win_rate=float(1 / (1 + np.exp(-score))),
        )

    scores = -np.sort(-rng.standard_normal((count, size)), axis=1)
    return [TrainItem(prompt_id=str(i), sequences=tuple(map(sequence, row.tolist()))) for i, row in enumerate(scores)]


def beside(algorithm: Algorithm, pairs: list[TrainItem]) -> list[TrainItem]:
    """Pairs of four sequences: the third is explored, the fourth imitated, and two measure a KL; with weights of tokens."""
    more = (replace(item, exploration=2, online=(0, 3), nll=3, prob=0.8) for item in pairs)
    return list(algorithm.prepare(list(more)))


MODIFIED = Selm(
    optimism=0.3, online_kl=0.1, nll_coef=0.5, nll_target="reference_answer", token_weights="differing", common_token_weight=0.5
)
WEIGHED = Grpo(agg="token_mean", kl_coef=0.05, online_kl=0.05, nll_coef=0.1, token_weight_alpha=0.3)
LOSSES: dict[str, tuple[Algorithm, list[TrainItem]]] = {
    "dpo": (Dpo(), items(1, 8, 2)),
    "grpo": (Grpo(agg="token_mean", kl_coef=0.05), items(2, 12, 1)),
    "lists": (LipoLambda(beta=0.5), items(3, 6, 3)),
    "the whole step at once": (Kto(threshold=0.0, undesirable_weight=2.0), items(4, 12, 1)),
    "two references": (Inpo(eta=0.5), items(5, 8, 2)),
    "beside a reference": (Tdpo2(alpha=2.0, pair_weights="wpo"), items(6, 8, 2)),
    "two responses as one": (Sppo(), items(9, 8, 2)),
    "pairs, the whole step at once": (Aot(beta=0.5, nll_coef=0.2), items(10, 8, 2)),
    "pairs with what may be beside them": (MODIFIED, beside(MODIFIED, items(11, 6, 4))),
    "weighed": (WEIGHED, list(weighed(items(12, 12, 1), "certainty", None, WEIGHED.unit))),
    "fewer items than ranks": (Dpo(), items(7, 1, 2)),
}
CRITIC: tuple[Algorithm, list[TrainItem]] = (
    Ppo(critic="separate", critic_learning_rate=1e-3, entropy_coef=0.01, kl_in="loss"),
    items(8, 12, 1),
)
Answers = Callable[[int, int | str], dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, tiny_llama_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the ranks computed; each learner is asked once."""
    done: dict[tuple[int, int | str], dict[str, Any]] = {}

    def ask(ranks: int, stage: int | str) -> dict[str, Any]:
        if (ranks, stage) not in done:
            folder = tmp_path_factory.mktemp(f"packed-{ranks}-{stage}")
            done[ranks, stage] = asked(ranks, stage, tiny_llama, tiny_llama_untied, folder)
        answer = done[ranks, stage]
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer

    return ask


def asked(ranks: int, stage: int | str, model: Path, reference: Path, folder: Path) -> dict[str, Any]:
    loss = lambda it: {"algorithm": it[0], "items": it[1]}  # noqa: E731
    job = {
        "model": str(model),
        "reference": str(reference),
        "temperature": TEMPERATURE,
        "budgets": BUDGETS,
        "losses": {name: loss(it) for name, it in LOSSES.items()},
        "critic": loss(CRITIC),
        # Both implementations of attention on CPU, one of them with activations that are computed again.
        "cases": [{"kind": "packed", "stage": stage, "attention": "eager" if ranks == 2 else "sdpa", "recompute": ranks == 2}],
    }
    (answer,) = run_ranks(Path(__file__).with_name("packed_process.py"), ranks, job, folder)
    return answer


# --- what it should be ---


def padded(model: Path, critic: Any = None) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), critic).eval()


@cache
def expected_gradients(model: Path, other: Path, name: str) -> dict[str, np.ndarray]:
    """Of all items in one padded batch."""
    algorithm, it = CRITIC if name == "critic" else LOSSES[name]
    needs, batch = algorithm.needs, collate(it)
    policy = padded(model, needs.critic)
    states = ModelReader(torch.float32, "sdpa", torch.device("cpu")).states(str(other), batch) if needs.reference_kl else None

    def forward(one: Any) -> Any:
        asked = {"values": needs.values, "entropy": needs.entropy, "collision": needs.collision, "reference": states}
        return policy(one, temperature=TEMPERATURE, **asked)

    if isinstance(algorithm, WholeStep):
        (batch,), _ = first_pass(algorithm, [batch], forward, lambda own: ([own], 0), None)
    (algorithm.loss(forward(batch), batch).total / sum(i.count(algorithm.unit) for i in it)).backward()
    return {n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for n, p in policy.named_parameters()}


def relative_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Of all tensors as one vector."""
    assert ours.keys() == theirs.keys()
    gap = sum(((ours[n].astype(np.float64) - theirs[n]) ** 2).sum() for n in theirs)
    return float(np.sqrt(gap / sum((g**2).sum() for g in theirs.values())))


def assert_rows(ours: Sequence[np.ndarray], table_BT: torch.Tensor, tolerance: float) -> None:
    for row, expected in zip(ours, table_BT.numpy(), strict=True):
        np.testing.assert_allclose(row, expected[: len(row)], atol=tolerance)


@pytest.mark.parametrize(("ranks", "stage"), CASES)
def test_gradients_of_every_kind_of_loss_are_those_of_the_padded_form(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str
) -> None:
    answer = answers(ranks, stage)["gradients"]
    for name in (*LOSSES, "critic"):
        expected = expected_gradients(tiny_llama, tiny_llama_untied, name)
        for budget in BUDGETS:
            rows, found = answer[name, budget]
            assert (rows == 1) == (budget == max(BUDGETS) or name == "fewer items than ranks")
            error = relative_error(found, expected)
            print(f"{ranks} ranks {stage} {name} in {rows} rows: {error:.1e}")
            assert error < BOUND, (name, rows)


@pytest.mark.parametrize(("ranks", "stage"), CASES)
def test_scores_and_values_are_those_of_the_padded_form(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str
) -> None:
    answer, batch = answers(ranks, stage), collate(LOSSES["dpo"][1])
    critic = padded(tiny_llama, "separate")
    critic.load_state_dict({n: torch.from_numpy(a) for n, a in answer["critic"].items()}, strict=False)
    with torch.no_grad():
        assert_rows(answer["policy"], padded(tiny_llama)(batch).logprobs_BT, 1e-4)
        assert_rows(answer["reference"], padded(tiny_llama_untied)(batch).logprobs_BT, 1e-4)
        values = critic(batch, values=True).values_BT
    assert_rows(answer["values"], values, 1e-4)
    assert values.abs().max() > 1e-3


@pytest.mark.parametrize(("ranks", "stage"), CASES)
def test_the_self_test_passes(answers: Answers, ranks: int, stage: int | str) -> None:
    found = answers(ranks, stage)["self-test"]
    self_test.check(found, Dpo().loss_at_reference, "float32", padding_free=True)
    assert found.noise < 1e-4, "with the sequences of a row in another order"


def test_a_row_without_padding_is_a_smaller_batch() -> None:
    """What the tests above would not show if lengths were all alike."""
    for it in (it for _, it in LOSSES.values() if len(it) > 1):
        assert packed_tokens(it) < 0.8 * collate(it).tokens_BS.numel()
