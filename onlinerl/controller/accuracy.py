"""What an oracle or a reward model is worth on comparisons whose winner is known: accuracy, calibration, and how often it goes in a circle.

Sources: ECE and its noise floor as in "On Diversified Preferences of Large Language Model Alignment" (arXiv 2312.07401), with equal-mass bins;
cycles as in "General Preference Modeling with Preference Representations for Aligning Language Models" (arXiv 2410.02197).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np

from onlinerl.controller.comparing import circles
from onlinerl.controller.statistics import Estimate, bootstrap, wilson
from onlinerl.ops.calibration import bins, calibration_error, noise_floor
from onlinerl.types import derive_seed


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A comparison that was not trained on, and what the model says of it."""

    prob: float
    """P(chosen beats rejected), by the model."""
    label: float
    """The same, by the data; 1/2 is a tie, which has no winner."""
    chosen_length: int
    rejected_length: int
    source: str
    disagrees: bool | None = None
    """Whether the two orders of a model that reads both responses name different winners."""

    @property
    def right(self) -> float:
        """1 if the model names the winner, 1/2 if it names none."""
        return 0.5 if self.prob == 0.5 else float(self.prob > 0.5)


def outcomes(scored: Sequence[Scored]) -> list[float]:
    """1, 1/2 or 0 for each comparison that has a winner, in their order: what to decide by."""
    return [each.right for each in scored if each.label > 0.5]


def measured(scored: Sequence[Scored]) -> dict[str, Any]:
    """Figures of comparisons, as plain data; ties are counted and left out, because nobody can name their winner."""
    known = [each for each in scored if each.label > 0.5]
    found: dict[str, Any] = {
        "comparisons": len(scored),
        "ties": len(scored) - len(known),
        "accuracy": _of(known),
        "calibration": calibration([each.prob for each in known], [each.right for each in known]),
        "accuracy_by_length": by_length(known),
        "accuracy_by_source": {name: _of(rows) for name, rows in sorted(grouped(known).items())},
        "length_bias": length_bias(known),
    }
    flips = [float(each.disagrees) for each in scored if each.disagrees is not None]
    return found | ({"swap_disagreement": asdict(wilson(flips))} if flips else {})


def _of(rows: Sequence[Scored]) -> dict[str, float]:
    return asdict(wilson([each.right for each in rows]))


def grouped(rows: Sequence[Scored]) -> Mapping[str, list[Scored]]:
    """By their source."""
    groups: defaultdict[str, list[Scored]] = defaultdict(list)
    for each in rows:
        groups[each.source].append(each)
    return groups


def by_length(rows: Sequence[Scored]) -> list[dict[str, Any]]:
    """Accuracy in each quarter of the comparisons, by the lengths of both responses together; short ones first."""
    order = sorted(rows, key=lambda each: each.chosen_length + each.rejected_length)
    parts = [list(part) for part in np.array_split(np.arange(len(order)), 4)]
    totals = [each.chosen_length + each.rejected_length for each in order]
    return [{"from": totals[part[0]], "to": totals[part[-1]], **_of([order[i] for i in part])} for part in parts if part]


def length_bias(rows: Sequence[Scored]) -> dict[str, Any]:
    """Accuracy where the better response is the shorter one, and where it is the longer one: a model that likes length has the first lower."""
    shorter = [each for each in rows if each.chosen_length < each.rejected_length]
    longer = [each for each in rows if each.chosen_length > each.rejected_length]
    found = {"shorter_is_better": _of(shorter), "longer_is_better": _of(longer)}
    return found | {"difference": found["shorter_is_better"]["value"] - found["longer_is_better"]["value"]}


def calibration(probs: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Expected calibration error of the confidence max(P, 1 - P) in the winner that the model names, and what it would be by chance.

    The noise floor is the mean, and the 95th percentile, of the same figure where labels are drawn from the model's own confidence: a perfectly
    calibrated model of so many comparisons has that much. Only an error above the 95th percentile says something.
    """
    confidence = np.maximum(probs, 1.0 - np.asarray(probs, dtype=np.float64))
    if not len(confidence):
        return {"ece": float("nan"), "floor": float("nan"), "floor_95": float("nan"), "bins": 0, "alarm": False}
    error = calibration_error(confidence, np.asarray(right, dtype=np.float64))
    floor, high = noise_floor(confidence, derive_seed("noise floor", len(confidence)))
    return {"ece": error, "floor": floor, "floor_95": high, "bins": bins(len(confidence)), "alarm": error > high}


def cycle_rate(matrix: np.ndarray, seed: str = "") -> float:
    """Share of the triples of K >= 3 responses that go in a circle; see `circles`."""
    return circles(matrix, seed) / comb(len(matrix), 3)


def cycles(matrices: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The rate over prompts with three or more responses, by the model and, where all pairs of a prompt are labelled, by the data; None
    where there is no such prompt.

    Args:
        matrices: P(i beats j) by the model [K, K], by prompt.
        labels: the same by the data, NaN where a pair has no label.
    """
    if not matrices:
        return None
    said = bootstrap([cycle_rate(matrix, prompt) for prompt, matrix in sorted(matrices.items())])
    whole = {prompt: matrix for prompt, matrix in labels.items() if not np.isnan(matrix).any()}
    found = {"model": asdict(said), "triples": sum(comb(len(matrix), 3) for matrix in matrices.values())}
    if whole:
        found["data"] = asdict(bootstrap([cycle_rate(matrix, prompt) for prompt, matrix in sorted(whole.items())]))
    return found


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a reader should not overlook."""
    said = []
    accuracy, error = figures["accuracy"], figures["calibration"]
    if not accuracy["low"] > 0.5:
        said.append(
            f"the interval of the accuracy, {shown(accuracy)}, includes chance: nothing was learned that these comparisons show"
        )
    if error["alarm"]:
        said.append(
            f"the calibration error, {error['ece']:.3f}, is above the 95th percentile of its noise, {error['floor_95']:.3f}: probabilities "
            "are too sure, or not sure enough"
        )
    for name, subset in figures["accuracy_by_source"].items():
        if subset["high"] < 0.5:
            said.append(f"of {name} it is wrong more often than right: {shown(subset)}")
    return said


def shown(estimate: Mapping[str, float] | Estimate) -> str:
    """As people read it."""
    found = asdict(estimate) if isinstance(estimate, Estimate) else estimate
    if not found["n"]:
        return "none"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
