"""Small hand-made groups and batches for the algorithm tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from onlinerl.algorithms._modified import PairFilter
from onlinerl.batch import Batch, Outputs
from onlinerl.loss import LossOutput
from onlinerl.ops.batching import collate
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Group, Judged, Pair, Prompt, Rollout, Sampling, TrainItem, TrainSequence, Verdict

CAPPED = {"importance_sampling_cap": 0.9}
RESPONSE_KNOBS = {
    "online_kl": [({}, 0.5)],
    "nll_coef": [({}, 0.5)],
    "token_weight_alpha": [({}, 0.3), ({"token_weight_alpha": 0.3}, 1.0)],
    "importance_sampling_floor": [({}, 0.95), ({"importance_sampling_floor": 0.95}, 0.8)],
    "importance_sampling_filter": [({}, (0.95, 1.05)), ({"importance_sampling_filter": (0.95, 1.05)}, (0.5, 1.1))],
}
"""Of the terms that all policy gradients may have, and of bounds that they have by no default."""
IMPORTANCE_KNOBS = RESPONSE_KNOBS | {
    "importance_sampling_cap": [({}, 0.9), ({}, None), (CAPPED, None)],
    "p_reset": [({}, 0.5)],
    "importance_sampling_mode": [(CAPPED, mode) for mode in ("token_mask", "sequence_truncate", "sequence_mask")],
}
PAID_KNOBS = {"score_clip": [({}, 0.5)], "kl_clip": [({}, 0.05)]}
"""Where the KL is paid inside the reward."""
CLIP_KNOBS = {"clip_range_low": [({}, 0.05)], "clip_range_high": [({}, 0.05)], "dual_clip": [({}, 1.01)]}
PER_TOKEN = ("behavior_logprobs", "old_logprobs", "reference_logprobs", "anchor_logprobs", "values", "advantages", "returns")

PAIR_KNOBS = {
    # `per_prompt`, `age` and `source` change nothing here, where prompts have equally many pairs of one iteration and of one source: see
    # test_pair_modifiers.py.
    "pair_weights": [
        *(({}, how) for how in ("score_gap", "certainty", "dcg", "wpo")),
        ({"strength_thresholds": [0.5]}, "strength"),
    ],
    "strength_thresholds": [({"pair_weights": "strength", "strength_thresholds": [0.5]}, [0.5, 1.0])],
    "pair_age_decay": [],
    "source_weights": [],
    "pair_weight_clip": [({"pair_weights": "score_gap"}, [0.5, 1.5])],
    "nll_coef": [({}, 0.5)],
    "nll_target": [({"nll_coef": 0.5}, "reference_answer")],
    "nll_norm": [({"nll_coef": 0.5}, "sum"), ({"nll_coef": 0.5}, "batch_tokens")],
}
"""How the knobs that all losses on pairs have are set, for `KNOBS` of a golden test."""
LIST_KNOBS = {"nll_coef": [({}, 0.5)], "nll_norm": PAIR_KNOBS["nll_norm"]}
"""Those of losses on lists that may have the likelihood of the best response."""
FILTERS = ({"margin": 0.8}, {"floor": 0.5}, {"max_reference_margin": 0.1}, {"ches_share": 0.3})
MODIFIER_KNOBS = PAIR_KNOBS | {
    "pair_filter": [
        *(({}, PairFilter(**changes)) for changes in FILTERS),
        ({"pair_filter": PairFilter(ches_share=0.3)}, PairFilter(ches_share=0.3, ches_normalized=False)),
    ],
    "online_kl": [({}, 0.5)],
    "online_kl_samples": [({"online_kl": 0.5}, 3)],
}
"""Those of most losses on pairs."""
WITH_REFERENCE = {
    "pair_filter": [({"reference_free": False, **base}, value) for base, value in MODIFIER_KNOBS["pair_filter"]],
    "online_kl": [({"reference_free": False}, 0.5)],
    "online_kl_samples": [({"reference_free": False, "online_kl": 0.5}, 3)],
}
"""Of losses that have no reference unless they are told to."""
MARGIN_KNOBS = MODIFIER_KNOBS | {
    "beta": [({}, 0.3)],
    "reference_free": [({}, True)],
    "token_weights": [({}, "differing")],
    "common_token_weight": [({"token_weights": "differing"}, 0.5)],
    "ld_alpha": [({}, 0.5)],
    "length_norm": [({}, True)],
    "beta_rejected": [({}, 0.03)],
    "gamma_beta_ratio": [({}, 0.7)],
    "score_margin": [({}, 0.2)],
    "score_margin_max": [({"score_margin": 0.2}, 0.1)],
    "dpop_lambda": [({}, 2.0)],
    "length_penalty": [({}, 0.1)],
    "soft_labels": [({}, True)],
    "label_smoothing": [({}, 0.2)],
    "margin_cap": [({}, 0.01)],
    "flip_rate": [({"margin_cap": 10.0}, 0.2)],
}
"""Those of losses of a margin."""


def sequence(length: int, first_token: int = 10, **changes) -> TrainSequence:
    """A response of `length` tokens whose per-token fields are zero unless given as number or list."""
    fields = {name: np.full(length, 0.0, np.float32) for name in PER_TOKEN}
    for name, value in changes.items():
        fields[name] = np.broadcast_to(np.asarray(value, np.float32), length) if name in PER_TOKEN else value
    return TrainSequence(prompt_ids=(1, 2), response_ids=tuple(range(first_token, first_token + length)), **fields)


def pair(chosen: TrainSequence, rejected: TrainSequence, *more: TrainSequence, **changes) -> TrainItem:
    return TrainItem(prompt_id="p", sequences=(chosen, rejected, *more), **changes)


def single(only: TrainSequence, **changes) -> TrainItem:
    return TrainItem(prompt_id="p", sequences=(only,), **changes)


def evaluate(
    algorithm: Algorithm, items: Sequence[TrainItem], rows: Sequence[float | Sequence[float]], **outputs
) -> tuple[float, Tensor, LossOutput, Batch]:
    """Loss over the items divided by their units, its gradient per token [B, T], the raw output and the batch.

    `rows` are log-probs per sequence: a list of T, or one number for all tokens. Padding holds NaN, as nothing may read it.
    """
    batch = collate(items)
    logprobs_BT = spread(rows, batch).requires_grad_()
    out = algorithm.loss(Outputs(logprobs_BT=logprobs_BT, **outputs), batch)
    mean = out.total / sum(item.count(algorithm.unit) for item in items)
    (gradient_BT,) = torch.autograd.grad(mean, logprobs_BT, retain_graph=True)
    return mean.item(), gradient_BT, out, batch


def spread(rows: Sequence[float | Sequence[float]], batch: Batch) -> Tensor:
    """Rows of different lengths -> fp64 [B, T] with NaN in the padding."""
    padded = torch.full(batch.mask_BT.shape, float("nan"), dtype=torch.float64)
    for row, (values, length) in enumerate(zip(rows, batch.lengths_B.tolist(), strict=True)):
        padded[row, :length] = torch.as_tensor(values, dtype=torch.float64)
    return padded


def judged(lengths: Sequence[int], sources: Mapping[int, str] | None = None, **verdict) -> Judged:
    """A group with one distinct response per length, judged as given; `sources`: of those that were not drawn from the policy."""
    rollouts = tuple(
        Rollout(
            token_ids=tuple(range(10 * (k + 1), 10 * (k + 1) + length)),
            logprobs=(-1.0,) * length,
            text=str(k),
            finish_reason="stop",
            policy_version=3,
            sampler=Sampling(),
            seed=k,
            source=(sources or {}).get(k, "policy"),
        )
        for k, length in enumerate(lengths)
    )
    prompt = Prompt(
        id="p", text="x", token_ids=(1, 2), goal_ids=tuple((7, goal) for goal in range(1, 11)), answer_ids=(90, 91, 0)
    )
    return Judged(
        group=Group(prompt=prompt, rollouts=rollouts), verdict=Verdict(annotator="test", oracle_version="1", **verdict)
    )


# Chosen: S_w = -2 and D_w = 2 over 4 tokens. Rejected: S_l = -5 and D_l = -1 over 2 tokens. So h = 3, and z = 0.3 at beta 0.1.
ITEM = pair(sequence(4, reference_logprobs=-1.0, score=1.5), sequence(2, 50, reference_logprobs=-2.0, score=0.5), prob=0.8)
ROWS = (-0.5, -2.5)
F_PLUS, F_MINUS = 0.554355244, 0.854355244
"""log(1 + exp(-0.3)) and log(1 + exp(0.3))"""


# The two and a third one: S = -1 and D = 0.5 in one token. Scores 3, 2 and 0.
LIST = TrainItem(
    prompt_id="p",
    sequences=(
        ITEM.sequences[0].with_(score=3.0, win_rate=0.9),
        ITEM.sequences[1].with_(score=2.0, win_rate=0.5),
        sequence(1, 80, reference_logprobs=-1.5, score=0.0, win_rate=0.1),
    ),
)
LIST_ROWS = (*ROWS, -1.0)


def items_of(algorithm: Algorithm, group: Judged, pairs: Sequence[Pair] = ()) -> list[TrainItem]:
    """What is trained of a group of which nothing is left out."""
    items, dropped = algorithm.items(group, pairs)
    assert not dropped
    return items


def values(out: LossOutput) -> dict[str, float]:
    """Metrics as plain means."""
    return {name: float(mean.total / mean.count) for name, mean in out.metrics.items() if mean.count > 0}


def finite_differences(
    algorithm: Algorithm, items: Sequence[TrainItem], rows: Sequence[float | Sequence[float]], step: float = 1e-5
) -> Tensor:
    """What the gradient of `evaluate` must be, [B, T], from values alone (central differences, fp64).

    Not for losses with a stopped gradient in them, whose value moves otherwise than the gradient says.
    """
    batch = collate(items)
    at, units = spread(rows, batch), sum(item.count(algorithm.unit) for item in items)
    slopes = torch.zeros_like(at)
    for row, token in batch.mask_BT.nonzero().tolist():
        sides = []
        for move in (step, -step):
            moved = at.clone()
            moved[row, token] += move
            sides.append(algorithm.loss(Outputs(logprobs_BT=moved), batch).total.item() / units)
        slopes[row, token] = (sides[0] - sides[1]) / (2 * step)
    return slopes


def place(sequence: TrainSequence) -> int:
    """Which response of `judged` it is."""
    return sequence.response_ids[0] // 10 - 1


def trained(algorithm: Algorithm, groups: Sequence[Judged], **logprobs: Sequence[Sequence[float]]) -> list[TrainItem]:
    """What is trained of these groups, prepared; `logprobs`: by field, one list per response, the same in every group."""

    def fill(s: TrainSequence) -> TrainSequence:
        return s.with_(**{name: np.asarray(rows[place(s)], np.float32) for name, rows in logprobs.items()})

    items = [item for group in groups for item in algorithm.items(group, [])[0]]
    return list(algorithm.prepare([replace(item, sequences=tuple(map(fill, item.sequences))) for item in items]))


def response_gradients(algorithm: Algorithm, items: Sequence[TrainItem], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """The gradient at every token of every response, one after the other, summed over all items that a response is part of."""
    sequences = [s for item in items for s in item.sequences]
    _, gradient_BT, _, _ = evaluate(algorithm, items, [logprobs[place(s)] for s in sequences])
    sums = [np.zeros(len(row)) for row in logprobs]
    for s, row in zip(sequences, gradient_BT.tolist(), strict=True):
        sums[place(s)] += row[: len(s.response_ids)]
    return [float(slope) for own in sums for slope in own]
