"""Asking a learner about held-out comparisons, and about all responses of a prompt that has several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from onlinerl.controller import accuracy
from onlinerl.controller.accuracy import Scored
from onlinerl.protocols.objective import RewardLearner
from onlinerl.reward_training import refresh
from onlinerl.reward_training.comparisons import Fitting, Reader
from onlinerl.types import RawPrompt
from onlinerl.types.preferences import Comparison

AT_ONCE = 1024
"""Pairs of responses whose sequences the learner gets in one go."""
MOST_RESPONSES = 16
"""Of a prompt, in the figures about circles: their pairs grow with the square."""


def evaluate(learner: RewardLearner, reader: Reader, heldout: Fitting) -> dict[str, Any]:
    """All figures, as plain data."""
    each = scored(learner, reader, heldout)
    figures = accuracy.measured(each) | {"length_unit": "words" if reader.objective.compares else "tokens"}
    figures["cycles"] = _circles(learner, reader, heldout.comparisons)
    return figures | {"warnings": accuracy.warnings(figures), refresh.OUTCOMES: accuracy.outcomes(each)}


def scored(learner: RewardLearner, reader: Reader, heldout: Fitting) -> list[Scored]:
    """What the model says of each comparison."""
    asked = [(each.prompt, each.chosen, each.rejected) for each in heldout.comparisons]
    odds, flips = _asked(learner, reader, asked)
    probs = _sigmoid(odds)
    return [
        Scored(
            prob=float(p),
            label=each.prob,
            chosen_length=lengths[0] if not reader.objective.compares else _words(each.chosen),
            rejected_length=lengths[1] if not reader.objective.compares else _words(each.rejected),
            source=each.source,
            disagrees=bool(flip) if reader.objective.compares else None,
        )
        for p, each, lengths, flip in zip(probs, heldout.comparisons, heldout.lengths, flips, strict=True)
    ]


def _words(text: str) -> int:
    """A model that reads both responses at once has no sequence of either: their words stand for their length."""
    return len(text.split())


def _sigmoid(odds: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        probs: np.ndarray = 1.0 / (1.0 + np.exp(-odds))
    return probs


def _asked(
    learner: RewardLearner, reader: Reader, asked: Sequence[tuple[RawPrompt, str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds f64[N] that the first response wins, and bool[N] whether both sequences by themselves say the same place wins."""
    odds, flips = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for start in range(0, len(asked), AT_ONCE):
        pairs = [reader.sequences(*each) for each in asked[start : start + AT_ONCE]]
        wanted = {
            sequence.prompt_ids: sequence for pair in pairs for sequence in pair
        }  # of several pairs a response is read once
        said = dict(zip(wanted, learner.rewards(list(wanted.values())), strict=True))
        first, second = (np.stack([said[pair[side].prompt_ids] for pair in pairs]) for side in (0, 1))
        odds.append(reader.objective.log_odds(first, second))
        flips.append((first[:, 0] > 0) == (second[:, 0] > 0))
    return np.concatenate(odds), np.concatenate(flips)


def _circles(learner: RewardLearner, reader: Reader, comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """How often preferences among the responses of a prompt go in a circle."""
    groups: defaultdict[str, list[Comparison]] = defaultdict(list)
    for each in comparisons:
        groups[each.prompt.id].append(each)
    responses = {
        name: list(dict.fromkeys(r for c in rows for r in (c.chosen, c.rejected)))[:MOST_RESPONSES]
        for name, rows in groups.items()
    }
    responses = {name: found for name, found in responses.items() if len(found) > 2}
    pairs = [(name, i, j) for name, found in responses.items() for i, j in combinations(range(len(found)), 2)]
    odds, _ = _asked(learner, reader, [(groups[n][0].prompt, responses[n][i], responses[n][j]) for n, i, j in pairs])
    matrices = {name: np.full((len(found), len(found)), 0.5) for name, found in responses.items()}
    for (name, i, j), p in zip(pairs, _sigmoid(odds), strict=True):
        matrices[name][i, j], matrices[name][j, i] = p, 1.0 - p
    return accuracy.cycles(matrices, {name: _labelled(found, groups[name]) for name, found in responses.items()})


def _labelled(responses: Sequence[str], comparisons: Sequence[Comparison]) -> np.ndarray:
    """P(i beats j) by the data, the mean where a pair is there twice; NaN where it is not there."""
    place = {response: i for i, response in enumerate(responses)}
    totals, counts = np.zeros((len(place), len(place))), np.zeros((len(place), len(place)))
    for each in comparisons:
        if each.chosen in place and each.rejected in place:
            i, j = place[each.chosen], place[each.rejected]
            for row, column, p in ((i, j, each.prob), (j, i, 1.0 - each.prob)):
                totals[row, column] += p
                counts[row, column] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        table: np.ndarray = totals / counts
    np.fill_diagonal(table, 0.5)
    return table
