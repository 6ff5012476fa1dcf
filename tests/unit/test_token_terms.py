"""Log-probs and sums over the vocabulary in pieces: the same numbers and gradients as from all logits at once, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from memory import peak_bytes
from torch import Tensor, nn

from onlinerl.families import LogitRule
from onlinerl.learners import _logits, _policy
from onlinerl.learners._policy import LogProbHead
from onlinerl.learners._token_terms import TABLES
from onlinerl.learners._vocabulary import FrozenStates, TokenTerms

RULES = {
    "plain": LogitRule(),
    "scaled, as of Granite and Cohere": LogitRule(scale=0.25),
    "capped, as of Gemma 2": LogitRule(cap=2.0),
}


class Case(NamedTuple):
    """States, targets, output matrices of a policy and of a frozen reference."""

    hidden_NH: Tensor
    targets_N: Tensor
    output: nn.Linear
    rule: LogitRule
    temperature: float
    frozen: FrozenStates | None = None


def case(
    tokens: int = 70,
    width: int = 16,
    vocabulary: int = 300,
    rule: LogitRule = RULES["plain"],
    temperature: float = 1.0,
    *,
    bias: bool = False,
    beside: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    torch.manual_seed(0)
    output, other = (nn.Linear(width, vocabulary, bias=bias).to(dtype) for _ in range(2))
    hidden, theirs = (torch.randn(tokens, width).to(dtype) * 3 for _ in range(2))
    other_bias = other.bias.detach() if bias else None
    frozen = FrozenStates(theirs, other.weight.detach(), other_bias, rule) if beside else None
    return Case(hidden.requires_grad_(), torch.randint(0, vocabulary, (tokens,)), output, rule, temperature, frozen)


def in_pieces(it: Case, **asked: Any) -> TokenTerms:
    return LogProbHead(it.output, it.rule)(it.hidden_NH, it.targets_N, it.temperature, reference=it.frozen, **asked)


def at_once(it: Case) -> TokenTerms:
    """The definitions, from all logits of both models, kept by autograd."""

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias) * it.rule.scale
        if it.rule.cap is not None:
            logits = it.rule.cap * torch.tanh(logits / it.rule.cap)
        return torch.log_softmax(logits / it.temperature, dim=-1)

    ours = logprobs(it.hidden_NH, it.output.weight, it.output.bias)
    kl = None
    if it.frozen is not None:
        theirs = logprobs(it.frozen.hidden_NH, it.frozen.weight_VH, it.frozen.bias_V)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return TokenTerms(
        logprobs=ours.gather(1, it.targets_N[:, None])[:, 0],
        entropy=-(ours.exp() * ours).sum(-1),
        collision=(ours.detach().exp() ** 2).sum(-1).log(),
        reference_kl=kl,
    )


def gradients(it: Case, terms: TokenTerms, names: tuple[str, ...]) -> list[Tensor]:
    """Of a weighted sum of these terms, each with weights of its own: a mix-up of tokens or terms shows."""
    tokens = len(it.targets_N)
    total = torch.zeros((), dtype=it.hidden_NH.dtype)
    for number, name in enumerate(names):
        total = total + (torch.linspace(-1, 2 + number, tokens, dtype=total.dtype) * getattr(terms, name)).sum()
    return list(torch.autograd.grad(total, [it.hidden_NH, *it.output.parameters()]))


@pytest.mark.parametrize("chunk", [1, 16, 1024])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beside", [False, True])
def test_values_and_gradients_equal_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, rule: str, beside: bool
) -> None:
    monkeypatch.setattr(_policy, "CHUNK", chunk)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        it = case(rule=RULES[rule], temperature=0.7, bias=beside, beside=beside, dtype=dtype)

        ours, theirs = in_pieces(it, entropy=True, collision=True), at_once(it)

        for name in ("logprobs", "entropy", "collision", *(["reference_kl"] if beside else [])):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=tolerance)
        for names in (("logprobs",), ("entropy",), ("logprobs", "entropy"), *uses(beside)):
            pairs = zip(gradients(it, in_pieces(it, entropy=True), names), gradients(it, at_once(it), names), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=tolerance)


def uses(beside: bool) -> Iterator[tuple[str, ...]]:
    if beside:
        yield from (("reference_kl",), ("logprobs", "reference_kl"), ("logprobs", "entropy", "reference_kl"))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_bfloat16_model_are_those_of_exact_numbers_up_to_its_rounding(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way tokens and output matrix were cut up."""
    monkeypatch.setattr(_logits, "ROWS", 40)
    monkeypatch.setattr(_policy, "CHUNK", 32)
    low = case(bias=bias, dtype=torch.bfloat16)
    exact = low._replace(
        hidden_NH=low.hidden_NH.detach().double().requires_grad_(), output=nn.Linear(16, 300, bias=bias).double()
    )
    exact.output.load_state_dict({name: value.double() for name, value in low.output.state_dict().items()})

    ours, theirs = in_pieces(low, entropy=True), at_once(exact)

    assert ours.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.logprobs.double(), theirs.logprobs, atol=1e-5, rtol=1e-5)
    total = (torch.linspace(-1, 2, 70) * (ours.logprobs + ours.entropy)).sum()
    found = torch.autograd.grad(total, [low.hidden_NH, *low.output.parameters()])
    exactly = (torch.linspace(-1, 2, 70) * (theirs.logprobs + theirs.entropy)).sum()
    for a, b in zip(found, torch.autograd.grad(exactly, [exact.hidden_NH, *exact.output.parameters()]), strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-2


def test_a_matrix_that_is_not_trained_gets_no_gradient() -> None:
    it = case()
    it.output.requires_grad_(False)
    in_pieces(it).logprobs.sum().backward()
    assert it.output.weight.grad is None
    assert it.hidden_NH.grad is not None
    assert it.hidden_NH.grad.any()


LARGE: dict[str, Any] = {"tokens": 1000, "vocabulary": 20_000, "width": 8}
PIECE = 64


@pytest.mark.parametrize(
    ("rule", "asked", "beside", "tables"),
    [
        ("plain", {}, False, TABLES),
        ("plain", {"entropy": True, "collision": True}, False, TABLES),
        ("capped, as of Gemma 2", {"entropy": True}, False, TABLES + 1),
        ("plain", {"entropy": True, "collision": True}, True, (TABLES + 1) / 2),  # a piece has half as many tokens then
        ("capped, as of Gemma 2", {}, True, (TABLES + 2) / 2),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("pieces", ["many", "one"])
def test_no_more_memory_than_a_piece_takes(
    monkeypatch: pytest.MonkeyPatch, rule: str, asked: dict[str, bool], beside: bool, tables: float, trained: bool, pieces: str
) -> None:
    """1,000 tokens of a vocabulary of 20,000, in pieces of 64, and as many as make one piece, whose log-probs are kept for the backward
    pass: all that the allocator has handed out at a time, forward and backward."""
    monkeypatch.setattr(_policy, "CHUNK", PIECE)
    tokens = LARGE["tokens"] if pieces == "many" else PIECE // (2 if beside else 1)
    it = case(rule=RULES[rule], beside=beside, **LARGE | {"tokens": tokens})

    def work() -> None:
        with torch.set_grad_enabled(trained):
            terms = in_pieces(it, **asked)
            if trained:
                sum((t.sum() for t in terms if t is not None and t.requires_grad), torch.zeros(())).backward()

    one = 4 * PIECE * LARGE["vocabulary"]
    matrix = 4 * LARGE["width"] * LARGE["vocabulary"]  # its gradient
    found = (peak_bytes(work) - trained * matrix) / one
    assert 1 < found < tables + 0.05
    assert not trained or found > tables - 0.6  # the bound is no larger than it needs to be


def test_the_plain_computation_takes_more() -> None:
    """What the test above would find if logits of all tokens existed: 15.6 pieces, three times."""
    it = case(**LARGE)
    peak = peak_bytes(lambda: at_once(it).logprobs.sum().backward())
    assert peak > 10 * TABLES * 4 * PIECE * LARGE["vocabulary"]


def test_the_benchmark_fails_beyond_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a piece, or of what single precision rounds; a gap that is no number is one, too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import vocabulary_memory as benchmark

    job = {"tokens": 40, "vocabulary": 300, "width": 8, "name": "log-probs, entropy"}
    measured = {**job, "pieces_bytes": int(2.3 * 1024 * 300 * 4), **benchmark.compare(job)}
    assert benchmark.beyond(measured) == []
    assert benchmark.beyond(measured | {"pieces_bytes": 4 * 1024 * 300 * 4}) == ["4.0 tables of a piece, more than 3"]
    for gap in (2e-5, float("nan")):
        (said,) = benchmark.beyond(measured | {"gradient_gap": gap})
        assert said.startswith("gradients differ by")
    plain = _policy.LogProbHead.forward
    monkeypatch.setattr(_policy.LogProbHead, "forward", lambda self, hidden, *a, **k: plain(self, hidden * 1.001, *a, **k))
    assert len(benchmark.beyond(measured | benchmark.compare(job))) == 2
