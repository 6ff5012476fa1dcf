"""Where the loss of every algorithm on pairs is smallest, if one answer beats the other with a known probability.

Two answers a and b, of 2 and 3 tokens, and P(a beats b) = p: pairs of both labels are weighted by p and 1 - p, and say the probability
to those that read it. D is the log-ratio to the reference, S the log-prob, f(z) = -log sigmoid(z).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from algorithm_cases import build
from enumerated import Loss, Response, Weighted, items_of, judged, prepared
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl import registry
from onlinerl.algorithms._margin import Margin
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.exo_pair import ExoPair
from onlinerl.algorithms.ipo import Ipo
from onlinerl.algorithms.nbpo import Nbpo
from onlinerl.algorithms.nca_pair import NcaPair
from onlinerl.algorithms.slic import Slic
from onlinerl.algorithms.spin import Spin
from onlinerl.algorithms.sppo_hard import SppoHard
from onlinerl.algorithms.tdpo1 import Tdpo1
from onlinerl.types import Judged, TrainItem, TrainSequence

A, B = (1, 9), (2, 8, 9)
LENGTHS = np.array([2.0, 3.0])
SCORES = (1.3, 0.2)
DOUBT = ((0.0, math.log(2) / 4), (math.log(2) / 4, 0.0))
SPIN_ITEMS = Spin.items
ANCHORED = "anchor_logprobs" in {field.name for field in dataclasses.fields(TrainSequence)}
NAMES = [name for name in registry.names("algorithms") if build(name, {}).unit == "pair" or build(name, {}).needs.pairs]


@dataclasses.dataclass(frozen=True)
class Best:
    """The policy that the loss is smallest for; everything of (a, b)."""

    S: np.ndarray
    D: np.ndarray
    """Log-ratios to the reference."""
    anchored: np.ndarray
    """Log-ratios to the anchor."""

    @property
    def margin(self) -> float:
        """h = D_a - D_b."""
        return float(self.D[0] - self.D[1])


class Optimum(NamedTuple):
    """What is known of the policy that the loss is smallest for."""

    expected: Callable[[float], float | list[float]]
    """By p."""
    knobs: dict = {}  # noqa: RUF012
    of: Callable[[Best], float | list[float]] = lambda best: best.margin
    """What of the policy that is."""
    free: bool = False
    """Whether there is a third answer, so that a and b may both gain or both lose."""
    uniform: bool = False
    """Whether the reference is."""
    once: bool = False
    """Whether there is one pair, a and b with the probability, instead of both labels."""


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def of_simpo(p: float) -> float:
    """beta (S_a / 2 - S_b / 3) = log u where p / (u + G) = (1 - p) u / (1 + G u), G = exp(beta gamma): the two labels pull equally."""
    odds = (2 * p - 1) * math.exp(2.0 * 0.5)
    return math.log((odds + math.sqrt(odds**2 + 4 * p * (1 - p))) / (2 * (1 - p)))


LOGIT = Optimum(lambda p: logit(p) / 0.5, {"beta": 0.5})
"""Bradley-Terry: beta h is the log-odds of the labels."""
LIKELY = Optimum(logit, {"beta": 1.0, "nll_norm": "sum"}, of=lambda best: float(best.S[0] - best.S[1]), uniform=True)
"""Both terms are proper scoring rules of the policy itself where the reference is none or uniform: pi(a) = p."""
OPTIMA: dict[str, list[Optimum]] = {
    "dpo": [LOGIT, Optimum(lambda p: logit(p) / 0.5, {"beta": 0.5, "soft_labels": True}, once=True)],
    "osp": [LOGIT._replace(once=True)],
    "dno_prct": [LOGIT],
    "curry_dpo": [LOGIT],
    # a has a token less than b: z = 0.5 h - 0.2, whichever of the two is chosen.
    "length_dpo": [Optimum(lambda p: (logit(p) + 0.2) / 0.5, {"beta": 0.5, "length_penalty": 0.2})],
    "rso": [LOGIT],
    # Pairs of other responses, and terms that are switched off here.
    "ipo_md": [Optimum(lambda p: (2 * p - 1) / (2 * 0.4), {"tau": 0.4})],
    "xpo": [LOGIT._replace(knobs={"beta": 0.5, "optimism": 0.0})],
    "selm": [LOGIT._replace(knobs={"beta": 0.5, "optimism": 0.0})],
    # The KL of the next token after the prompt is the same for both, and they have no other.
    "tdpo1": [LOGIT],
    "tdpo2": [LOGIT._replace(knobs={"beta": 0.5, "alpha": 0.0})],
    # Every label is right.
    "re_po": [LOGIT._replace(knobs={"beta": 0.5, "eta0": 1.0})],
    # Where the stored answer is a with probability p, and both are sampled equally often.
    "spin": [LOGIT],
    # Of one pair there is nothing to sort.
    "aot": [Optimum(lambda p: logit(0.9) / 0.5, {"beta": 0.5, "label_smoothing": 0.1}, once=True)],
    "aot_unpaired": [Optimum(lambda p: logit(0.9) / 0.5, {"beta": 0.5, "label_smoothing": 0.1}, once=True)],
    # Labels of uncertainty B are turned round with probability B / (2 log 2): here an eighth of them.
    "upo": [Optimum(lambda p: logit(0.875 * p + 0.125 * (1 - p)) / 0.5, {"beta": 0.5, "nll_coef": 0.0, "mu": 0.0})],
    "cdpo": [Optimum(lambda p: logit(0.9 * p + 0.1 * (1 - p)) / 0.5, {"beta": 0.5, "label_smoothing": 0.1})],
    # Labels of which a share e was flipped come up with (1 - e) q + e (1 - q), where q is the truth.
    "robust_dpo": [Optimum(lambda p: logit((p - 0.1) / 0.8) / 0.5, {"beta": 0.5, "flip_rate": 0.1})],
    "nbpo": [Optimum(lambda p: logit((p - 0.1) / 0.8) / 0.5, {"beta": 0.5, "eps": 0.1})],
    "ln_dpo": [Optimum(logit, {"beta": 5.0}, of=lambda best: 5.0 * float(best.D @ [1 / 2, -1 / 3]))],
    # Where both answers may gain, hard labels push both up; soft ones of both orders ask for z = +- logit(p).
    "flex_dpo": [
        Optimum(
            lambda p: [logit(p) / 3.0, -logit(p) / 3.0],
            {"beta": 2.0, "beta_rejected": 1.0, "soft_labels": True},
            of=lambda best: best.D.tolist(),
            free=True,
        )
    ],
    "dpo_nll": [LIKELY, Optimum(lambda p: logit(p) / 0.5, {"beta": 0.5, "nll_coef": 0.0})],
    "cpo": [LIKELY, Optimum(logit, {"beta": 0.5, "nll_coef": 0.0}, of=lambda best: 0.5 * float(best.S[0] - best.S[1]))],
    "simpo": [Optimum(of_simpo, {}, of=lambda best: 2.0 * float(best.S @ [1 / 2, -1 / 3]))],
    "ipo": [Optimum(lambda p: (2 * p - 1) / (2 * 0.4), {"tau": 0.4})],
    "slic": [Optimum(lambda p: math.copysign(1.0, p - 0.5) / 0.5, {"beta": 0.5})],
    # Of both labels, KL(q || label) is p and 1 - p of it: q is their geometric mean.
    "exo_pair": [Optimum(lambda p: (2 * p - 1) * logit(0.99) / 0.5, {"beta": 0.5, "eps": 0.01})],
    "irepo": [LOGIT._replace(once=True)],
    "rebel": [Optimum(lambda p: 0.7 * (SCORES[0] - SCORES[1]), {"eta": 0.7})],
    # The win rates of a group of two, itself included, are (1/2 + p) / 2 and (1/2 + 1 - p) / 2.
    "dno": [Optimum(lambda p: 3.0 * (p - 0.5) / 0.5, {"eta": 0.5, "reward_scale": 3.0})],
    "sppo_single": [
        Optimum(lambda p: [2.0 * (p - 0.5), -2.0 * (p - 0.5)], {"eta": 2.0}, of=lambda best: best.D.tolist(), free=True)
    ],
    # The labels are +- 1/2: on average p - 1/2.
    "sppo_hard": [
        Optimum(lambda p: [2.0 * (p - 0.5), -2.0 * (p - 0.5)], {"beta": 0.5}, of=lambda best: best.D.tolist(), free=True)
    ],
    # p f(r) + f(-r) / 2 for a: e^r = 2 p.
    "nca_pair": [
        Optimum(lambda p: [math.log(2 * p), math.log(2 - 2 * p)], {"beta": 1.0}, of=lambda best: best.D.tolist(), free=True)
    ],
    # Each of its two terms by itself.
    "orpo": [
        Optimum(logit, {"nll_coef": 0.0, "lam": 1.0}, of=lambda best: odds(best.S[0] / 2) - odds(best.S[1] / 3)),
        Optimum(logit, {"nll_norm": "sum", "lam": 0.0}, of=lambda best: float(best.S[0] - best.S[1])),
    ],
    # Of one pass: labels of +- eta / 2, whose mean is eta (p - 1/2), or that itself.
    "onpo": [
        Optimum(lambda p: 2.0 * (p - 0.5), {"eta": 2.0}),
        Optimum(lambda p: 2.0 * (p - 0.5), {"eta": 2.0, "soft_labels": True}, once=True),
    ],
    # The margin against the initial policy (anchor_weight, tau / eta, of it) and the previous one is the mean of +- 1 / (2 eta).
    "inpo": [
        Optimum(
            lambda p: (2 * p - 1) / (2 * 0.8),
            {"eta": 0.8, "anchor_weight": 0.25},
            of=lambda best: 0.25 * float(best.anchored[0] - best.anchored[1]) + 0.75 * best.margin,
        )
    ],
}
WITHOUT = {
    "apo_zero": "it falls without end in r_a - r_b while a is likelier to win; see the test of its slope",
    "apo_down": "it falls without end in both rewards; see the test of its slope",
    "p3o": "a policy gradient: of its loss only the slope at the policy that sampled says anything",
    "reward_augmented": "it trains both labels of a pair, each where the prompt asks for it; of each prompt by itself it is its base",
    "optune": "it weighs the two labels by gaps of scores, which a share of labels does not fix; of equal gaps it is dpo",
}
"""Why there is no closed form."""


def odds(mean: float) -> float:
    """log p / (1 - p) of a log-prob per token."""
    return mean - math.log(-math.expm1(mean))


def losses(name: str, optimum: Optimum, p: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Best], int]:
    """The loss per pair, the policy itself, and the number of their parameters."""
    algorithm = build(name, optimum.knobs)
    shares = [0.3, 0.25] if optimum.free else [0.5, 0.5] if optimum.uniform else [0.35, 0.65]
    reference, anchor = torch.tensor(shares, dtype=torch.float64).log(), torch.tensor([0.2, 0.3], dtype=torch.float64).log()
    if not optimum.free:
        anchor = anchor - anchor.logsumexp(0)

    def rows(S: Tensor) -> dict[Response, Tensor]:
        """The first token of an answer is what was decided, the others follow from it."""
        return {r: torch.cat([S[n : n + 1], torch.zeros(len(r) - 1, dtype=S.dtype)]) for n, r in enumerate((A, B))}

    verdict = judged([A, B], scores=SCORES, preferences=((math.nan, p), (1 - p, math.nan)), uncertainty=DOUBT)
    group = from_sources(verdict, algorithm.needs.beside_samples)
    answered = algorithm.needs.answers
    made = items_of(algorithm, [(answering(group, A), p), (answering(group, B), 1 - p)] if answered else [(group, 1.0)])
    if optimum.once:
        made = Weighted(made.items[:1], [1.0])
    tables = {"reference_logprobs": rows(reference)} | ({"anchor_logprobs": rows(anchor)} if ANCHORED else {})
    loss = Loss(algorithm, prepared(algorithm, made, **tables))

    def policy(x: Tensor) -> Tensor:
        if optimum.free:
            return reference + x
        return torch.log_softmax(torch.stack([x[0], torch.zeros((), dtype=x.dtype)]), dim=0)

    def best(x: Tensor) -> Best:
        S = policy(x).detach()
        assert S.exp().sum() < 1 + 1e-9, "no policy gives both answers so often"
        return Best(S.numpy(), (S - reference).numpy(), (S - anchor).numpy())

    def columns(S: Tensor) -> dict[str, dict[Response, Tensor]]:
        """The KL of the first token of both answers; what comes after is certain."""
        if not algorithm.needs.reference_kl:
            return {}
        kl = (reference.exp() * (reference - S)).sum()
        return {"reference_kl_BT": {r: torch.stack([kl, *[torch.zeros_like(kl)] * (len(r) - 1)]) for r in (A, B)}}

    return lambda x: loss(rows(policy(x)), **columns(policy(x))), best, 1 + optimum.free


def from_sources(group: Judged, sources: Sequence[str]) -> Judged:
    """The group with its last responses from those."""
    own = ["policy", "policy", *sources][-2:]
    rollouts = tuple(dataclasses.replace(r, source=s) for r, s in zip(group.group.rollouts, own, strict=True))
    return dataclasses.replace(group, group=dataclasses.replace(group.group, rollouts=rollouts))


def answering(group: Judged, answer: Response) -> Judged:
    """The group with a stored answer to its prompt."""
    prompt = dataclasses.replace(group.group.prompt, answer_ids=answer)
    return dataclasses.replace(group, group=dataclasses.replace(group.group, prompt=prompt))


def slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def root(rises: Callable[[float], float], below: float, above: float) -> float:
    """Where a function that rises from `below` to `above` is 0: by straight lines, and by halves where it jumps."""
    low, high = rises(below), rises(above)
    for step in range(60):
        if above - below < 1e-8:
            break
        x = (below + above) / 2 if step % 3 == 2 else below - low * (above - below) / (high - low)
        value = rises(x)
        if abs(value) < 1e-10:
            return x
        if value < 0:
            below, low = x, value
        else:
            above, high = x, value
    return (below + above) / 2


def smallest(loss: Callable[[Tensor], Tensor], parameters: int) -> Tensor:
    """Where the loss is smallest. Of one parameter: the one place where it stops to fall and begins to rise. Of two: by Newton's
    steps, from the reference."""
    if parameters == 1:
        grid = torch.linspace(-12.0, 12.0, 13, dtype=torch.float64)
        slopes = [float(slope(loss, x[None])) for x in grid]
        rising = [s > 0 for s in slopes]
        assert rising == sorted(rising), "more than one minimum"
        assert (rising[0], rising[-1]) == (False, True), "no minimum"
        first = rising.index(True)
        place = root(lambda x: float(slope(loss, grid.new_tensor([x]))), *grid[first - 1 : first + 1].tolist())
        return grid.new_tensor([place])
    x = torch.zeros(parameters, dtype=torch.float64)
    for _ in range(12):
        curvature = torch.autograd.functional.hessian(loss, x)
        assert torch.linalg.eigvalsh(curvature).min() > 0, "no minimum here"
        x = x - torch.linalg.solve(curvature, slope(loss, x))
    return x


def check(name: str, optimum: Optimum, p: float) -> None:
    loss, best, parameters = losses(name, optimum, p)
    assert optimum.of(best(smallest(loss, parameters))) == pytest.approx(optimum.expected(p), abs=2e-6)


CASES = [pytest.param(name, optimum, id=f"{name}-{n}") for name in NAMES for n, optimum in enumerate(OPTIMA.get(name, []))]


def test_losses_on_pairs_that_choose_their_own_pairs_are_among_them():
    """They ask for no pair builder."""
    assert {"spin", "p3o"} <= set(NAMES)


def test_every_loss_on_pairs_has_a_known_optimum_or_a_reason_why_not():
    assert set(OPTIMA).isdisjoint(WITHOUT)
    assert set(NAMES) <= {*OPTIMA, *WITHOUT}, "say in OPTIMA where the loss is smallest, or in WITHOUT why nobody knows"


@pytest.mark.parametrize("p", [0.3, 0.8])
@pytest.mark.parametrize(("name", "optimum"), CASES)
def test_the_loss_is_smallest_where_its_paper_says(name, optimum, p):
    check(name, optimum, p)


@pytest.mark.parametrize("name", ["apo_zero", "apo_down"])
def test_where_nothing_holds_a_reward_back_there_is_no_optimum(name):
    """With p = 1 the worse answer shall always lose more. The better one, once it is ahead, shall gain (`apo_zero`) or lose too."""
    loss, _, _ = losses(name, Optimum(logit, {"beta": 1.0}, free=True), 1.0)
    for won, lost in ((0.5, -1.0), (-1.0, -5.0), (-3.0, -9.0)):
        of_won, of_lost = slope(loss, torch.tensor([won, lost], dtype=torch.float64)).tolist()
        assert of_lost > 0
        assert (of_won < 0) == (name == "apo_zero")


def swapped(made: tuple[list[TrainItem], object]) -> tuple[list[TrainItem], object]:
    """The answer as the worse one."""
    return [dataclasses.replace(item, sequences=item.sequences[::-1]) for item in made[0]], made[1]


@pytest.mark.parametrize(
    ("name", "algorithm", "method", "faulty"),
    [
        ("dpo", Dpo, "phi", lambda self, z: -logsigmoid(-z)),  # the sign
        ("osp", Margin, "labelled_loss", lambda self, z, p: self.phi(z)),  # labels not read
        ("ipo", Ipo, "phi", lambda self, z: (z - 1.0 / self.tau).square()),  # a factor
        ("slic", Slic, "phi", lambda self, z: torch.relu(2.0 - z)),
        ("nbpo", Nbpo, "phi", lambda self, z: -logsigmoid(z)),  # labels taken for the truth
        ("exo_pair", ExoPair, "phi", lambda self, z: -0.99 * logsigmoid(z) - 0.01 * logsigmoid(-z)),  # the other KL
        ("nca_pair", NcaPair, "of_rewards", lambda self, won, lost: -logsigmoid(won) - 0.5 * logsigmoid(-lost)),  # a term less
        ("sppo_hard", SppoHard, "of_rewards", lambda self, won, lost: (won - 1).square() + (lost + 1).square()),
        ("tdpo1", Tdpo1, "correction", lambda self, preferred, other: preferred + other),  # which do not cancel
        ("spin", Spin, "items", lambda self, judged, pairs: swapped(SPIN_ITEMS(self, judged, pairs))),
    ],
)
def test_a_fault_in_the_loss_would_be_noticed(monkeypatch, name, algorithm, method, faulty):
    monkeypatch.setattr(algorithm, method, faulty)
    with pytest.raises(AssertionError):
        check(name, OPTIMA[name][0], 0.8)


def test_a_new_loss_on_pairs_would_be_noticed(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "NAMES", [*NAMES, "newcomer"])
    with pytest.raises(AssertionError, match="say in OPTIMA"):
        test_every_loss_on_pairs_has_a_known_optimum_or_a_reason_why_not()
