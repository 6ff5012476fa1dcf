"""Adapters in the real learners: against one process, in float32, whose weights are written out as base + scaling * B @ A."""

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
from transformers import AutoModelForCausalLM

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.inpo import Inpo
from onlinerl.algorithms.kto import Kto
from onlinerl.algorithms.lipo_lambda import LipoLambda
from onlinerl.algorithms.ppo import Ppo
from onlinerl.algorithms.re_po import RePo
from onlinerl.algorithms.sppo import Sppo
from onlinerl.algorithms.tdpo2 import Tdpo2
from onlinerl.algorithms.weighted_sft import WeightedSft
from onlinerl.batch import Outputs
from onlinerl.learners._policy import Policy
from onlinerl.learners._vocabulary import FrozenStates
from onlinerl.ops.batching import collate
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Draw, Sampling, TrainItem, TrainSequence

pytestmark = pytest.mark.engine

LORA = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "v_proj", "mlp.down_proj"]}
SCALING = 1.5
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in TARGETS]
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
MIXED, MIXTURE_WEIGHT = Sampling(temperature=0.7, max_new_tokens=6), 0.375
DRAWS = [Draw(tuple(range(5, 6 + i % 4)), seed=i) for i in range(3)]
WEIGHTS = dict[str, np.ndarray]


def sequence(rng: np.random.Generator, **extra: Any) -> TrainSequence:
    length = int(rng.integers(3, 10))
    arrays = {name: rng.normal(mean, 0.3, length).astype(np.float32) for name, mean in extra.items()}
    prompt, response = (tuple(map(int, rng.integers(3, 128, n))) for n in (int(rng.integers(2, 8)), length))
    return TrainSequence(prompt_ids=prompt, response_ids=response, **arrays)


def pairs(count: int, seed: int) -> list[TrainItem]:
    rng = np.random.default_rng(seed)
    two = lambda: tuple(sequence(rng, reference_logprobs=-4.5) for _ in range(2))  # noqa: E731
    return [TrainItem(prompt_id=str(i), sequences=two(), prob=0.75) for i in range(count)]


def samples(count: int, seed: int) -> list[TrainItem]:
    rng = np.random.default_rng(seed)
    means = {"reference_logprobs": -4.5, "old_logprobs": -5.0, "behavior_logprobs": -5.0, "advantages": 0.0, "values": 0.0}
    made = (sequence(rng, **means, returns=0.5).with_(score=float(rng.normal())) for _ in range(count))
    return [TrainItem(prompt_id=str(i), sequences=(one,)) for i, one in enumerate(made)]


def won(count: int, seed: int) -> list[TrainItem]:
    """Pairs of which every response has a win rate."""
    rates = lambda item: tuple(s.with_(win_rate=r) for s, r in zip(item.sequences, (0.75, 0.25), strict=True))  # noqa: E731
    return [replace(item, sequences=rates(item)) for item in pairs(count, seed)]


def lists(count: int, seed: int) -> list[TrainItem]:
    rng = np.random.default_rng(seed)
    made = lambda: (sequence(rng, reference_logprobs=-5.5).with_(win_rate=rate) for rate in (0.9, 0.5, 0.1))  # noqa: E731
    return [TrainItem(prompt_id=str(i), sequences=tuple(made())) for i in range(count)]


def anchored(items: list[TrainItem]) -> list[TrainItem]:
    """With what a base model says that is not the reference."""
    base = lambda s: s.with_(anchor_logprobs=s.reference_logprobs[::-1] - np.float32(0.5))  # noqa: E731
    return [replace(item, sequences=tuple(map(base, item.sequences))) for item in items]


ITEMS = pairs(7, seed=1)
WEIGHED = WeightedSft()
LOSSES: dict[str, tuple[Algorithm, list[TrainItem]]] = {
    "pairs": (Dpo(), ITEMS),
    "fewer items than ranks": (Dpo(), pairs(1, seed=2)),
    "policy gradients": (Grpo(kl_coef=0.05), samples(8, seed=5)),
    "lists": (LipoLambda(beta=0.5), lists(6, seed=6)),
    "two references": (Inpo(eta=0.5), anchored(pairs(7, seed=7))),
    "the whole step at once": (Kto(threshold=0.0), samples(8, seed=3)),
    "pairs, the whole step at once": (RePo(beta=0.5), pairs(7, seed=8)),
    "two responses as one": (Sppo(), won(7, seed=9)),
    "weighed likelihood": (WEIGHED, list(WEIGHED.prepare(samples(8, seed=10)))),
}
BESIDE = Tdpo2(alpha=2.0)
CRITIC: tuple[Algorithm, list[TrainItem]] = (
    Ppo(critic="separate", critic_learning_rate=1e-2, kl_in="loss"),
    samples(8, seed=4),
)
CASES = {
    **{("lora", s, d): {"kind": "lora", "stage": s, "dtype": d} for s, d in product((0, 1, 2, 3, "torch"), BOUND)},
    **{("critic", s): {"kind": "critic", "stage": s, "dtype": "float32"} for s in (0, 2, 3, "torch")},
}
CASES["lora", 1, "float32"]["padding_free"] = True  # both at once
PACKED: list[tuple[Any, ...]] = [("lora", stage, "float32", "packed") for stage in (0, 2, 3, "torch")]
CASES |= {case: {**CASES[case[:3]], "padding_free": True} for case in PACKED}
QUICK = {(1, ("lora", "torch", "float32")), (2, ("lora", 3, "float32")), (2, ("lora", 1, "float32"))}
"""Of all cases for a number of ranks; the others are `long`."""
Answers = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """`answers(ranks, case)`: what the ranks computed. The quick cases of a number of ranks run together, the packed ones, and the others."""
    done: dict[tuple[int, str], dict[Any, Any]] = {}

    def together(ranks: int, case: tuple[Any, ...]) -> str:
        return "quick" if (ranks, case) in QUICK else "packed" if case in PACKED else "others"

    def ask(ranks: int, case: tuple[Any, ...]) -> dict[str, Any]:
        group = together(ranks, case)
        if (ranks, group) not in done:
            cases = [each for each in CASES if together(ranks, each) == group]
            done[ranks, group] = asked(ranks, cases, tiny_llama, tmp_path_factory.mktemp(f"lora-{ranks}"))
        answer: dict[str, Any] = done[ranks, group][case]
        if "error" in answer:
            pytest.fail(str(answer["error"]))
        return answer

    return ask


def asked(ranks: int, cases: Sequence[tuple[Any, ...]], model: Path, directory: Path) -> dict[Any, Any]:
    told = lambda algorithm, items: {"algorithm": algorithm, "items": items}  # noqa: E731
    job = {
        "model": str(model),
        "directory": str(directory),
        "lora": LORA,
        "items": ITEMS,
        "algorithm": Dpo(),
        "losses": {name: told(*what) for name, what in LOSSES.items()},
        "beside": told(BESIDE, ITEMS),
        "mixture": (DRAWS, MIXED, MIXTURE_WEIGHT),
        "critic": told(*CRITIC),
        "cases": [CASES[case] for case in cases],
    }
    answers = run_ranks(Path(__file__).with_name("lora_process.py"), ranks, job, directory)
    return dict(zip(cases, answers, strict=True))


def cases(kind: str, *more: Sequence[Any]) -> list[object]:
    """Number of ranks, stage, and what else a case is named by."""
    every = (1, 2), *more
    named = [(ranks, (kind, *rest)) for ranks, *rest in product(*every)]
    return [pytest.param(*one, marks=[] if one in QUICK else [pytest.mark.long], id=f"{one[0]}-{one[1]}") for one in named]


packed = [
    pytest.param(ranks, case, marks=pytest.mark.long, id=f"{ranks}-packed-{case[1]}") for ranks, case in product((1, 2), PACKED)
]
lora = pytest.mark.parametrize(("ranks", "case"), [*cases("lora", (0, 1, 2, 3, "torch"), tuple(BOUND)), *packed])


# --- what it should be ---


@cache
def plain(model: Path, dtype: str, critic: str | None = None) -> Policy:
    """The base model, in float32, from weights as the learner's dtype rounds them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Policy(loaded.bfloat16().float() if dtype == "bfloat16" else loaded, critic).eval()


def leaves(adapters: WEIGHTS) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in adapters.items()}


def written_out(
    policy: Policy, adapters: dict[str, torch.Tensor], form: str, part: str = "model.model."
) -> dict[str, torch.Tensor]:
    """Weights of the policy that differ from the base model's, by their names in it."""
    own = dict(policy.named_parameters())
    return {
        f"{part}{layer}.weight": own[f"{part}{layer}.weight"].detach()
        + SCALING * adapters[form.format(layer, "B")] @ adapters[form.format(layer, "A")]
        for layer in LAYERS
    }


PEFT = "base_model.model.model.{}.lora_{}.weight"
OURS = "model.model.{}.lora_{}.default.weight"
CRITICS = "critic.{}.lora_{}.default.weight"


def gradients(
    policy: Policy, changed: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], loss: Any, **more: Any
) -> WEIGHTS:
    """By autograd, through the weights as they are written out."""
    algorithm, items = loss
    batch = collate(items)
    needs = algorithm.needs

    def forward() -> Outputs:
        found: Outputs = torch.func.functional_call(
            policy, changed, (batch,), {"values": needs.values, "entropy": needs.entropy, **more}
        )
        return found

    if isinstance(algorithm, WholeStep):
        from onlinerl.learners._whole_step import first_pass

        (batch,), _ = first_pass(algorithm, [batch], lambda _: forward(), lambda own: ([own], 0), None)
    total = algorithm.loss(forward(), batch).total / len(items)
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True, retain_graph=True)
    return {n: np.zeros(t.shape) if g is None else g.double().numpy() for (n, t), g in zip(trained.items(), found, strict=True)}


def relative_error(ours: WEIGHTS, theirs: WEIGHTS) -> float:
    """Of all tensors as one vector."""
    assert ours.keys() == theirs.keys()
    gap = sum(((ours[n].astype(np.float64) - theirs[n]) ** 2).sum() for n in theirs)
    return float(np.sqrt(gap / sum((g**2).sum() for g in theirs.values())))


def as_ours(adapters: WEIGHTS) -> WEIGHTS:
    names = {PEFT.format(layer, part): OURS.format(layer, part) for layer in LAYERS for part in "AB"}
    return {names[name]: value for name, value in adapters.items()}


def assert_equal(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    assert [n for n in ours if not np.array_equal(ours[n], theirs[n])] == []


def same_scores(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, one, other))


# --- tests ---


@lora
def test_nothing_but_adapters_is_trained(answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]) -> None:
    """At first the policy is the base model, to the last bit; and what is the base model stays as it is on the disk."""
    answer = answers(ranks, case)
    assert same_scores(*answer["begun"])
    on_disk = {n: p.detach().numpy() for n, p in plain(tiny_llama, case[2]).model.named_parameters()}
    assert_equal(answer["base"], on_disk)
    assert_equal(answer["base after"], on_disk)
    assert answer["adapters"].keys() == {PEFT.format(layer, part) for layer in LAYERS for part in "AB"}
    assert all(np.abs(value).max() > 0 for value in answer["adapters"].values())
    size = sum(value.size for value in answer["adapters"].values())
    shared = ranks if case[1] in (1, 2, 3) else 1
    assert size / shared <= answer["optimized"] < size / shared + 1000  # padded
    assert answer["saved"].keys() == as_ours(answer["adapters"]).keys()


@lora
def test_gradients_are_those_of_one_process(answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]) -> None:
    answer, policy = answers(ranks, case), plain(tiny_llama, case[2])
    trained = leaves(as_ours(answer["adapters"]))
    changed = written_out(policy, trained, OURS)
    for name, loss in LOSSES.items():
        assert relative_error(answer["gradients", name], gradients(policy, changed, trained, loss)) < BOUND[case[2]], name
    assert_equal(answer["gradients", "again"], answer["gradients", name])


@lora
def test_gradients_beside_a_reference(answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]) -> None:
    """Of a loss that reads whole distributions of the base model, or of an iterate from its export."""
    answer, policy = answers(ranks, case), plain(tiny_llama, case[2])
    trained, batch = leaves(as_ours(answer["later"])), collate(ITEMS)
    earlier = written_out(policy, leaves(as_ours(answer["adapters"])), OURS)
    for name, reference in (("base", {}), ("export", earlier)):
        with torch.no_grad():
            states = torch.func.functional_call(policy, reference, (batch,), {"states_only": True})
        frozen = FrozenStates(states, policy.head.weight.detach(), None, policy.head.rule)
        expected = gradients(policy, written_out(policy, trained, OURS), trained, (BESIDE, ITEMS), reference=frozen)
        assert relative_error(answer["beside", name], expected) < BOUND[case[2]], name
    assert not answer["second model"]


@lora
def test_what_is_drawn_from_a_mixture_is_of_the_policy_and_its_base_or_an_older_iterate(
    answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]
) -> None:
    """One network says the logits of both, in turns."""
    answer, model = answers(ranks, case), plain(tiny_llama, case[2]).model
    now, then = (
        {
            name.removeprefix("model."): weight
            for name, weight in written_out(plain(tiny_llama, case[2]), leaves(as_ours(a)), OURS).items()
        }
        for a in (answer["later"], answer["adapters"])
    )
    for name, reference in (("base", {}), ("export", then)):
        assert len(answer["mixed", name]) == len(DRAWS)
        for draw, drawn in zip(DRAWS, answer["mixed", name], strict=True):
            tokens = torch.tensor([[*draw.prompt_ids, *drawn.token_ids]])
            with torch.no_grad():
                ours, theirs = (
                    torch.func.functional_call(model, weights, (tokens,)).logits[0, len(draw.prompt_ids) - 1 : -1]
                    for weights in (now, reference)
                )
            mixed = (1 - MIXTURE_WEIGHT) * ours + MIXTURE_WEIGHT * theirs
            expected, alone = (
                torch.log_softmax(logits / MIXED.temperature, dim=-1)[torch.arange(len(tokens_T)), tokens_T].numpy()
                for tokens_T, logits in ((torch.tensor(drawn.token_ids), each) for each in (mixed, ours))
            )
            assert np.abs(drawn.logprobs - expected).max() < (1e-4 if case[2] == "float32" else 0.3)
            assert np.abs(alone - expected).max() > 1e-3
    assert not answer["second model"]


@lora
def test_an_older_checkpoint_and_then_the_newer_one(answers: Answers, ranks: int, case: tuple[Any, ...]) -> None:
    """As a resume with `schedule.max_lag: 1` takes them on: what the engine has sampled from, and then what is trained further."""
    answer = answers(ranks, case)
    assert same_scores(answer["older"], answer["scores"]["policy"])
    assert same_scores(answer["newer"], answer["scores"]["later"])
    assert same_scores(answer["export beside the newer"], answer["scores"]["policy"])


@lora
def test_what_is_given_away_comes_back_bit_for_bit(answers: Answers, ranks: int, case: tuple[Any, ...]) -> None:
    """Memory that is shared with an engine: moments first, while weights can still be pushed, then all, an older iterate's adapter too."""
    answer = answers(ranks, case)["away"]
    assert answer["moments left"]
    assert not any(answer["moments left"])
    assert_equal(answer["merged without moments"], answer["merged"])
    assert answer["kept"] > 10_000
    for before, after in answer["scores"].values():
        assert same_scores(before, after)
    assert_equal(*answer["state"])


@lora
def test_log_probs_of_three_models_from_one(answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]) -> None:
    """The policy, the base model (adapters off), and an older iterate (the adapter of its export)."""
    scores = answers(ranks, case)["scores"]
    assert same_scores(scores["base"], answers(ranks, case)["begun"][1])
    assert same_scores(scores["of the export"], scores["policy"])
    assert same_scores(scores["still"], scores["later"])
    assert not any(map(np.array_equal, scores["later"], scores["policy"]))
    policy = plain(tiny_llama, case[2])
    changed = written_out(policy, leaves(as_ours(answers(ranks, case)["adapters"])), OURS)
    with torch.no_grad():
        batch = collate([TrainItem(prompt_id="", sequences=(s,)) for item in ITEMS for s in item.sequences])
        for name, weights in (("base", {}), ("policy", changed)):
            expected = torch.func.functional_call(policy, weights, (batch,)).logprobs_BT.numpy()
            gaps = [np.abs(ours - row[: len(ours)]).mean() for ours, row in zip(scores[name], expected, strict=True)]
            assert max(gaps) < (1e-5 if case[2] == "float32" else 0.05), name


@lora
def test_what_is_sent_and_exported_is_merged_to_the_last_bit(
    answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]
) -> None:
    """In float32, then rounded once. The export loads anywhere, and so does the adapter beside it."""
    peft = pytest.importorskip("peft")
    answer, dtype = answers(ranks, case), getattr(torch, case[2])
    base = {n: p.detach() for n, p in plain(tiny_llama, case[2]).model.named_parameters()}
    trained = {name: torch.from_numpy(value) for name, value in answer["adapters"].items()}
    merged = base | {
        f"model.{layer}.weight": base[f"model.{layer}.weight"]
        + SCALING * (trained[PEFT.format(layer, "B")] @ trained[PEFT.format(layer, "A")])
        for layer in LAYERS
    }
    expected = {name: tensor.to(dtype).float().numpy() for name, tensor in merged.items()}
    assert_equal(answer["merged"], expected)

    export = Path(answer["here"]) / "export"
    read, report = AutoModelForCausalLM.from_pretrained(export, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    assert_equal({n: p.detach().float().numpy() for n, p in read.named_parameters()}, expected)
    whole = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), export / "adapter"
    )
    again = {n: p.detach().to(dtype).float().numpy() for n, p in whole.merge_and_unload().named_parameters()}
    for name, value in again.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6 if case[2] == "float32" else 1e-2)


@lora
def test_a_resume_is_the_same_bit_for_bit(answers: Answers, ranks: int, case: tuple[Any, ...]) -> None:
    """With its optimizer, and with what dropout drops; which it never does where log-probs are asked for."""
    answer = answers(ranks, case)
    assert same_scores(*answer["without dropout"])
    assert_equal(answer["loaded"], answer["saved"])
    (metrics, weights, scores), (others, fresh, said) = answer["continued"], answer["fresh continued"]
    assert metrics == others == answer["loaded continued"][0]
    assert_equal(fresh, weights)
    assert_equal(answer["loaded continued"][1], weights)
    assert same_scores(said, scores)
    assert any(not np.array_equal(weights[name], value) for name, value in answer["saved"].items())
    assert answer["with other masks"]["loss"] != metrics["loss"]


@lora
def test_a_checkpoint_holds_adapters_and_not_the_base_model(answers: Answers, ranks: int, case: tuple[Any, ...]) -> None:
    answer = answers(ranks, case)
    assert "adapters.json" in answer["written"]
    folder = Path(answer["here"]) / "checkpoint"
    states = [torch.load(file, weights_only=False) for file in folder.rglob("*.pt") if "optim_states" not in file.name]
    held = [name for state in states for name in state.get("weights", state.get("module", {})) or {}]
    assert all(".lora_" in name and ".saved." not in name for name in held), held
    assert held or case[1] == 3  # whose ranks keep theirs as the optimizer has them


@pytest.mark.parametrize(("ranks", "case"), cases("critic", (0, 2, 3, "torch")))
def test_a_critic_has_adapters_and_a_whole_head(answers: Answers, tiny_llama: Path, ranks: int, case: tuple[Any, ...]) -> None:
    answer, policy = answers(ranks, case), plain(tiny_llama, "float32", "separate")
    trained = leaves(answer["trained"])
    adapted = {form.format(layer, part) for form in (OURS, CRITICS) for layer in LAYERS for part in "AB"}
    assert trained.keys() == adapted | {"value_head.weight", "value_head.bias"}
    heads = {name: tensor for name, tensor in trained.items() if name.startswith("value_head")}
    changed = written_out(policy, trained, OURS) | written_out(policy, trained, CRITICS, "critic.") | heads
    assert relative_error(answer["gradients"], gradients(policy, changed, trained, CRITIC)) < 1e-5
    assert answer["resumed"]
