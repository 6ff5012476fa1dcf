"""The KL of a frozen reference to the policy at each response token, piece by piece, against a plain computation over all logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_llama import ROWS, VOCABULARY, LargestTensor, assert_same, batch_of, gradients, llama, logits_of, rows_of, sequences
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.tdpo1 import Tdpo1
from onlinerl.algorithms.tdpo2 import Tdpo2
from onlinerl.families import LogitRule
from onlinerl.learners import _policy
from onlinerl.learners._loading import ModelReader
from onlinerl.learners._policy import LogProbHead, Policy
from onlinerl.learners._vocabulary import FrozenStates, kl_from
from onlinerl.ops.batching import collate
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import TrainItem, TrainSequence

Reader = Callable[[nn.Module], ModelReader]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Makes a reader of which `states(str(tmp_path), batch)` are those of a model, which is saved there."""

    def make(model: nn.Module) -> ModelReader:
        model.save_pretrained(tmp_path)
        return ModelReader(torch.float32, "sdpa", torch.device("cpu"))

    return make


def other() -> LlamaForCausalLM:
    """A model whose distributions are far from those of `llama()`, with an output matrix of its own."""
    model = llama(tied=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def naive_kl(reference: Tensor, policy: Tensor) -> Tensor:
    """Term by term as the definition has it, in fp64."""
    theirs, ours = reference.double().softmax(-1), policy.double().softmax(-1)
    return (theirs * (theirs.log() - ours.log())).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 15, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_and_gradient_equal_the_plain_computation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: Reader, chunk: int, temperature: float
) -> None:
    monkeypatch.setattr(_policy, "CHUNK", chunk)
    reference, model, batch = other(), llama(), batch_of(ROWS)
    states = reader(reference).states(str(tmp_path), batch)

    outputs = Policy(model)(batch, temperature=temperature, reference=states)

    with torch.no_grad():
        theirs = [logits_of(reference, row) / temperature for row in ROWS]
    plain = [naive_kl(t, logits_of(model, row) / temperature) for t, row in zip(theirs, ROWS, strict=True)]
    assert outputs.reference_kl_BT is not None
    found = rows_of(outputs.reference_kl_BT, ROWS)
    assert_same(found, [p.float() for p in plain])
    assert min(k.detach().min() for k in found) > 0.1
    assert (outputs.reference_kl_BT[~batch.mask_BT] == 0).all()
    weights = [torch.linspace(-1, 2, len(row.response_ids)) for row in ROWS]
    logprobs = rows_of(outputs.logprobs_BT, ROWS)
    tables = [torch.log_softmax(logits_of(model, row) / temperature, dim=-1) for row in ROWS]
    plain_logprobs = [t.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0] for t, row in zip(tables, ROWS, strict=True)]

    def total(logprobs: list[Tensor], kls: list[Tensor]) -> Tensor:
        return sum(
            ((w * p).sum() + (w.flip(0) * k).sum() for w, p, k in zip(weights, logprobs, kls, strict=True)), torch.zeros(())
        )

    ours, expected = gradients(model, total(logprobs, found)), gradients(model, total(plain_logprobs, plain))
    assert ours.keys() == expected.keys()
    assert_same([*ours.values()], [expected[name] for name in ours], tolerance=2e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(cap=2.0), LogitRule(scale=0.5)])
def test_in_double_precision_they_agree_to_1e_8(monkeypatch: pytest.MonkeyPatch, chunk: int, rule: LogitRule) -> None:
    """For a vocabulary and a number of tokens that are both larger than a piece."""
    monkeypatch.setattr(_policy, "CHUNK", chunk)
    torch.manual_seed(0)
    tokens, width, vocabulary = 40, 16, 2000
    matrices = [nn.Linear(width, vocabulary, dtype=torch.float64) for _ in range(2)]
    hidden, frozen = (torch.randn(tokens, width, dtype=torch.float64) * 3 for _ in range(2))
    hidden.requires_grad_()
    weight = torch.randn(tokens, dtype=torch.float64)
    states = FrozenStates(frozen, matrices[1].weight.detach(), matrices[1].bias.detach(), LogitRule(scale=2.0))

    found = LogProbHead(matrices[0], rule)(hidden, torch.zeros(tokens, dtype=torch.int64), 0.8, reference=states).reference_kl
    logits = matrices[0](hidden) * rule.scale
    logits = (logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)) / 0.8
    plain = naive_kl(matrices[1](frozen).detach() * 2.0 / 0.8, logits)

    torch.testing.assert_close(found, plain, atol=1e-8, rtol=1e-8)
    leaves = [hidden, *matrices[0].parameters()]
    ours, expected = (torch.autograd.grad((weight * kl).sum(), leaves, retain_graph=True) for kl in (found, plain))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_by_hand() -> None:
    # (1/4, 3/4) to (1/2, 1/2): 0.25 ln 0.5 + 0.75 ln 1.5 = 0.130812, whose slopes are 1/2 - 1/4 and 1/2 - 3/4; the other way 0.143841
    quarter, even = torch.tensor([[0.0, 1.098612]]), torch.zeros(1, 2).requires_grad_()
    kl = kl_from(quarter, even)
    assert kl.item() == pytest.approx(0.130812, abs=1e-6)
    assert torch.autograd.grad(kl, even)[0].tolist() == [pytest.approx([0.25, -0.25])]
    assert kl_from(even.detach(), quarter).item() == pytest.approx(0.143841, abs=1e-6)


def test_of_a_model_to_itself_it_is_0_with_no_gradient(tmp_path: Path, reader: Reader) -> None:
    model, batch = llama(tied=False), batch_of(ROWS)
    outputs = Policy(model)(batch, reference=reader(model).states(str(tmp_path), batch))
    assert outputs.reference_kl_BT is not None
    assert outputs.reference_kl_BT.abs().max() == 0
    assert max(g.abs().max() for g in gradients(model, outputs.reference_kl_BT.sum()).values()) < 1e-6


def loss_gradients(algorithm: Algorithm, reader: ModelReader, path: Path, model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Of one pair, whose stored reference is the policy's own."""
    rows = ROWS[:2]
    with torch.no_grad():
        own = rows_of(Policy(model)(batch_of(rows)).logprobs_BT, rows)
    sequences = tuple(row.with_(reference_logprobs=r.numpy()) for row, r in zip(rows, own, strict=True))
    batch = collate([TrainItem(prompt_id="p", sequences=sequences)])
    reference = reader.states(str(path), batch) if algorithm.needs.reference_kl else None
    return gradients(model, algorithm.loss(Policy(model)(batch, reference=reference), batch).total)


@pytest.mark.parametrize("algorithm", [Tdpo1(), Tdpo2()])
def test_at_the_reference_the_gradient_is_that_of_dpo_and_elsewhere_it_is_not(
    tmp_path: Path, reader: Reader, algorithm: Algorithm
) -> None:
    model = llama(tied=False)
    at_reference, dpo = (loss_gradients(a, reader(model), tmp_path, model) for a in (algorithm, Dpo()))
    elsewhere = loss_gradients(algorithm, reader(other()), tmp_path, model)
    for name, gradient in dpo.items():
        torch.testing.assert_close(at_reference[name], gradient, atol=1e-7, rtol=1e-5)
    assert (elsewhere["lm_head.weight"] - dpo["lm_head.weight"]).norm() > 0.1 * dpo["lm_head.weight"].norm()


def test_rows_do_not_depend_on_their_neighbours_or_on_padding(tmp_path: Path, reader: Reader) -> None:
    frozen, policy = reader(other()), Policy(llama())

    def kls(rows: list[TrainSequence]) -> Tensor:
        batch = batch_of(rows)
        found = policy(batch, reference=frozen.states(str(tmp_path), batch)).reference_kl_BT
        assert found is not None
        return found

    alone = [kls([row])[0] for row in ROWS]
    assert_same(rows_of(kls([*ROWS, *sequences([(20, 30)], seed=9)]), ROWS), alone)


def test_a_rank_without_data_reaches_every_parameter_with_a_zero_gradient(tmp_path: Path, reader: Reader) -> None:
    policy, batch = Policy(llama(tied=False)), collate([])
    outputs = policy(batch, reference=reader(other()).states(str(tmp_path), batch))
    assert outputs.reference_kl_BT is not None
    (outputs.logprobs_BT.sum() * 0 + outputs.reference_kl_BT.sum() * 0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("trained", [True, False])
def test_logits_of_both_models_together_never_exceed_a_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: Reader, trained: bool
) -> None:
    """Forward and backward; and no logits of either are kept between the two."""
    batch = batch_of(sequences([(4, 60)] * 8))
    policy, frozen = Policy(llama()), reader(other())
    monkeypatch.setattr(_policy, "CHUNK", 64)  # the output matrix has 16 columns
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and tensor.shape[-1] == VOCABULARY:
            saved.append(tensor.numel() // VOCABULARY)
        return tensor

    with LargestTensor() as largest, torch.set_grad_enabled(trained):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = policy(batch, reference=frozen.states(str(tmp_path), batch))
        assert outputs.reference_kl_BT is not None
        if trained:
            (outputs.logprobs_BT.sum() + outputs.reference_kl_BT.sum()).backward()

    assert 16 < largest.rows <= 32
    assert sum(saved) == 0
