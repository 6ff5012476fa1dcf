"""The policy's log-probs against a plain computation over all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_llama import ROWS, VOCABULARY, LargestTensor, assert_same, batch_of, gradients, llama, logits_of, rows_of, sequences
from torch import Tensor
from transformers import LlamaForCausalLM

from onlinerl.batch import Outputs
from onlinerl.learners import _policy, _vocabulary
from onlinerl.learners._policy import Policy
from onlinerl.ops.batching import collate
from onlinerl.types import TrainSequence


def naive(
    model: LlamaForCausalLM, rows: Sequence[TrainSequence], temperature: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Row by row, unpadded, from all logits: log-probs and entropies of the response tokens."""
    logprobs, entropies = [], []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        table = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, dim=-1)
        before = table[len(row.prompt_ids) - 1 : -1]
        logprobs.append(before[torch.arange(len(row.response_ids)), torch.tensor(row.response_ids)])
        entropies.append(-(before.exp() * before).sum(-1))
    return logprobs, entropies


@pytest.mark.parametrize("chunk", [1, 4, 7, 1024])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_entropies_and_gradients_equal_the_plain_computation(
    monkeypatch: pytest.MonkeyPatch, chunk: int, tied: bool
) -> None:
    monkeypatch.setattr(_policy, "CHUNK", chunk)
    model = llama(tied)
    policy = Policy(model)
    batch = batch_of(ROWS)

    outputs = policy(batch, entropy=True)
    plain, plain_entropy = naive(model, ROWS)

    assert outputs.entropy_BT is not None
    assert_same(rows_of(outputs.logprobs_BT, ROWS), plain)
    assert_same(rows_of(outputs.entropy_BT, ROWS), plain_entropy)
    weights = [torch.linspace(-1, 2, len(row.response_ids)) for row in ROWS]  # a sum with weights: position mix-ups show

    def total(parts: Sequence[Tensor], entropies: Sequence[Tensor]) -> Tensor:
        return sum(
            ((w * p).sum() + 0.3 * (w * e).sum() for w, p, e in zip(weights, parts, entropies, strict=True)), torch.zeros(())
        )

    ours = gradients(model, total(rows_of(outputs.logprobs_BT, ROWS), rows_of(outputs.entropy_BT, ROWS)))
    theirs = gradients(model, total(plain, plain_entropy))
    assert ours.keys() == theirs.keys()
    assert_same([*ours.values()], [theirs[name] for name in ours], tolerance=2e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_temperature_divides_the_logits(temperature: float) -> None:
    model = llama()

    outputs = Policy(model)(batch_of(ROWS), temperature=temperature, entropy=True)

    plain, plain_entropy = naive(model, ROWS, temperature)
    assert outputs.entropy_BT is not None
    assert_same(rows_of(outputs.logprobs_BT, ROWS), plain)
    assert_same(rows_of(outputs.entropy_BT, ROWS), plain_entropy)


def test_only_what_is_asked_for() -> None:
    outputs = Policy(llama())(batch_of(ROWS))
    assert outputs.entropy_BT is None
    assert outputs.collision_BT is None


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_collision_is_that_of_all_probabilities_and_carries_no_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float
) -> None:
    monkeypatch.setattr(_policy, "CHUNK", chunk)
    model = llama()

    outputs = Policy(model)(batch_of(ROWS), temperature=temperature, collision=True)

    plain = [(table.softmax(-1) ** 2).sum(-1).log() for table in (logits_of(model, row) / temperature for row in ROWS)]
    assert outputs.collision_BT is not None
    assert not outputs.collision_BT.requires_grad
    assert_same(rows_of(outputs.collision_BT, ROWS), plain)
    assert outputs.logprobs_BT.requires_grad


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], -1.386294),  # four equal ones: log of 4 / 16
        ([100.0, 0.0, 0.0, 0.0], 0.0),  # a certain one
        ([0.0, 1.098612], -0.470004),  # 1/4 and 3/4: log of 10/16
        ([300.0, 300.0], -0.693147),  # whose exponentials overflow
    ],
)
def test_collision_by_hand(logits: list[float], expected: float) -> None:
    assert _vocabulary.collision(torch.tensor([logits])).item() == pytest.approx(expected, abs=2e-5)


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding() -> None:
    policy = Policy(llama())
    alone = [policy(batch_of([row])).logprobs_BT[0] for row in ROWS]

    together = policy(batch_of(ROWS)).logprobs_BT
    beside_a_long_one = policy(batch_of([*ROWS, *sequences([(20, 30)], seed=9)])).logprobs_BT

    assert_same(rows_of(together, ROWS), alone)
    assert_same(rows_of(beside_a_long_one, ROWS), alone)


def test_positions_outside_the_mask_hold_zeros() -> None:
    batch = batch_of(ROWS)

    outputs = Policy(llama(), critic="shared")(batch, values=True, entropy=True)

    for table in (outputs.logprobs_BT, outputs.values_BT, outputs.entropy_BT):
        assert table is not None
        assert table.shape == batch.mask_BT.shape
        assert table.dtype == torch.float32
        assert (table[~batch.mask_BT] == 0).all()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_value_is_that_of_the_state_before_the_token(critic: Any) -> None:
    policy = Policy(llama(), critic)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)
    backbone = policy.model.base_model if policy.critic is None else policy.critic

    outputs = policy(batch_of(ROWS), values=True)

    assert outputs.values_BT is not None
    for values, row in zip(rows_of(outputs.values_BT, ROWS), ROWS, strict=True):
        for t in range(len(row.response_ids)):  # nothing from token t on may be known
            state = torch.tensor([[*row.prompt_ids, *row.response_ids[:t]]])
            expected = policy.value_head(backbone(input_ids=state).last_hidden_state[0, -1])
            torch.testing.assert_close(values[t : t + 1], expected, atol=1e-5, rtol=1e-5)


def test_a_new_critic_says_zero_and_starts_from_the_policy() -> None:
    policy = Policy(llama(), "separate")

    outputs = policy(batch_of(ROWS), values=True)

    assert outputs.values_BT is not None
    assert (outputs.values_BT == 0).all()
    assert policy.critic is not None
    theirs = dict(policy.critic.named_parameters())
    for name, parameter in policy.model.base_model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert parameter is not theirs[name]


def test_the_separate_critic_gets_no_gradient_from_log_probs_nor_the_policy_from_values() -> None:
    policy = Policy(llama(), "separate")
    assert policy.critic is not None
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)

    outputs = policy(batch_of(ROWS), values=True)
    assert outputs.values_BT is not None
    outputs.values_BT.sum().backward()

    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in policy.critic.parameters())


@pytest.mark.parametrize("critic", [None, "shared", "separate"])
def test_an_empty_micro_batch_reaches_every_parameter_with_a_zero_gradient(critic: Any) -> None:
    policy = Policy(llama(), critic)

    outputs: Outputs = policy(collate([]), values=critic is not None)
    assert outputs.logprobs_BT.isfinite().all()
    (outputs.logprobs_BT.sum() * 0 + (0 if outputs.values_BT is None else outputs.values_BT.sum() * 0)).backward()

    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name  # a collective waits for every one of them
        assert not parameter.grad.any(), name


def test_a_row_without_a_response_counts_nothing() -> None:
    rows = [*ROWS, *sequences([(4, 0)], seed=5)]
    policy = Policy(llama())

    table = policy(batch_of(rows)).logprobs_BT

    assert (table[-1] == 0).all()
    assert_same(rows_of(table, ROWS), rows_of(policy(batch_of(ROWS)).logprobs_BT, ROWS))


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sequences([(4, 60)] * 8)
    # The gradient of the output matrix is [vocabulary, hidden]: no logits, and told apart by its last axis.
    policy = Policy(llama())
    monkeypatch.setattr(_policy, "CHUNK", 16)

    with LargestTensor() as largest:
        outputs = policy(batch_of(rows), entropy=True)
        assert outputs.entropy_BT is not None
        (outputs.logprobs_BT.sum() + outputs.entropy_BT.sum()).backward()

    assert 0 < largest.rows <= 16


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sequences([(4, 60)] * 8)
    policy = Policy(llama())
    monkeypatch.setattr(_policy, "CHUNK", 16)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and tensor.shape[-1] == VOCABULARY:
            saved.append(tensor.numel() // VOCABULARY)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch_of(rows)).logprobs_BT.sum()

    assert sum(saved) == 0  # 480 rows without recomputing


def test_scoring_without_gradients_is_chunked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(llama())
    monkeypatch.setattr(_policy, "CHUNK", 16)

    with torch.no_grad(), LargestTensor() as largest:
        policy(batch_of(sequences([(4, 60)] * 8)))

    assert 0 < largest.rows <= 16


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_of_a_bfloat16_model_are_not_rounded_to_its_dtype(tied: bool) -> None:
    """bfloat16 logits would cost some 0.005 nats a token here: half of the last of 8 bits of logits around 3.

    The bound leaves what sums in another order give, and is a thousandth of that.
    """
    model = llama(tied).bfloat16()
    seen: list[Tensor] = []
    model.base_model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
    batch = batch_of(ROWS)

    ours = torch.cat(rows_of(Policy(model)(batch).logprobs_BT, ROWS))

    def at(linear: Any) -> Tensor:
        hidden = torch.cat([seen[0][b, len(s.prompt_ids) - 1 :][: len(s.response_ids)] for b, s in enumerate(ROWS)])
        targets = torch.tensor([token for row in ROWS for token in row.response_ids])
        return torch.log_softmax(linear(hidden), dim=-1).gather(1, targets[:, None])[:, 0]

    weight = model.get_output_embeddings().weight
    exact = at(lambda hidden: hidden.double() @ weight.double().t())
    rounded = at(lambda hidden: (hidden @ weight.t()).float())
    assert (ours - exact).abs().max() < 5e-6
    assert (rounded - exact).abs().mean() > 1e-3


@pytest.mark.parametrize("critic", [None, "separate"])
def test_recomputation_happens_and_changes_nothing(critic):
    """Activations of a layer are computed again in the backward pass, although the policy stays in evaluation mode."""
    batch = batch_of(ROWS)

    def run(recompute: bool) -> tuple[int, dict[str, Tensor]]:
        policy = Policy(llama(attention_dropout=0.5), critic).eval()
        if recompute:
            policy.recompute_activations()
            policy.eval()  # as loading a checkpoint does
        calls = []
        backbones = [policy.model.base_model, *([policy.critic] if policy.critic is not None else [])]
        for backbone in backbones:
            backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        outputs = policy(batch, values=critic is not None)
        total = outputs.logprobs_BT.sum() + (0 if outputs.values_BT is None else outputs.values_BT.sum())
        total.backward()
        assert not policy.training
        return len(calls) // len(backbones), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    plain_calls, plain = run(recompute=False)
    calls, grads = run(recompute=True)
    assert (plain_calls, calls) == (1, 2)
    assert plain.keys() == grads.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad)


def test_hidden_states_are_summed_from_the_last_prompt_token_to_the_last_but_one_of_the_response() -> None:
    """Row by row and unpadded: the state of the last token, which ends a response, is not in the sum."""
    model = llama(True)
    outputs = Policy(model)(batch_of(ROWS), hidden=True)
    assert outputs.hidden_BH is not None
    for row, found in zip(ROWS, outputs.hidden_BH, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        states = model.base_model(input_ids=ids).last_hidden_state[0]
        expected = states[len(row.prompt_ids) - 1 : len(row.prompt_ids) + len(row.response_ids) - 1].sum(dim=0)
        assert torch.allclose(found, expected, atol=1e-4)
    assert Policy(model)(batch_of(ROWS)).hidden_BH is None
