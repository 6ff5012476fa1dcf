"""Padding-free rows: what a packed batch says and teaches is what the padded one does, in every family that `check` lets through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flash import flash_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import ROWS, VOCABULARY, assert_same, batch_of, gradients, llama, rows_of, sequences
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from onlinerl.algorithms.dpo import Dpo
from onlinerl.batch import Batch, Outputs
from onlinerl.controller import self_test
from onlinerl.errors import ConfigError, LearnerError
from onlinerl.families import PACKED, check_packing
from onlinerl.learners import _packing
from onlinerl.learners._packing import PackedRow
from onlinerl.learners._policy import Policy
from onlinerl.learners._self_test import compare
from onlinerl.learners._vocabulary import FrozenStates
from onlinerl.learners.deepspeed import DeepSpeed
from onlinerl.ops.batching import collate
from onlinerl.types import SelfTest, TrainItem, TrainSequence

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Where there is a sliding window, most sequences are longer.
    "sliding_window": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}


def build(family: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**{**SMALL, **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def alone(policy: Policy, rows: Sequence[TrainSequence]) -> list[Tensor]:
    """Log-probs and entropies of each, by itself."""
    found: list[Tensor] = []
    for row in rows:
        outputs = policy(batch_of([row]), entropy=True)
        assert outputs.entropy_BT is not None
        found += [outputs.logprobs_BT[0], outputs.entropy_BT[0]]
    return found


def together(policy: Policy, rows: Sequence[TrainSequence]) -> list[Tensor]:
    outputs: Outputs = policy(batch_of(rows), entropy=True)
    assert outputs.entropy_BT is not None
    pairs = zip(rows_of(outputs.logprobs_BT, rows), rows_of(outputs.entropy_BT, rows), strict=True)
    return [term for pair in pairs for term in pair]


def total(terms: Sequence[Tensor]) -> Tensor:
    """Weighted, so that a mix-up of positions shows."""
    return sum((torch.linspace(-1, 2, len(t)) * t).sum() for t in terms) + torch.zeros(())


USUAL = {
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "llama",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "olmo2",
    "granite",
    "gpt2",
}
"""The families that go through engine and push in the tests, and one with learned positions. `make test-families` runs all."""
CASES = [
    pytest.param(family, attention, marks=() if family in USUAL else pytest.mark.families)
    for family in sorted(PACKED)
    for attention in ("sdpa", "eager", "flash_attention_2")
]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_that_may_be_packed_is_computed_as_if_each_sequence_were_alone(
    monkeypatch: pytest.MonkeyPatch, family: str, attention: str
) -> None:
    """Log-probs, entropies and all gradients, with windows that are shorter than the sequences; and not so in a row like any other."""
    caps = {"attn_logit_softcapping": None} if attention == "sdpa" else {}
    on_gpus = attention == "flash_attention_2"
    model, twin = (build(family, "eager" if on_gpus else attention, **caps) for _ in range(2))
    calls = flash_on_cpu(monkeypatch)
    if on_gpus:  # transformers looks for the kernels when a model is built
        model.config._attn_implementation = twin.config._attn_implementation = attention

    ours = together(Policy(twin, padding_free=True), ROWS)
    assert calls == [[0, 12, 21, 23, 36]] * (2 * on_gpus), "in each layer"
    theirs = alone(Policy(model), ROWS)

    assert_same(ours, theirs, tolerance=3e-5)
    found, expected = gradients(twin, total(ours)), gradients(model, total(theirs))
    assert found.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * size, rtol=1e-4)
    row = PackedRow.of(batch_of(ROWS))
    with torch.no_grad():
        plain, restarting = (model.base_model(input_ids=row.tokens_1L, **k).last_hidden_state for k in ({}, positions(row)))
    assert (plain - restarting).abs().max() > 0.01


def positions(row: PackedRow) -> dict[str, Tensor]:
    return {"position_ids": row.positions_1L}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("jamba", {}, "not known of the family 'jamba'"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 2}, "layers of the kind 'linear_attention' carry something"),
        ("bloom", {}, "not known of the family 'bloom'"),
        ("mpt", {}, "not known of the family 'mpt'"),
        ("opt", {}, "not known of the family 'opt'"),
        ("biogpt", {}, "not known of the family 'biogpt'"),
    ],
)
def test_families_in_which_something_gets_across_are_refused(family: str, changes: dict[str, Any], said: str) -> None:
    """And rightly: with transformers' own means, position ids that begin anew, each of them says something else than of a sequence alone."""
    model = build(family, "eager" if family in {"bloom", "mpt"} else "sdpa", **changes)
    with pytest.raises(ConfigError, match=said) as error:
        check_packing(model.config.to_dict())
    assert error.value.field == "learner.padding_free"
    with pytest.raises(ConfigError, match=said):
        Policy(model, padding_free=True)

    row = PackedRow.of(batch_of(ROWS))
    told = {} if family in {"bloom", "mpt"} else positions(row)  # these know no positions
    with torch.no_grad():
        packed = model.base_model(input_ids=row.tokens_1L, use_cache=False, **told).last_hidden_state[0]
        singly = [
            model.base_model(input_ids=torch.tensor([[*s.prompt_ids, *s.response_ids]]), use_cache=False).last_hidden_state[0]
            for s in ROWS
        ]
    assert (packed - torch.cat(singly)).abs().max() > 0.1


def test_a_known_family_with_layers_of_another_kind_is_refused() -> None:
    check_packing({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(ConfigError, match="chunked_attention"):
        check_packing({"model_type": "llama", "layer_types": ["full_attention", "chunked_attention"]})


# --- rows ---

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=7)
MODELS: dict[str, tuple[PreTrainedModel, PreTrainedModel]] = {}


def pair(family: str) -> tuple[Policy, Policy]:
    """A padded policy and a packed one with the same weights, with a critic whose values differ from token to token."""
    if family not in MODELS:
        MODELS[family] = build(family), build(family)
    made = [Policy(model, "shared", padding_free=packed) for model, packed in zip(MODELS[family], (False, True), strict=True)]
    for policy in made:
        assert policy.value_head is not None
        torch.manual_seed(1)
        torch.nn.init.normal_(policy.value_head.weight)
    return made[0], made[1]


def everything(policy: Policy, rows: Sequence[TrainSequence], frozen: Tensor | None = None) -> list[Tensor]:
    """All that can be asked about a batch, row by row, in one order."""
    batch = batch_of(rows)
    reference = None if frozen is None else reference_of(policy, batch, frozen)
    outputs = policy(batch, temperature=0.7, values=True, entropy=True, collision=True, reference=reference)
    tables = [outputs.logprobs_BT, outputs.values_BT, outputs.entropy_BT, outputs.collision_BT, outputs.reference_kl_BT]
    return [row for table in tables if table is not None for row in rows_of(table, rows)]


def reference_of(policy: Policy, batch: Batch, matrix: Tensor) -> FrozenStates:
    """The same states with another output matrix."""
    with torch.no_grad():
        return FrozenStates(policy(batch, states_only=True), matrix, None, policy.head.rule)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@given(lengths=LENGTHS, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_batch_says_the_same_packed_as_padded_in_any_order_and_cut_up_anyhow(
    family: str, lengths: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    padded, packed = pair(family)
    rows = sequences(lengths, seed)
    matrix = 1.5 * padded.head.weight.detach()
    with torch.no_grad():
        assert_same(everything(packed, rows, matrix), everything(padded, rows, matrix), tolerance=2e-5)
        order = data.draw(st.permutations(range(len(rows))))
        cut = data.draw(st.integers(0, len(rows)))
        shuffled = [rows[i] for i in order]
        parts = [p for p in (shuffled[:cut], shuffled[cut:]) if p]
        found = [table for part in parts for table in rows_of(packed(batch_of(part)).logprobs_BT, part)]
        expected = rows_of(padded(batch_of(rows)).logprobs_BT, rows)
    assert_same(found, [expected[i] for i in order], tolerance=2e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradients_of_policy_and_critic_are_those_of_the_padded_form(critic: Any, recompute: bool) -> None:
    def found(padding_free: bool) -> dict[str, Tensor]:
        policy = Policy(llama(tied=False), critic, padding_free=padding_free).eval()
        assert policy.value_head is not None
        torch.manual_seed(1)
        torch.nn.init.normal_(policy.value_head.weight)
        if recompute:
            policy.recompute_activations()
        total(everything(policy, ROWS, 1.5 * policy.head.weight.detach())).backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    ours, theirs = found(True), found(False)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=1e-4)


def test_a_row_holds_the_sequences_without_padding() -> None:
    row = PackedRow.of(batch_of(ROWS))
    assert row.tokens_1L.tolist() == [[token for s in ROWS for token in (*s.prompt_ids, *s.response_ids)]]
    assert row.positions_1L.tolist() == [[*range(12), *range(9), *range(2), *range(13)]]
    assert row.starts_B.tolist() == [0, 12, 21, 23]
    assert row.lengths == (12, 9, 2, 13)


@pytest.mark.parametrize("critic", [None, "shared", "separate"])
def test_an_empty_micro_batch_reaches_every_parameter_with_a_zero_gradient(critic: Any) -> None:
    policy = Policy(llama(), critic, padding_free=True)
    outputs: Outputs = policy(collate([]), values=critic is not None)
    (outputs.logprobs_BT.sum() * 0 + (0 if outputs.values_BT is None else outputs.values_BT.sum() * 0)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_pair_of_positions_of_two_sequences_is_computed(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    inner, seen = getattr(_packing, f"_{attention}"), []

    def counting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return inner(module, query, *args, **kwargs)

    monkeypatch.setattr(_packing, f"_{attention}", counting)
    Policy(llama(attn_implementation=attention), padding_free=True)(batch_of(ROWS))
    assert seen == [12, 9, 2, 13] * 2


def test_what_is_exported_does_not_name_how_it_was_trained(tmp_path: Any) -> None:
    policy = Policy(llama(), padding_free=True)
    assert policy.model.config._attn_implementation == "sdpa_by_sequence"
    policy.model.config.save_pretrained(tmp_path)
    assert "by_sequence" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_group_of_ranks_plans_rows_by_what_the_learner_does(monkeypatch: pytest.MonkeyPatch, padding_free: bool) -> None:
    """Steps, self-tests and scores, which may hold twice as much."""
    kind = pytest.importorskip("onlinerl.cluster.group").LearnerGroup
    group = kind.__new__(kind)
    group._config, group.actors = DeepSpeed(padding_free=padding_free, tokens_per_microbatch=30), [None]
    group._algorithm = Dpo()
    plans: list[list[list[Any]]] = []

    def scatter(_: Any, arguments: Any, *__: Any) -> Any:
        plans.append(arguments[0][0])
        raise StopAsyncIteration  # what becomes of the plan is tested elsewhere

    monkeypatch.setattr(group, "scatter", scatter)
    rows = sequences([(2, 22), (2, 4), (2, 4), (2, 22)])
    items = [TrainItem(prompt_id=str(i), sequences=(row,)) for i, row in enumerate(rows)]
    asks: list[Callable[[], object]] = [
        lambda: next(group.update([items], [0.1])),
        lambda: group.self_test(items, "base"),
        lambda: group.logprobs(rows),
    ]
    for ask in asks:
        with pytest.raises(StopAsyncIteration):
            ask()

    expected = [[24, 6], [24, 6]] if padding_free else [[24], [24], [6, 6]]
    held = [
        [sum(len(s.prompt_ids) + len(s.response_ids) for s in getattr(i, "sequences", (i,))) for i in m]
        for p in plans
        for m in p
    ]
    assert held[: 2 * len(expected)] == expected * 2
    assert held[2 * len(expected) :] == ([[24, 24, 6, 6]] if padding_free else [[24, 24], [6, 6]])


# --- faults ---


def crossing(self: PackedRow, attention: str) -> dict[str, Any]:
    """Nobody is told where a sequence begins: all see what is before them."""
    return {"input_ids": self.tokens_1L}


def not_restarting(self: PackedRow, attention: str) -> dict[str, Any]:
    lengths = {_packing.LENGTHS: self.lengths}
    return {"input_ids": self.tokens_1L, "position_ids": torch.arange(self.tokens_1L.shape[1])[None], **lengths}


@pytest.mark.parametrize(("family", "fault"), [("llama", crossing), ("gpt2", crossing), ("gpt2", not_restarting)])
def test_sequences_that_see_each_other_and_positions_that_go_on_are_caught(
    monkeypatch: pytest.MonkeyPatch, family: str, fault: Any
) -> None:
    """By the comparison above, and by the self-test before the first step, which has nothing to compare with but another order."""
    monkeypatch.setattr(PackedRow, "arguments", fault)
    padded, packed = pair(family)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(everything(packed, ROWS), everything(padded, ROWS), tolerance=1e-3)

    result = noise(packed)
    assert result > self_test.MOST_NOISE
    with pytest.raises(LearnerError, match="with the order of the responses in a row") as error:
        self_test.check(SelfTest(**{**SOUND, "noise": result}), None, "float32", padding_free=True)
    assert error.value.field == "learner.padding_free"


def test_the_self_test_finds_nothing_where_nothing_is_wrong() -> None:
    assert noise(pair("llama")[1]) < 1e-5
    self_test.check(SelfTest(**SOUND), None, "float32", padding_free=True)


SOUND: dict[str, Any] = {
    "loss": 0.0,
    "repeat_kl": 0.0,
    "stored_loss": 0.0,
    "stored_loss_slope": 0.0,
    "stored_gaps": {},
    "noise": 0.0,
    "stored_tilts": {},
    "base_gap": 0.0,
}


def noise(policy: Policy) -> float:
    def base(batch: Batch) -> Tensor:
        return policy(batch).logprobs_BT

    sampled = [s.with_(reference_logprobs=np.zeros(len(s.response_ids), np.float32)) for s in ROWS]
    items = [
        TrainItem(prompt_id=str(i), sequences=(a, b)) for i, (a, b) in enumerate(zip(sampled[::2], sampled[1::2], strict=True))
    ]
    return compare(policy, base, Dpo(), [items], torch.device("cpu"), padding_free=True).noise
