"""Self-play on a game of three answers that beat each other in a circle: what approaches its Nash policy, and what does not.

An iteration is exact. The groups of two that the policy may sample are all there, weighted by their probabilities, and the loss is
minimized over all policies, by Newton's steps. Win rates of a group include the response itself, and its partner may be the same
answer: on average the win rate of an answer is 1/4 + (its win rate against the policy) / 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from algorithm_cases import build
from enumerated import Loss, Response, Weighted, groups_of, items_of, prepared
from torch import Tensor

from onlinerl import registry
from onlinerl.algorithms.dno import Dno
from onlinerl.algorithms.sppo import Sppo
from onlinerl.batch import Batch, Outputs
from onlinerl.loss import LossOutput
from onlinerl.ops.margins import logistic, margin
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Verdict

ANSWERS: list[Response] = [(1,), (2,), (3,)]
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
EDGE = CYCLE - 0.5
NASH = np.array([EDGE[1, 2], EDGE[2, 0], EDGE[0, 1]]) / (EDGE[1, 2] + EDGE[2, 0] + EDGE[0, 1])
"""What EDGE, which is odd, takes to 0: (2, 3, 4) / 9."""
LADDER = 1.0 / (1.0 + np.exp(-np.subtract.outer([1.0, 0.0, -0.5], [1.0, 0.0, -0.5])))
"""Bradley-Terry: the first answer beats the others, so it alone is Nash."""
START = np.array([0.8, 0.1, 0.1])
STEP = 0.5
"""What an iteration adds to log-probs per unit of win rate, up to a constant."""
ROUNDS = 200
SPPO_LOSS = Sppo.loss


class Player(NamedTuple):
    """An algorithm that is promised to find the Nash policy."""

    knobs: dict
    """With which an iteration moves by STEP."""
    regularized: float | None = None
    """If the promise is that of the game in which a nat of KL to the initial policy costs this much."""
    optimistic: bool = False
    """Whether the last policy gets there, too."""


PLAYERS = {
    # An iteration asks for eta (win rate - 1/2) in the group, which is half of that against the policy.
    "sppo": Player({"eta": 2 * STEP, "pairs": "all"}),
    # Win rates in a group of two differ by P - 1/2.
    "dno": Player({"eta": 1 / STEP}),
    # Labels of +- 1 / (2 eta): their mean is (P - 1/2) / eta. The price of the KL is anchor_weight * eta, here not below 1 / eta,
    # as the convergence of the last policy asks.
    "inpo": Player({"eta": 1 / STEP, "anchor_weight": 0.25}, regularized=0.25 / STEP),
    # Labels of +- eta / 2: their mean is eta (P - 1/2). Each pass moves by as much.
    "onpo": Player({"eta": STEP}, optimistic=True),
}
PROMISED = ("sppo", "dno", "inpo", "onpo")
"""Algorithms whose papers promise it, by regressions; nash_md, a policy gradient, has a file of its own."""
NAMES = [name for name in PROMISED if name in registry.names("algorithms")]
AVERAGES = [name for name in NAMES if name in PLAYERS and PLAYERS[name].regularized is None]
CIRCLING = [name for name in AVERAGES if not PLAYERS[name].optimistic]
LASTS = [name for name in NAMES if name in PLAYERS and PLAYERS[name].regularized is not None]


def gap(policy: np.ndarray, game: np.ndarray = CYCLE) -> float:
    """The duality gap: what the best answer to a policy wins more than half, on both sides."""
    return 2.0 * float((game @ policy).max()) - 1.0


class Game:
    """Self-play of one algorithm with the oracle `game`, from `start`."""

    def __init__(
        self, algorithm: Algorithm, game: np.ndarray, *, scores: Sequence[float] | None = None, start: np.ndarray = START
    ) -> None:
        def judge(group: Sequence[Response]) -> dict:
            places = [ANSWERS.index(response) for response in group]
            if scores is not None:
                return {"scores": [scores[place] for place in places]}
            return {"preferences": game[np.ix_(places, places)].tolist()}

        self.algorithm, self.log_start = algorithm, torch.tensor(start).log()
        self.auxiliary = self.log_start
        groups = groups_of(dict.fromkeys(ANSWERS, 1.0), 2, judge)
        self.made = [(g, items_of(algorithm, [(g, 1.0)])) for g, _ in groups]

    def step(self, logprobs: Tensor) -> Tensor:
        """The policy after one iteration, as log-probs of the answers."""
        chances = dict(zip(ANSWERS, logprobs.exp().tolist(), strict=True))
        every = Weighted([], [])
        for group, made in self.made:
            often = math.prod(chances[tuple(r.token_ids)] for r in group.group.rollouts)
            every.items.extend(made.items)
            every.weights.extend(weight * often for weight in made.weights)
        if not self.algorithm.needs.auxiliary:
            return self.regression(every, logprobs)
        self.auxiliary = self.regression(every, self.auxiliary)
        return self.regression(every, self.auxiliary)

    def regression(self, every: Weighted, start: Tensor) -> Tensor:
        """The policy that the loss of these items is smallest for, with `start` as the reference."""
        tables = {"reference_logprobs": table(start)}
        if getattr(self.algorithm.needs, "anchor", False):
            tables["anchor_logprobs"] = table(self.log_start)
        loss = Loss(self.algorithm, prepared(self.algorithm, every, **tables))
        return smallest(lambda logits: loss(table(torch.log_softmax(logits, dim=0))), start)

    def play(self, iterations: int) -> np.ndarray:
        """All iterates, [iterations + 1, 3]."""
        iterates, self.auxiliary = [self.log_start], self.log_start
        for _ in range(iterations):
            iterates.append(self.step(iterates[-1]))
        return torch.stack(iterates).exp().numpy()


def table(logprobs: Tensor) -> dict[Response, Tensor]:
    return {answer: logprobs[n : n + 1] for n, answer in enumerate(ANSWERS)}


def smallest(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The log-probs for which the loss is smallest; logits are known up to a constant only."""
    logits = start.clone()
    for _ in range(20):
        x = logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
        if slope.abs().max() < 1e-9:
            break
        curvature = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope])
        logits = logits - torch.linalg.pinv(curvature, hermitian=True, rtol=1e-9) @ slope.detach()
    else:
        raise AssertionError("no minimum")
    return torch.log_softmax(logits, dim=0)


def moved(name: str, knobs: dict) -> np.ndarray:
    """What the first iteration adds to the log-probs, up to a constant."""
    game = Game(build(name, knobs), CYCLE)
    change = (game.step(game.log_start) - game.log_start).numpy()
    return change - change.mean()


def check_step(name: str, knobs: dict, tolerance: float) -> None:
    rates = CYCLE @ START
    assert moved(name, knobs) == pytest.approx(STEP * (rates - rates.mean()), abs=tolerance)


def of_average(iterates: np.ndarray) -> float:
    """The gap of the mean of all policies that were played against."""
    return gap(iterates[:-1].mean(axis=0))


def regularized(game: np.ndarray, price: float) -> np.ndarray:
    """The one policy with pi = START exp(game pi / price) / Z."""
    policy = START
    for _ in range(5000):
        weights = START * np.exp(game @ policy / price)
        policy = 0.95 * policy + 0.05 * weights / weights.sum()
    return policy


@pytest.fixture(scope="module")
def circles() -> dict[str, np.ndarray]:
    """The iterates of everybody whose average is promised to be Nash."""
    return {name: Game(build(name, PLAYERS[name].knobs), CYCLE).play(ROUNDS) for name in AVERAGES}


def test_everybody_whose_paper_promises_it_plays():
    assert set(NAMES) <= set(PLAYERS), "say in PLAYERS how it is played"


def test_the_nash_policies_are():
    assert gap(NASH) == pytest.approx(0.0, abs=1e-12)
    assert gap(np.array([1.0, 0.0, 0.0]), LADDER) == pytest.approx(0.0, abs=1e-12)
    assert gap(START) == pytest.approx(0.44)


@pytest.mark.parametrize(
    ("name", "knobs", "tolerance"),
    [
        # Of a square of the margin it is so exactly; sppo's partition term is fixed, and dno's squares are logistic.
        ("ipo", {"tau": 1 / STEP}, 1e-5),
        ("rebel", {"eta": STEP}, 1e-5),
        ("onpo", {"eta": STEP, "optimistic": False}, 1e-5),
        ("onpo", {"eta": STEP, "optimistic": False, "soft_labels": True}, 1e-5),
        ("sppo", PLAYERS["sppo"].knobs, 1e-3),
        ("dno", PLAYERS["dno"].knobs, 1e-3),
    ],
)
def test_an_iteration_is_multiplicative_weights(name, knobs, tolerance):
    """log pi' = log pi + STEP (win rate against pi) + constant."""
    check_step(name, knobs, tolerance)


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_policy_approaches_nash(circles, name):
    """By multiplicative weights what an answer wins above 1/2, summed over the rounds, is at most [log(1 / pi_0) + sum of log Z] / STEP.
    By Hoeffding's lemma log Z <= (STEP * spread)^2 / 8: no two win rates against a policy differ by more than a column's entries."""
    spread = np.ptp(CYCLE, axis=0).max()
    bound = 2.0 * (math.log(1.0 / START.min()) / (STEP * ROUNDS) + STEP * spread**2 / 8.0)
    assert bound < 0.11  # START has 0.44
    assert of_average(circles[name]) < 0.05 < bound  # 0.046


@pytest.mark.parametrize("name", CIRCLING)
def test_the_last_policy_does_not(circles, name):
    """KL(Nash || pi) grows by log Z in every iteration."""
    nats = [float((NASH * np.log(NASH / policy)).sum()) for policy in circles[name]]
    assert np.diff(nats).min() > -1e-4
    assert nats[-1] > nats[0]
    assert max(map(gap, circles[name][-50:])) > 0.3


def uniform(**knobs: object) -> Game:
    return Game(build("onpo", {"eta": 1.0, **knobs}), CYCLE, start=np.full(3, 1 / 3))


def mirror_descent(rounds: int, *, optimistic: bool, eta: float = 1.0) -> np.ndarray:
    """All iterates of the game from the uniform policy, by log pi' += eta P pi + constant: [rounds + 1, 3]."""
    auxiliary, iterates = np.zeros(3), [np.full(3, 1 / 3)]
    for _ in range(rounds):
        gain = eta * (CYCLE @ iterates[-1])
        auxiliary = auxiliary + gain
        weights = np.exp(auxiliary + gain if optimistic else auxiliary)
        iterates.append(weights / weights.sum())
    return np.array(iterates)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("optimistic", [False, True])
def test_each_pass_is_an_exact_step_of_mirror_descent(optimistic, soft):
    """With two, the second one goes from where the first has got to, by what the policy that sampled has won."""
    played = uniform(optimistic=optimistic, soft_labels=soft).play(12)
    assert played == pytest.approx(mirror_descent(12, optimistic=optimistic), abs=1e-5)


def test_a_second_pass_from_the_policy_would_be_noticed(monkeypatch):
    """The fault of a wrong anchor in the second pass."""
    regression = Game.regression

    def wrong(self, every, start):
        self.calls = getattr(self, "calls", 0) + 1
        return regression(self, every, start if self.calls % 2 else self.log_start)

    monkeypatch.setattr(Game, "regression", wrong)
    with pytest.raises(AssertionError):
        test_each_pass_is_an_exact_step_of_mirror_descent(optimistic=True, soft=False)


def test_by_two_passes_the_last_policy_is_nash_and_by_one_it_circles():
    """After 1,000 rounds with eta 1: duality gaps of .0005 (average) and below 1e-6 (last), against .010 and .60."""
    two, one = (mirror_descent(1000, optimistic=optimistic) for optimistic in (True, False))
    assert of_average(two) == pytest.approx(0.0005, abs=1e-5)
    assert gap(two[-1]) < 1e-6
    assert two[-1] == pytest.approx(NASH, abs=1e-6)
    assert of_average(one) == pytest.approx(0.010, abs=1e-4)
    assert gap(one[-1]) == pytest.approx(0.60, abs=5e-3)


@pytest.mark.parametrize("optimistic", [False, True])
def test_a_game_that_everybody_draws_changes_nothing(optimistic):
    game = Game(build("onpo", {"eta": 1.0, "optimistic": optimistic, "soft_labels": True}), np.full((3, 3), 0.5))
    assert game.play(3) == pytest.approx(np.tile(START, (4, 1)), abs=1e-6)


def test_scores_that_collapse_the_game_do_not_lead_there(circles):
    """Mean win rates make the first and the third answer equals, which the third wins against the first by 0.8."""
    scores = CYCLE.mean(axis=1)
    assert scores[0] == pytest.approx(scores[2])
    iterates = Game(build("dpo", {"beta": 1.0, "soft_labels": True}), CYCLE, scores=scores.tolist()).play(ROUNDS)
    assert iterates[-1][0] / iterates[-1][2] == pytest.approx(8.0, rel=1e-2)  # as in START
    assert gap(iterates[-1]) > 0.44
    assert of_average(iterates) > 3 * max(map(of_average, circles.values()))


@pytest.mark.parametrize("name", ["dpo", *NAMES])
def test_where_one_answer_beats_all_others_it_gets_most_of_the_mass(name):
    player = PLAYERS.get(name, Player({"beta": 1 / STEP}))
    last = Game(build(name, player.knobs), LADDER).play(60)[-1]
    assert last[0] > (0.98 if player.regularized is None else regularized(LADDER, player.regularized)[0] - 1e-3)


@pytest.mark.parametrize("name", LASTS)
def test_the_last_policy_is_that_of_the_regularized_game(name):
    player = PLAYERS[name]
    last = Game(build(name, player.knobs), CYCLE).play(80)[-1]
    assert last == pytest.approx(regularized(CYCLE, player.regularized), abs=1e-4)
    assert gap(last) > 0.02  # which is not Nash of the game itself


def without_oneself(verdict: Verdict) -> np.ndarray:
    """Win rates among the others only."""
    matrix = verdict.matrix()
    return (matrix.sum(axis=1) - 0.5) / (len(matrix) - 1)


def reversed_rates(self: Algorithm, outputs: Outputs, batch: Batch) -> LossOutput:
    return SPPO_LOSS(self, outputs, dataclasses.replace(batch, win_rates_B=1.0 - batch.win_rates_B))


def of_probabilities(self: Algorithm, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict]:
    z_P = self.eta * margin(outputs, batch)
    return logistic(z_P, batch.prob_P), z_P, {}


@pytest.mark.parametrize(
    ("name", "owner", "method", "faulty"),
    [
        ("sppo", Verdict, "win_rates", without_oneself),
        ("dno", Verdict, "win_rates", without_oneself),
        ("sppo", Sppo, "loss", reversed_rates),
        ("dno", Dno, "pair_loss", of_probabilities),
    ],
)
def test_a_fault_would_be_noticed_in_the_first_iteration(monkeypatch, name, owner, method, faulty):
    monkeypatch.setattr(owner, method, faulty)
    with pytest.raises(AssertionError):
        check_step(name, PLAYERS[name].knobs, 1e-3)


def test_a_policy_that_does_not_move_would_be_noticed(monkeypatch):
    monkeypatch.setattr(
        Sppo, "loss", lambda self, o, b: SPPO_LOSS(self, o, dataclasses.replace(b, win_rates_B=b.win_rates_B * 0 + 0.5))
    )
    still = Game(build("sppo", PLAYERS["sppo"].knobs), CYCLE).play(3)
    assert np.allclose(still, START, atol=1e-6)
    assert of_average(still) > 0.4
    with pytest.raises(AssertionError):
        test_the_average_policy_approaches_nash({"sppo": still}, "sppo")
