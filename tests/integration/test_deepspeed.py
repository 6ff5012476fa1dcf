"""The real learners, DeepSpeed and torch alone, against plain single-process autograd and plain torch optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from onlinerl.algorithms.bco import Bco
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.inpo import Inpo
from onlinerl.algorithms.kto import Kto
from onlinerl.algorithms.lipo_lambda import LipoLambda
from onlinerl.algorithms.p3o import P3o
from onlinerl.algorithms.ppo import Ppo
from onlinerl.algorithms.re_po import RePo
from onlinerl.algorithms.tdpo2 import Tdpo2
from onlinerl.algorithms.weighted_sft import WeightedSft
from onlinerl.batch import Batch, Outputs
from onlinerl.controller import self_test
from onlinerl.errors import LearnerError
from onlinerl.learners import _policy
from onlinerl.learners._policy import Policy
from onlinerl.ops.batching import annotator_number, collate, plan_step
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Draw, Sampling, SelfTest, TrainItem, TrainSequence

pytestmark = pytest.mark.engine

STAGES, DTYPES, WORLDS = (0, 1, 2, 3, "torch"), ("float32", "bfloat16"), (1, 2)
SLOW = {(stage, "bfloat16") for stage in (1, 2, "torch")}
"""What `make test` leaves to `make test-long`: in bfloat16 it takes half as long again, on CPUs without instructions for it."""
MICRO_BATCHES = (1, 4)
VOCABULARY = 128
# Relative error of the whole gradient, |ours - theirs| / |theirs|. In bfloat16 activations and gradients keep 8 bits.
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}


MIXTURE_SAMPLING, MIXTURE_WEIGHT = Sampling(temperature=0.7, max_new_tokens=9), 0.375


def sequence(rng: np.random.Generator, response: int | None = None, **extra: Any) -> TrainSequence:
    length = response or int(rng.integers(3, 10))
    noise = lambda: rng.normal(-4.5, 0.5, length).astype(np.float32)  # noqa: E731
    return TrainSequence(
        prompt_ids=tuple(map(int, rng.integers(3, VOCABULARY, int(rng.integers(2, 8))))),
        response_ids=tuple(map(int, rng.integers(3, VOCABULARY, length))),
        reference_logprobs=noise(),
        **{name: make(length) for name, make in extra.items()},
    )


def pair_items(count: int, seed: int, response: int | None = None) -> list[TrainItem]:
    rng = np.random.default_rng(seed)
    return [TrainItem(prompt_id=str(i), sequences=(sequence(rng, response), sequence(rng, response))) for i in range(count)]


def anchored(items: list[TrainItem]) -> list[TrainItem]:
    """With what a base model says that is not the reference."""
    base = lambda s: s.with_(anchor_logprobs=s.reference_logprobs[::-1] - np.float32(0.5))  # noqa: E731
    return [replace(item, sequences=tuple(map(base, item.sequences))) for item in items]


def by_annotators(items: list[TrainItem], *names: str) -> list[TrainItem]:
    """Judged by them in turn."""
    return [replace(item, annotator=names[n % len(names)]) for n, item in enumerate(items)]


def sample_items(count: int, seed: int) -> list[TrainItem]:
    rng = np.random.default_rng(seed)
    old = lambda n: rng.normal(-5.0, 0.3, n).astype(np.float32)  # noqa: E731  near log(1 / vocabulary): some ratios are clipped
    normal = lambda n: rng.normal(0, 1, n).astype(np.float32)  # noqa: E731
    extra = {"old_logprobs": old, "behavior_logprobs": old, "advantages": normal, "values": normal, "returns": normal}
    return [TrainItem(prompt_id=str(i), sequences=(sequence(rng, **extra),)) for i in range(count)]


def sampled_pairs(count: int, seed: int) -> list[TrainItem]:
    """Of responses that were sampled, with a reward each."""
    rng = np.random.default_rng(seed)
    made = iter([item.sequences[0].with_(score=float(rng.normal())) for item in sample_items(2 * count, seed)])
    return [TrainItem(prompt_id=str(i), sequences=(next(made), next(made))) for i in range(count)]


def weighted_items(count: int, seed: int) -> list[TrainItem]:
    """Of which some count many times as much as others, whatever their length."""
    weights = np.random.default_rng(seed).exponential(size=count)
    return [replace(item, weight=float(weight)) for item, weight in zip(sample_items(count, seed), weights, strict=True)]


def judged_items(count: int, seed: int, size: int) -> list[TrainItem]:
    """Of `size` responses each, the best first, which the policy finds more probable than the reference does."""
    rng = np.random.default_rng(seed)

    def response(score: float) -> TrainSequence:
        made = sequence(rng)
        return made.with_(reference_logprobs=made.reference_logprobs - 1.5, score=score, win_rate=1 / (1 + np.exp(-score)))

    scores = -np.sort(-rng.standard_normal((count, size)), axis=1)
    return [TrainItem(prompt_id=str(i), sequences=tuple(map(response, row.tolist()))) for i, row in enumerate(scores)]


def budgets(items: Sequence[TrainItem], ranks: int) -> dict[int, int]:
    """Token budgets that cut `items` into 1 and 4 micro-batches a rank."""
    found: dict[int, int] = {}
    for budget in range(8, 2000, 4):
        found.setdefault(len(plan_step(items, ranks, budget)[0]), budget)
    return {n: found[n] for n in MICRO_BATCHES}


def spoiled(items: list[TrainItem], **changes: Any) -> list[TrainItem]:
    """The same step with its last item changed."""
    return [*items[:-1], replace(items[-1], **changes)]


def with_reference(item: TrainItem, values: Sequence[float]) -> tuple[TrainSequence, ...]:
    return tuple(
        s.with_(reference_logprobs=np.full(len(s.response_ids), value, np.float32))
        for s, value in zip(item.sequences, values, strict=True)
    )


LOSSES: dict[str, tuple[Algorithm, list[TrainItem]]] = {
    "dpo": (Dpo(), pair_items(8, seed=1)),
    "grpo": (Grpo(agg="token_mean", kl_coef=0.05), sample_items(12, seed=2)),
    "lists": (LipoLambda(beta=0.5), judged_items(8, seed=8, size=3)),
    "the whole step at once": (Kto(threshold=0.0, undesirable_weight=2.0), judged_items(12, seed=9, size=1)),
    "fewer items than ranks": (Dpo(), pair_items(1, seed=3)),
    "uneven": (Dpo(), pair_items(5, seed=4)),
    "pairs of a policy gradient": (P3o(), sampled_pairs(8, seed=14)),
    "weighted samples": (WeightedSft(), weighted_items(12, seed=15)),
    "two references": (Inpo(eta=0.5), anchored(pair_items(8, seed=13))),
    "labels that may be wrong": (RePo(beta=0.5, eta0=0.8), by_annotators(pair_items(8, seed=14), "one", "other")),
}
CRITIC: tuple[Algorithm, list[TrainItem]] = (
    Ppo(critic="separate", critic_learning_rate=1e-3, entropy_coef=0.01, kl_in="loss"),
    sample_items(12, seed=5),
)
SHARED: tuple[Algorithm, list[TrainItem]] = (Ppo(critic="shared", vf_coef=2.0), sample_items(12, seed=16))
"""What the critic asks of the trunk is a part of the gradient that would be seen if it were missing."""
KEPT_STEPS = [judged_items(12, seed=20 + i, size=1) for i in range(2)]
LABELLED = RePo(beta=0.5, eta0=0.8, eta_rate=0.5)
LABELLED_STEPS = [
    by_annotators(pair_items(8, seed=30), "one", "other"),
    by_annotators(pair_items(8, seed=31), "other", "third"),
]
KEPT: dict[str, tuple[Algorithm, list[list[TrainItem]]]] = {
    "baseline": (Bco(beta=1.0, threshold=0.0, baseline_decay=0.75), KEPT_STEPS),
    "eta": (LABELLED, LABELLED_STEPS),
}
"""Losses that keep a state from step to step, by the metric that says it."""
LONG = pair_items(6, seed=6, response=120)
"""1,440 response tokens."""
LONG_TEMPERATURE = 0.7
BESIDE = {"long": LONG, "fewer items than ranks": pair_items(1, seed=11)}
"""What is trained beside a reference."""
FULL = Tdpo2(alpha=2.0, pair_weights="wpo")
"""Reads all that is computed from whole distributions for losses on pairs."""


def self_test_items() -> list[TrainItem]:
    """Pairs whose responses are equally long, so that arrays can be exchanged; everything that ppo reads is there."""
    rng = np.random.default_rng(7)
    zeros = lambda n: np.zeros(n, np.float32)  # noqa: E731
    extra = {"behavior_logprobs": zeros, "advantages": zeros, "returns": zeros, "values": zeros}
    pair = lambda: tuple(sequence(rng, response=20, **extra) for _ in range(2))  # noqa: E731
    return [TrainItem(prompt_id=str(i), sequences=pair()) for i in range(4)]


MAX_GRAD_NORM = 0.5
"""Below every gradient of `STEPS`, so that clipping acts."""
STEPS = [pair_items(8, seed=10 + i) for i in range(3)]
BAD_STEPS = {
    "nan loss": spoiled(STEPS[0], sequences=with_reference(STEPS[0][-1], [float("nan"), 0.0])),
    "infinite loss with a finite gradient": spoiled(STEPS[0], sequences=with_reference(STEPS[0][-1], [0.0, -float("inf")])),
    "finite loss with an infinite gradient": spoiled(STEPS[0], weight=2.0),
}
EXPORTED = (0, 3, "torch")
OTHER = (0, 2, 3, "torch")
CASES: dict[tuple[Any, ...], dict[str, Any]] = {
    **{("gradients", s, d): {"kind": "gradients", "stage": s, "dtype": d} for s, d in product(STAGES, DTYPES)},
    **{
        ("critic", s, r): {"kind": "critic_gradients", "stage": s, "dtype": "float32", "recompute": r, "attention": a}
        for s, (r, a) in product(STAGES, ((False, "sdpa"), (True, "eager")))
    },
    **{("shared critic", s): {"kind": "shared_critic", "stage": s, "dtype": "float32"} for s in STAGES},
    **{("steps", s, d): {"kind": "steps", "stage": s, "dtype": d} for s, d in product(STAGES, DTYPES)},
    **{
        ("export", s, m): {"kind": "export", "stage": s, "dtype": "float32", "model": m}
        for s, m in product(EXPORTED, ("model", "untied"))
    },
    **{("critic model", s): {"kind": "critic_model", "stage": s, "dtype": "float32"} for s in EXPORTED},
    **{
        ("kept state", s, kept): {"kind": "kept_state", "stage": s, "dtype": "float32", "kept": kept}
        for s, kept in product(EXPORTED, ("baseline", "eta"))
    },
    **{("target kl", s, d): {"kind": "target_kl", "stage": s, "dtype": d} for s, d in product(STAGES, DTYPES)},
    **{("rmsprop", s): {"kind": "other_optimizer", "stage": s, "dtype": "float32"} for s in OTHER},
    **{("offload", s, d): {"kind": "offload", "stage": s, "dtype": d} for s, d in product(STAGES, DTYPES)},
    ("absent",): {"kind": "absent_rank", "stage": 2, "dtype": "float32", "timeout_s": 3.0},  # the last one: it breaks the group
}


def is_slow(case: dict[str, Any]) -> bool:
    return (case["stage"], case["dtype"]) in SLOW


Answers = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def answers(
    tiny_llama: Path, tiny_llama_untied: Path, tiny_reward_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """`answers(ranks, *case)`: what the ranks computed. All cases of a number of ranks run together, when the first is asked for; those of
    `SLOW` by themselves."""
    done: dict[tuple[int, bool], dict[tuple[Any, ...], Any]] = {}

    def ask(ranks: int, *case: Any) -> dict[str, Any]:
        slow = is_slow(CASES[case])
        if (ranks, slow) not in done:
            models = {"model": tiny_llama, "untied": tiny_llama_untied, "reward": tiny_reward_model}
            cases = {name: each for name, each in CASES.items() if is_slow(each) == slow}
            done[ranks, slow] = asked(ranks, cases, models, tmp_path_factory.mktemp(f"ranks-{ranks}"))
        answer = done[ranks, slow][case]
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer

    return ask


def asked(
    ranks: int, cases: dict[tuple[Any, ...], dict[str, Any]], models: dict[str, Path], directory: Path
) -> dict[tuple[Any, ...], Any]:
    def loss(algorithm: Algorithm, items: list[TrainItem]) -> dict[str, Any]:
        few = len(items) < 8
        cuts = {1: 10_000, 4: 40} if few else budgets(items, ranks)  # a few items cannot fill four micro-batches
        return {"algorithm": algorithm, "items": items, "budgets": cuts}

    job = {
        **{name: str(path) for name, path in models.items()},
        "directory": str(directory),
        "losses": {name: loss(*what) for name, what in LOSSES.items()},
        "critic_loss": loss(*CRITIC),
        "shared_critic_loss": loss(*SHARED),
        "long": {"algorithm": Dpo(), "items": LONG, "temperature": LONG_TEMPERATURE},
        "beside": {"algorithm": FULL, "items": BESIDE, "temperature": LONG_TEMPERATURE},
        "kept": {
            name: {
                "algorithm": algorithm,
                "steps": steps,
                "budget": budgets(steps[0], ranks)[4],
                "bad": spoiled(steps[0], sequences=with_reference(steps[0][-1], [float("nan")] * len(steps[0][-1].sequences))),
            }
            for name, (algorithm, steps) in KEPT.items()
        },
        "self_test_items": self_test_items(),
        "draws": [Draw(tuple(range(5, 6 + i % 4)), seed=i) for i in range(5)],
        "mixture_sampling": MIXTURE_SAMPLING,
        "mixture_weight": MIXTURE_WEIGHT,
        "max_grad_norm": MAX_GRAD_NORM,
        "steps": STEPS,
        "bad_steps": BAD_STEPS,
        "cases": list(cases.values()),
    }
    answers = run_ranks(Path(__file__).with_name("rank_process.py"), ranks, job, directory)
    return dict(zip(cases, answers, strict=True))


# --- what it should be ---


def plain_policy(model: Path, dtype: str, critic: Any = None) -> Policy:
    """In fp32, from the weights as the learner's dtype rounds them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if dtype == "bfloat16":
        loaded = loaded.bfloat16().float()
    return Policy(loaded, critic).eval()


def backward(policy: Policy, algorithm: Algorithm, items: Sequence[TrainItem], temperature: float = 1.0) -> float:
    """One forward and backward of everything at once, divided by the count of units. Returns the loss."""
    batch, needs = collate(items), algorithm.needs
    outputs = policy(batch, temperature=temperature, values=needs.values, entropy=needs.entropy)
    total = algorithm.loss(outputs, batch).total
    loss = total / sum(i.count(algorithm.unit) for i in items)
    policy.zero_grad()
    loss.backward()
    return loss.item()


def plain_gradients(
    policy: Policy, algorithm: Algorithm, items: Sequence[TrainItem], temperature: float = 1.0
) -> dict[str, np.ndarray]:
    backward(policy, algorithm, items, temperature)
    return {n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for n, p in policy.named_parameters()}


@cache
def expected_gradients(model: Path, dtype: str, loss: str) -> dict[str, np.ndarray]:
    return plain_gradients(plain_policy(model, dtype), *LOSSES[loss])


def relative_error(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Of all tensors as one vector."""
    assert ours.keys() == theirs.keys()
    gap = sum(((ours[n].astype(np.float64) - theirs[n]) ** 2).sum() for n in theirs)
    return float(np.sqrt(gap / sum((g**2).sum() for g in theirs.values())))


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not np.array_equal(ours[n], theirs[n])] == []


def assert_stepped(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of weights that moved by 1e-3. Adam divides by |g|: where g is rounding noise, so is the direction."""
    gap = np.abs(ours - theirs.detach().numpy())
    assert (gap > 1e-5).mean() < 1e-3
    assert gap.max() < 1e-4


def configured(*dtypes: str) -> list[object]:
    """Number of ranks, ZeRO stage, dtype."""
    return [
        pytest.param(ranks, stage, dtype, marks=[pytest.mark.long] if (stage, dtype) in SLOW else [])
        for ranks, stage, dtype in product(WORLDS, STAGES, dtypes)
    ]


configurations = pytest.mark.parametrize(("ranks", "stage", "dtype"), configured(*DTYPES))


@configurations
@pytest.mark.parametrize("loss", list(LOSSES))
def test_gradient_equals_that_of_one_process(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str, dtype: str, loss: str
) -> None:
    answer = answers(ranks, "gradients", stage, dtype)
    items, expected = LOSSES[loss][1], expected_gradients(tiny_llama, dtype, loss)

    for cut in MICRO_BATCHES:
        result = answer[loss, cut]
        if len(items) >= 8:
            assert result["micro_batches"] == cut
        error = relative_error(result["gradients"], expected)
        print(f"{ranks} ranks ZeRO {stage} {dtype} {loss} {result['micro_batches']} micro-batches: {error:.2e}")
        assert error < BOUND[dtype]


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, EXPORTED)))
def test_what_a_loss_keeps_is_the_same_on_every_rank_and_goes_through_a_checkpoint(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str
) -> None:
    answer = answers(ranks, "kept state", stage, "baseline")
    batch = collate(KEPT_STEPS[0])
    rewards = plain_log_ratios(tiny_llama, batch)
    good = batch.scores_B >= 0
    assert 0 < good.sum() < len(good)
    expected = (rewards[good].mean() + rewards[~good].mean()).item() / 2

    (first, reported), (second, _) = answer["steps"]
    assert first == [first[0]] * ranks  # to the last bit
    assert first[0] == {"baseline": pytest.approx(expected, rel=1e-5), "steps": 1.0}
    assert reported == first[0]["baseline"]
    assert second == [second[0]] * ranks
    assert second[0]["steps"] == 2.0
    single = answers(1, "kept state", "torch", "baseline")["steps"][1][0][0]
    assert second[0]["baseline"] == pytest.approx(single["baseline"], rel=1e-4)
    assert second[0]["baseline"] != pytest.approx(expected, rel=1e-2)
    assert assert_kept(answer)[0]["steps"] == 3.0


def plain_log_ratios(model: Path, batch: Batch) -> torch.Tensor:
    """D of each row, f64[B], of one process."""
    with torch.no_grad():
        logprobs = plain_policy(model, "float32")(batch, temperature=1.0).logprobs_BT
    return ((logprobs - batch.reference_logprobs_BT) * batch.mask_BT).sum(dim=1).double()


def assert_kept(answer: dict[str, Any]) -> list[dict[str, float]]:
    """What a step leaves is changed by another one only, and is the same after a checkpoint. Returns the states a step later, by rank."""
    second, _ = answer["steps"][1]
    assert answer["skipped"] == 1.0
    for when in ("after a gradient", "after a self-test", "after a step that was skipped", "loaded"):
        assert answer[when] == second, when
    assert "algorithm.json" in answer["written"]
    straight, resumed = answer["continued"]
    assert straight == resumed
    return straight


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, EXPORTED)))
def test_how_far_labels_are_right_is_estimated_from_the_pairs_of_all_ranks(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str
) -> None:
    """eta <- (1 - rate) eta + rate * mean w of the annotator's pairs, w = sigmoid(logit(eta) + beta h), wherever they were trained."""
    answer = answers(ranks, "kept state", stage, "eta")
    (first, reported), (second, _) = answer["steps"]
    expected: dict[str, float] = {}
    ratios = plain_log_ratios(tiny_llama, collate(LABELLED_STEPS[0]))
    w = torch.sigmoid(torch.logit(torch.tensor(0.8).double()) + 0.5 * (ratios[0::2] - ratios[1::2]))
    for name in ("one", "other"):
        own = [n for n, item in enumerate(LABELLED_STEPS[0]) if item.annotator == name]
        assert len(own) == 4
        expected[f"eta_{annotator_number(name):012x}"] = 0.5 * 0.8 + 0.5 * w[own].mean().item()
    assert len({round(eta, 3) for eta in expected.values()}) == 2
    assert first == [first[0]] * ranks  # to the last bit
    assert first[0] == pytest.approx(expected, rel=1e-5)
    assert reported == pytest.approx(sum(expected.values()) / 2, rel=1e-5)
    assert second == [second[0]] * ranks
    assert second[0] == pytest.approx(answers(1, "kept state", "torch", "eta")["steps"][1][0][0], rel=1e-4)
    assert len(second[0]) == 3
    one = f"eta_{annotator_number('one'):012x}"
    assert second[0][one] == first[0][one], "whoever has no pair in a step keeps what was estimated"
    assert len(assert_kept(answer)[0]) == 3


@configurations
def test_nothing_of_earlier_gradients_is_left(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    answer = answers(ranks, "gradients", stage, dtype)

    for cut in MICRO_BATCHES:
        assert_equal(answer["again", cut]["gradients"], answer["dpo", cut]["gradients"])


@configurations
def test_more_tokens_than_a_chunk_at_another_temperature(
    answers: Answers, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, stage: int | str, dtype: str
) -> None:
    """Scores and gradient of micro-batches whose logits are computed, and computed again, piece by piece."""
    answer = answers(ranks, "gradients", stage, dtype)
    tokens = sum(len(s.response_ids) for item in LONG for s in item.sequences)
    assert tokens / ranks > _policy.CHUNK / 2  # on one rank more than a chunk
    policy = plain_policy(tiny_llama, dtype)
    monkeypatch.setattr(_policy, "CHUNK", 10**6)
    expected = plain_gradients(policy, Dpo(), LONG, LONG_TEMPERATURE)

    assert relative_error(answer["long", "gradients"], expected) < BOUND[dtype]

    with torch.no_grad():
        scores = policy(collate(LONG), temperature=LONG_TEMPERATURE).logprobs_BT.numpy()
        untempered = policy(collate(LONG)).logprobs_BT.numpy()
    ours = np.stack(answer["long", "scores"])
    assert np.abs(ours - scores).mean() < (1e-5 if dtype == "float32" else 0.02)
    assert np.abs(ours - untempered).mean() > 0.05


def of_tokens(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[B, T, V]: log-probs of all tokens that might have come in the place of each response token."""
    logits = model(input_ids=batch.tokens_BS, attention_mask=batch.sequence_mask_BS.long()).logits.float() / LONG_TEMPERATURE
    before = batch.prompt_lengths_B[:, None] - 1 + torch.arange(batch.mask_BT.shape[1])
    rows = torch.arange(len(before))[:, None]
    return torch.log_softmax(logits, dim=-1)[rows, before.clamp(max=logits.shape[1] - 1)]


@configurations
@pytest.mark.parametrize("items", list(BESIDE))
def test_gradient_beside_a_reference_equals_that_of_all_logits_at_once(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str, dtype: str, items: str
) -> None:
    """Of the KL and of the weights as their definitions have them; the reference's distributions are others."""
    answer = answers(ranks, "gradients", stage, dtype)["beside", items]
    policy, reference = (plain_policy(path, dtype) for path in (tiny_llama, tiny_llama_untied))
    batch = collate(BESIDE[items])
    ours = of_tokens(policy.model, batch)
    with torch.no_grad():
        theirs = of_tokens(reference.model, batch)
    kl_BT = (theirs.exp() * (theirs - ours)).sum(-1)
    assert kl_BT[batch.mask_BT].mean() > 0.1
    starts = batch.prompt_lengths_B[:, None] + torch.arange(batch.mask_BT.shape[1])
    tokens_BT = batch.tokens_BS.gather(1, starts.clamp(max=batch.tokens_BS.shape[1] - 1))
    outputs = Outputs(
        logprobs_BT=ours.gather(2, tokens_BT[:, :, None])[:, :, 0],
        collision_BT=ours.exp().square().sum(-1).log(),
        reference_kl_BT=kl_BT,
    )
    (FULL.loss(outputs, batch).total / len(BESIDE[items])).backward()
    expected = {n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for n, p in policy.named_parameters()}

    error = relative_error(answer, expected)
    print(f"{ranks} ranks ZeRO {stage} {dtype} {items}: {error:.2e}")
    assert error < BOUND[dtype]


@configurations
def test_the_self_test_notices_a_reference_beside_the_policy_that_is_another_model(
    answers: Answers, ranks: int, stage: int | str, dtype: str
) -> None:
    answer = answers(ranks, "gradients", stage, dtype)
    right, wrong = (answer["beside", "self-test", reference] for reference in ("model", "untied"))

    assert abs(right.reference_kl) < 1e-6
    self_test.check(right, FULL.loss_at_reference, dtype)
    with pytest.raises(LearnerError, match="the reference beside it"):
        self_test.check(wrong, FULL.loss_at_reference, dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_gradient_with_a_critic_equals_that_of_one_process(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str, recompute: bool
) -> None:
    """Also with `learner.gradient_checkpointing` and `learner.attn_implementation: eager`, and after loading a checkpoint."""
    answer = answers(ranks, "critic", stage, recompute)
    algorithm, items = CRITIC
    expected = plain_gradients(plain_policy(tiny_llama, "float32", "separate"), algorithm, items)
    assert np.abs(expected["value_head.weight"]).max() > 1e-3

    for found in (answer, answer["loaded"]):
        for cut in MICRO_BATCHES:
            assert relative_error(found[cut], expected) < BOUND["float32"]


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_gradient_with_a_shared_critic_equals_that_of_one_process(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str
) -> None:
    """With weights as they are after a step, when the trunk hears of the critic's errors."""
    answer = answers(ranks, "shared critic", stage)
    algorithm, items = SHARED
    policy = plain_policy(tiny_llama, "float32", "shared")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(torch.from_numpy(answer["parameters"][name]))
    expected = plain_gradients(policy, algorithm, items)
    for cut in MICRO_BATCHES:
        assert relative_error(answer[cut], expected) < BOUND["float32"]

    deaf = plain_gradients(policy, algorithm.model_copy(update={"vf_coef": 0.0}), items)
    trunk = [name for name in expected if not name.startswith("value_head.")]
    assert relative_error({n: deaf[n] for n in trunk}, {n: expected[n] for n in trunk}) > 100 * BOUND["float32"]


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_recomputation_survives_a_checkpoint(answers: Answers, ranks: int, stage: int | str) -> None:
    """A layer runs forward twice per micro-batch if its activations are computed again, also after a resume."""
    for recompute, passes in ((False, 1), (True, 2)):
        answer = answers(ranks, "critic", stage, recompute)
        assert answer["passes"] == answer["loaded"]["passes"] == passes


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_a_critic_learns_beside_a_policy_with_a_learning_rate_of_0(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int
) -> None:
    step = answers(ranks, "critic", stage, False)["critic_step"]
    policy = plain_policy(tiny_llama, "float32", "separate")
    of_critic = {n: p for n, p in policy.named_parameters() if n.startswith(("critic.", "value_head."))}
    decay = [p for p in of_critic.values() if p.dim() > 1]
    fixed = [p for p in of_critic.values() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": fixed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    backward(policy, *CRITIC)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()

    assert step["metrics"]["learning_rate"] == 0
    for name, weight in step["after"].items():
        if name in of_critic:
            assert_stepped(weight, of_critic[name])
        else:
            np.testing.assert_array_equal(weight, step["before"][name], err_msg=name)


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, EXPORTED)))
def test_a_critic_begins_as_a_reward_model(answers: Answers, tiny_reward_model: Path, ranks: int, stage: int | str) -> None:
    """Smaller than the policy, as it happens. With its head where values are in the units of its scores, else at 0."""
    answer = answers(ranks, "critic model", stage)
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_reward_model, dtype=torch.float32).eval()
    sequences = [s for i in STEPS[0] for s in i.sequences]

    for s, with_head, without in zip(sequences, answer["as scores are"], answer["normalized"], strict=True):
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        with torch.no_grad():
            states = judge.base_model(input_ids=ids).last_hidden_state
            scores = judge.score(states)[0, len(s.prompt_ids) - 1 : -1, 0].numpy()  # of the state before each token
        np.testing.assert_allclose(with_head, scores, atol=1e-5)
        assert np.abs(with_head).max() > 0
        assert (without == 0).all()
    assert_equal(answer["backbone"], {n: p.detach().numpy() for n, p in judge.base_model.named_parameters()})
    assert answer["resumed"]


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, OTHER)))
def test_rmsprop_with_weight_decay_equals_that_of_torch(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str
) -> None:
    """Only matrices decay: a tenth of a norm's weight is more than its gradient, so its step would be another one."""
    answer = answers(ranks, "rmsprop", stage)
    policy = plain_policy(tiny_llama, "float32")
    groups = [
        {"params": [p for p in policy.parameters() if (p.dim() > 1) is matrix], "weight_decay": 0.1 if matrix else 0.0}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.RMSprop(groups, lr=1e-3)

    for items, after in zip(STEPS, answer["after"], strict=True):
        backward(policy, Dpo(), items)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        for name, parameter in policy.model.named_parameters():
            gap = np.abs(after[name] - parameter.detach().numpy())
            assert (gap > 1e-4).mean() < 1e-2, name  # a first step has length 1e-2, whatever the gradient


def sound(result: SelfTest, expected_loss: float | None, dtype: str) -> bool:
    try:
        self_test.check(result, expected_loss, dtype)
    except LearnerError:
        return False
    return True


SPOILED = ("shifted", "permuted", "temperature", "model")


@configurations
def test_the_self_test_notices_a_stored_reference_that_is_not_the_policy_s(
    answers: Answers, ranks: int, stage: int | str, dtype: str
) -> None:
    results = answers(ranks, "steps", stage, dtype)["self_tests"]

    self_test.check(results["sound"], Dpo().loss_at_reference, dtype)
    for name in ("reference_logprobs", "anchor_logprobs"):
        passed = {how: sound(results[name, how], Dpo().loss_at_reference, dtype) for how in SPOILED}
        assert passed == dict.fromkeys(SPOILED, False), name
    assert not sound(results["base"], Dpo().loss_at_reference, dtype)


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_the_self_test_notices_old_log_probs_and_values_that_are_not_the_policy_s(
    answers: Answers, ranks: int, stage: int
) -> None:
    answer = answers(ranks, "critic", stage, True)
    results = answer["self_tests"]

    self_test.check(results["sound"], None, "float32")
    for name, how in product(("old_logprobs", "reference_logprobs"), SPOILED):
        with pytest.raises(LearnerError, match=f"the stored {name} differ "):
            self_test.check(results[name, how], None, "float32")

    limit = self_test.GAP["float32"]
    assert answer["values", "sound"].stored_gaps["values"] < limit
    for how in ("shifted", "permuted"):
        assert answer["values", how].stored_gaps["values"] > limit


def test_ranks_do_not_wait_longer_than_a_step_for_one_that_is_gone(answers: Answers) -> None:
    """Not as long as a start may take (900 s by default)."""
    assert "3000ms" in answers(2, "absent")["message"].replace(" ", "")


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_steps_equal_those_of_torch(answers: Answers, tiny_llama: Path, ranks: int, stage: int | str) -> None:
    answer = answers(ranks, "steps", stage, "float32")
    policy = plain_policy(tiny_llama, "float32")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    for items, metrics, after in zip(STEPS, answer["metrics"], answer["after"], strict=True):
        loss = backward(policy, Dpo(), items)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert metrics["skipped"] == 0
        for name, parameter in policy.model.named_parameters():
            assert_stepped(after[name], parameter)


@pytest.mark.parametrize(("ranks", "stage", "dtype"), configured("bfloat16"))
def test_bfloat16_steps_follow_those_of_torch_in_fp32(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str, dtype: str
) -> None:
    answer = answers(ranks, "steps", stage, dtype)
    policy = plain_policy(tiny_llama, dtype)
    before = {n: p.detach().double().numpy().copy() for n, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    for items, metrics in zip(STEPS, answer["metrics"], strict=True):
        assert metrics["loss"] == pytest.approx(backward(policy, Dpo(), items), rel=2e-2)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        assert metrics["skipped"] == 0
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=2e-2)

    moved = {n: p.detach().double().numpy() - before[n] for n, p in policy.model.named_parameters()}
    ours = {n: answer["after"][-1][n] - before[n] for n in moved}
    inner = sum((moved[n] * ours[n]).sum() for n in moved)
    norms = [np.sqrt(sum((d[n] ** 2).sum() for n in moved)) for d in (moved, ours)]
    assert inner / norms[0] / norms[1] > 0.97  # weights are rounded to 8 bits on the way out


Clip = Callable[[Policy, Sequence[TrainItem], float], None]


def clip_right(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    backward(policy, Dpo(), items)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)


def clip_not(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    backward(policy, Dpo(), items)


def clip_at_ten_times(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    clip_right(policy, items, 10 * limit)


def clip_by_value(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    backward(policy, Dpo(), items)
    torch.nn.utils.clip_grad_value_(policy.parameters(), limit)


def clip_each_tensor(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    backward(policy, Dpo(), items)
    for parameter in policy.parameters():
        torch.nn.utils.clip_grad_norm_([parameter], limit)


def clip_each_rank(policy: Policy, items: Sequence[TrainItem], limit: float) -> None:
    """Before the mean over two ranks is taken, instead of after."""
    shares = [[item for micro in rank for item in micro] for rank in plan_step(list(items), 2, 100_000)]
    gathered: list[list[torch.Tensor]] = []
    for share in shares:
        backward(policy, Dpo(), share)
        for p in policy.parameters():
            assert p.grad is not None
            p.grad.mul_(2 * len(share) / len(items))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)
        gathered.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for parameter, *parts in zip(policy.parameters(), *gathered, strict=True):
        parameter.grad = sum(parts, torch.zeros(())) / 2


def moments_of_torch(model: Path, dtype: str, clip: Clip) -> dict[str, np.ndarray]:
    """Adam's running mean of clipped gradients after `STEPS`. It scales with them; Adam's steps do not."""
    policy = plain_policy(model, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    for items in STEPS:
        clip(policy, items, MAX_GRAD_NORM)
        optimizer.step()
    return {n: optimizer.state[p]["exp_avg"].double().numpy() for n, p in policy.model.named_parameters()}


MOMENTS = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative error of the running mean of clipped gradients after three steps."""


@configurations
def test_gradients_are_clipped_as_by_torch(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str, dtype: str
) -> None:
    answer = answers(ranks, "steps", stage, dtype)
    assert min(m["grad_norm"] for m in answer["metrics"]) > 1.5 * MAX_GRAD_NORM

    error = relative_error(answer["moments"], moments_of_torch(tiny_llama, dtype, clip_right))

    print(f"{ranks} ranks ZeRO {stage} {dtype}: {error:.2e}")
    assert error < MOMENTS[dtype]


@pytest.mark.parametrize("wrong", [clip_not, clip_at_ten_times, clip_by_value, clip_each_tensor, clip_each_rank])
def test_wrong_clipping_would_not_pass(tiny_llama: Path, wrong: Clip) -> None:
    right = moments_of_torch(tiny_llama, "float32", clip_right)

    assert relative_error(moments_of_torch(tiny_llama, "float32", wrong), right) > 2 * MOMENTS["bfloat16"]


@configurations
@pytest.mark.parametrize("what", list(BAD_STEPS))
def test_a_step_that_is_not_finite_is_skipped(answers: Answers, ranks: int, stage: int | str, dtype: str, what: str) -> None:
    answer = answers(ranks, "steps", stage, dtype)

    assert answer["bad"][what]["metrics"]["skipped"] == 1
    assert_equal(answer["bad"][what]["weights"], answer["after"][-1])


@configurations
def test_a_skipped_step_leaves_nothing_behind(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    answer = answers(ranks, "steps", stage, dtype)

    metrics, weights = answer["continued"]
    assert metrics["skipped"] == 0
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(w).all() for w in weights.values())
    assert any(not np.array_equal(w, answer["after"][-1][n]) for n, w in weights.items())


@configurations
def test_all_ranks_stop_at_the_same_step_which_leaves_nothing_behind(
    answers: Answers, ranks: int, stage: int | str, dtype: str
) -> None:
    """With `training.target_kl`: by the mean over the tokens of all ranks, though each has its own. The step after it is the one that
    would have been taken without it."""
    answer = answers(ranks, "target kl", stage, dtype)

    mean, *own = answer["means"]
    assert answer["kl_old"][0] == pytest.approx(0.0, abs=1e-6 if dtype == "float32" else 1e-3)
    assert len(own) == ranks
    if ranks > 1:
        assert min(own) < answer["targets"]["exceeded"] < mean < answer["targets"]["not exceeded"] < max(own)
    for name, stopped in (("exceeded", 1), ("not exceeded", 0)):
        for metrics in answer[name]["metrics"]:
            assert (metrics["stopped"], metrics["skipped"]) == (stopped, 0)
            assert metrics["kl_old"] == pytest.approx(mean, rel=1e-3 if dtype == "float32" else 0.1)
    assert_equal(answer["exceeded"]["weights"], answer["weights"])
    assert_equal(answer["not exceeded"]["weights"], answer["without"])


@configurations
def test_a_checkpoint_continues_bit_for_bit(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    answer = answers(ranks, "steps", stage, dtype)

    assert_equal(answer["loaded"], answer["after"][-1])
    for name in ("loaded_continued", "fresh_continued"):
        metrics, weights = answer[name]
        assert metrics == answer["continued"][0]
        assert_equal(weights, answer["continued"][1])


@configurations
def test_nothing_is_unpickled_from_a_checkpoint(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    """Code planted in the files of a checkpoint does not run, and the refusal names the file."""
    found = answers(ranks, "steps", stage, dtype)["planted"]

    assert len(found) == (1 if stage in (0, "torch") else 2)
    for files, answer in found.items():
        assert not answer["ran"]
        assert f"{files.rpartition('*')[2]}.pt holds something else than tensors and is not loaded" in answer["said"]


@configurations
def test_a_rank_says_what_it_wrote(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    written = answers(ranks, "steps", stage, dtype)["written"]  # of rank 0

    kinds = {"torch": ["state.pt"], 0: ["model_states.pt"]}.get(stage, ["model_states.pt", "optim_states.pt"])
    assert [len([name for name in written if name.endswith(kind)]) for kind in kinds] == [1] * len(kinds)
    assert "rng_0.json" in written
    assert all(size > 0 for size in written.values())


@configurations
def test_reset_optimizer_clears_moments_and_step_count(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    answer = answers(ranks, "steps", stage, dtype)

    assert answer["before_reset"]["moment"] > 0
    assert answer["before_reset"]["step"] == len(STEPS) + 1
    assert answer["after_reset"] == {"moment": 0, "step": 0}
    assert answer["reset_continued_state"]["step"] == 1
    assert_equal(answer["reset_weights"], answer["continued"][1])


@pytest.mark.parametrize(("ranks", "stage"), list(product(WORLDS, STAGES)))
def test_the_step_after_a_reset_is_that_of_a_new_optimizer(
    answers: Answers, tiny_llama: Path, ranks: int, stage: int | str
) -> None:
    answer = answers(ranks, "steps", stage, "float32")
    policy = plain_policy(tiny_llama, "float32")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(torch.from_numpy(answer["reset_weights"][name]))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    backward(policy, Dpo(), STEPS[1])
    torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    optimizer.step()

    for name, parameter in policy.model.named_parameters():
        assert_stepped(answer["reset_continued"][name], parameter)


@configurations
def test_the_weight_source_declares_what_it_yields(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    source = answers(ranks, "steps", stage, dtype)["source"]

    check_source(source)
    assert "lm_head.weight" not in [name for name, *_ in source["yielded"]]  # tied: it is the embedding


def check_source(source: dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]) -> None:
    assert source["declared"] == source["yielded"]
    names = [name for name, *_ in source["yielded"]]
    assert len(names) == len(set(names))
    assert all(np.prod(shape) > 0 for _, _, shape in source["yielded"])


@pytest.mark.parametrize(("ranks", "stage", "model"), list(product(WORLDS, EXPORTED, ("model", "untied"))))
def test_an_export_is_the_policy(answers: Answers, ranks: int, stage: int | str, model: str) -> None:
    answer = answers(ranks, "export", stage, model)
    check_source(answer["source"])
    names = [name for name, *_ in answer["source"]["yielded"]]
    assert ("lm_head.weight" in names) == (model == "untied")

    exported = AutoModelForCausalLM.from_pretrained(answer["path"], dtype=torch.float32)

    assert_equal({n: p.detach().numpy() for n, p in exported.named_parameters()}, answer["weights"])
    assert exported.config.tie_word_embeddings == (model == "model")
    sequences = [s for i in STEPS[0] for s in i.sequences]
    with torch.no_grad():
        batch = collate([TrainItem(prompt_id="", sequences=(s,)) for s in sequences])
        outputs = Policy(exported)(batch, hidden=True)
    for ours, row, s in zip(answer["scores"][0], outputs.logprobs_BT.numpy(), sequences, strict=True):
        np.testing.assert_allclose(ours, row[: len(s.response_ids)], atol=1e-4)
    assert [len(rows) for rows in answer["hidden"]] == [len(sequences), 0]
    assert outputs.hidden_BH is not None
    np.testing.assert_allclose(np.stack(answer["hidden"][0]), outputs.hidden_BH.numpy(), rtol=1e-4, atol=1e-3)
    assert AutoTokenizer.from_pretrained(answer["path"]).eos_token == "<eos>"


@pytest.mark.parametrize(("ranks", "stage", "model"), list(product(WORLDS, EXPORTED, ("model", "untied"))))
def test_a_reference_scores_as_the_whole_model_does(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str, model: str
) -> None:
    """Also where each rank holds only its share of the reference, and after another one has taken its place and left again."""
    answer = answers(ranks, "export", stage, model)
    base = tiny_llama if model == "model" else tiny_llama_untied
    sequences = [s for i in STEPS[0] for s in i.sequences]
    assert set(answer["references"]) == {str(base), answer["path"]}

    for where, rows in answer["references"].items():
        whole = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        with torch.no_grad():
            expected = Policy(whole).eval()(collate([TrainItem(prompt_id="", sequences=(s,)) for s in sequences])).logprobs_BT
        for ours, row, s in zip(rows, expected.numpy(), sequences, strict=True):
            np.testing.assert_allclose(ours, row[: len(s.response_ids)], atol=1e-6)
    buffers = {f"model.{n}": b.numpy() for n, b in AutoModelForCausalLM.from_pretrained(base).named_buffers()}
    assert_equal(answer["buffers"], buffers)
    held, all_of_it = answer["resident"]
    share = ranks if stage == 3 else 1
    assert all_of_it / share <= held <= 1.01 * all_of_it / share


@pytest.mark.parametrize(("ranks", "stage", "model"), list(product(WORLDS, EXPORTED, ("model", "untied"))))
def test_a_mixture_is_that_of_the_whole_models(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str, model: str
) -> None:
    """Token by token of policy and reference, also where each rank holds only its share of both."""
    answer = answers(ranks, "export", stage, model)
    base = tiny_llama if model == "model" else tiny_llama_untied
    both = [AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32) for where in (answer["path"], str(base))]
    assert len(answer["mixed"]) == {1: 6, 2: 4}[ranks]

    for draw, drawn in answer["mixed"]:
        tokens = torch.tensor([[*draw.prompt_ids, *drawn.token_ids]])
        with torch.no_grad():
            ours, theirs = (each(input_ids=tokens).logits[0, len(draw.prompt_ids) - 1 : -1] for each in both)
        logits = ((1 - MIXTURE_WEIGHT) * ours + MIXTURE_WEIGHT * theirs) / MIXTURE_SAMPLING.temperature
        expected = torch.log_softmax(logits, dim=-1)[torch.arange(len(drawn.token_ids)), list(drawn.token_ids)]
        np.testing.assert_allclose(drawn.logprobs, expected.numpy(), atol=1e-5)
        assert drawn.ended == (drawn.token_ids[-1] == 2)
        assert drawn.ended or len(drawn.token_ids) == MIXTURE_SAMPLING.max_new_tokens
    first, again = answer["mixed"][0][1], answer["mixed"][-1][1]
    assert first.token_ids == again.token_ids, "a seed means the same in another batch"


@pytest.mark.parametrize(("ranks", "stage", "model"), list(product(WORLDS, EXPORTED, ("model", "untied"))))
def test_an_average_takes_the_policy_in_tensor_by_tensor(
    answers: Answers, tiny_llama: Path, tiny_llama_untied: Path, ranks: int, stage: int | str, model: str
) -> None:
    """From the base model on, in float32 and exactly; with a weight of 1 it is the policy; and it serves as a reference."""
    answer = answers(ranks, "export", stage, model)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama if model == "model" else tiny_llama_untied, dtype=torch.float32)
    reference = {name: p.detach() for name, p in base.named_parameters()}

    for made in answer["averages"]:
        policy = {name: torch.from_numpy(array) for name, array in made["policy"].items()}
        assert any(not torch.equal(reference[name], policy[name]) for name in policy)
        expected = {name: torch.lerp(reference[name], policy[name], made["weight"]) for name in policy}
        read, report = AutoModelForCausalLM.from_pretrained(made["path"], dtype=torch.float32, output_loading_info=True)
        assert not any(report.values())
        reference = {name: p.detach() for name, p in read.named_parameters()}
        assert_equal({n: p.numpy() for n, p in reference.items()}, {n: p.numpy() for n, p in expected.items()})
    assert_equal({n: p.numpy() for n, p in reference.items()}, answer["averages"][-1]["policy"])

    sequences = [s for i in STEPS[0] for s in i.sequences]
    whole = AutoModelForCausalLM.from_pretrained(answer["averages"][1]["path"], dtype=torch.float32)
    with torch.no_grad():
        scores = Policy(whole).eval()(collate([TrainItem(prompt_id="", sequences=(s,)) for s in sequences])).logprobs_BT
    for ours, row, s in zip(answer["average_scores"], scores.numpy(), sequences, strict=True):
        np.testing.assert_allclose(ours, row[: len(s.response_ids)], atol=1e-6)


# --- memory that is shared with an engine ---


@configurations
def test_what_a_learner_gives_away_comes_back_bit_for_bit(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    answer = answers(ranks, "offload", stage, dtype)

    again = answer["reloaded"]
    assert_equal(again["weights"], answer["weights"])
    for ours, theirs in zip(again["scores"][0], answer["scores"][0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(name.startswith("exp_avg") for name in answer["state"])
    assert_equal(again["state"], answer["state"])
    assert answer["next"][0] == answer["next_without"][0]
    assert_equal(answer["next"][1], answer["next_without"][1])


@configurations
def test_a_learner_without_its_optimizer_can_still_send_its_weights(
    answers: Answers, ranks: int, stage: int | str, dtype: str
) -> None:
    answer = answers(ranks, "offload", stage, dtype)

    assert answer["moments_left"]
    assert not any(answer["moments_left"])
    assert_equal(answer["weights_for_a_push"], answer["weights"])


@configurations
def test_nothing_of_a_learner_stays_behind(answers: Answers, ranks: int, stage: int | str, dtype: str) -> None:
    """Parameters, moments, gradients, buffers of communication, the reference: less than a hundredth stays."""
    answer = answers(ranks, "offload", stage, dtype)

    assert answer["kept"] > 100_000
    assert sum(size for size, _ in answer["left"].values()) < answer["loaded"] / 100, answer["left"]
