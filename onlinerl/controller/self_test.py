"""Before the first step: do the log-probs that the items carry belong to the policy that is about to be trained?

Nothing has been trained then, so policy, old policy, reference and base model are one model, and all log-probs that were stored for the
loss must be what the policy says now, token by token. A misaligned or permuted array, a wrong temperature and wrong weights all show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onlinerl.errors import LearnerError
from onlinerl.types import SelfTest, TrainItem

LARGEST_FLOAT = 3.4e38
"""In single precision, in which losses are calculated."""
LARGEST_SCORE = 1e19
"""Its square is about as large."""

ITEMS = 8
AMONG = 256
"""Of the first so many."""

FORMULA = 1e-3
"""Two passes of one policy are equal, so the loss is what its formula says but for fp32 sums."""
RELATIVE = 1e-6
"""The same as a share of a loss that is large by its formula: some steps of single precision."""

GAP = {"float32": 1e-3, "bfloat16": 0.02}
"""Nats per token that one and the same model may differ by in any case, by the learner's dtype."""
TIMES_NOISE = 2.0
"""Where rounding goes further, this many times what it does if the same items are batched in another way. A 135M model in bfloat16 gave
0.005 on short prompts and 0.056 on prompts of 400 tokens, where rounding by other padding was 0.049. A shift by one token gave 2, and
a temperature of 0.98 for 1 a tilt of 0.03."""
MOST_NOISE = 0.25
"""More than this is no rounding."""


def choose(items: Sequence[TrainItem]) -> list[TrainItem]:
    """Items to test with: long responses, in which rounding averages out, of different prompts, which a permutation mixes up."""
    among = (items[i] for i in range(min(AMONG, len(items))))  # there may be very many, and each is read from the disk
    known = [(-min(len(s.response_ids) for s in item.sequences), item.prompt_id) for item in among]
    by_length = sorted(range(len(known)), key=lambda i: known[i][0])
    seen: set[str] = set()
    first_of_prompt: list[int] = []
    others: list[int] = []
    for i in by_length:
        (others if known[i][1] in seen else first_of_prompt).append(i)
        seen.add(known[i][1])
    return [items[i] for i in [*first_of_prompt, *others][:ITEMS]]


def require_scores_fit(earned: Sequence[float]) -> None:
    """Refuse scores that are infinite in a batch. Their advantages may still be finite, but wrong: 0 where the spread is infinite.

    Args:
        earned: what each response earns.

    Raises:
        LearnerError: if one is too large.
    """
    largest = max(map(abs, earned), default=0.0)
    if not largest <= LARGEST_FLOAT:
        raise _overflow("training cannot begin", largest)


def check(
    result: SelfTest, expected_loss: float | None, dtype: str, largest_score: float = 0.0, *, padding_free: bool = False
) -> None:
    """Refuse to train on what does not belong to the policy.

    Args:
        result: of the learner.
        expected_loss: what the formula says with policy = reference; None if it says nothing.
        dtype: of the learner.
        largest_score: of the items, by absolute value.
        padding_free: whether the learner's sequences share a row.

    Raises:
        LearnerError: saying what does not hold.
    """
    _require_separate(result.noise, padding_free=padding_free)
    limit = max(GAP[dtype], TIMES_NOISE * result.noise)
    if not abs(result.repeat_kl) <= FORMULA:
        raise LearnerError(
            f"two passes of one policy over the same tokens differ by {result.repeat_kl:.6f} nats per sequence instead of 0",
            field="learner",
            fix="something differs between two passes of one model: dropout, or a non-deterministic kernel",
        )
    if not abs(result.reference_kl) <= max(FORMULA, limit**2):  # a KL grows with the square of what log-probs are off by
        raise LearnerError(
            f"before the first step, the KL between the policy and the reference beside it is {result.reference_kl:.4f} nats per token "
            "instead of 0",
            field="model",
            fix="the reference is the model on disk, and training started from another one; was it replaced?",
        )
    _require_finite(result.loss, "the policy's own log-probs", largest_score)
    formula = max(FORMULA, RELATIVE * abs(expected_loss or 0.0))
    if expected_loss is not None and not abs(result.loss - expected_loss) <= formula:
        raise LearnerError(
            f"with policy = reference the loss is {result.loss:.6f} instead of {expected_loss:.6f}",
            field="algorithm",
            fix="this is a bug of the algorithm: its loss is not what it says in `loss_at_reference`",
        )
    _require_own(result, limit, dtype)
    _require_finite(result.stored_loss, "the stored log-probs", largest_score)
    slack = formula + limit * result.stored_loss_slope
    if expected_loss is not None and not abs(result.stored_loss - expected_loss) <= slack:
        raise LearnerError(
            f"with the stored reference the loss is {result.stored_loss:.6f} instead of {expected_loss:.6f} (give or take {slack:.6f})",
            field="learner",
            fix="the stored log-probs do not belong to this policy",
        )
    if not result.base_gap <= limit:
        raise LearnerError(
            f"before the first step, policy and base model differ by {result.base_gap:.4f} nats per token (limit {limit:g})",
            field="model",
            fix="the model on disk is not the one that training started from; was it replaced?",
        )


def _require_separate(noise: float, *, padding_free: bool) -> None:
    """That what the policy says about a response does not depend on what is beside it in a batch."""
    if padding_free and not noise <= MOST_NOISE:
        raise LearnerError(
            f"what the policy says about a response changes by {noise:.4f} nats per token with the order of the responses in a row",
            field="learner.padding_free",
            fix="this model's attention sees other sequences of the row: set learner.padding_free=false",
        )
    if not noise <= MOST_NOISE:
        raise LearnerError(
            f"what the policy says about a response changes by {noise:.4f} nats per token if its batch is padded further",
            field="learner.attn_implementation",
            fix="padding is seen by this model's attention: try learner.attn_implementation=eager, or another version of transformers",
        )


def _require_own(result: SelfTest, limit: float, dtype: str) -> None:
    """That stored log-probs are this policy's."""
    for name, gap in result.stored_gaps.items():
        if not gap <= limit:
            raise LearnerError(
                f"before the first step, the stored {name} differ from what the policy says by {gap:.4f} per token "
                f"(limit {limit:g} in {dtype})",
                field="learner",
                fix="they were computed at another temperature, with other weights, or for other tokens: training on it would go wrong",
            )
    for name, tilt in result.stored_tilts.items():
        if not tilt <= GAP[dtype]:
            raise LearnerError(
                f"before the first step, the stored {name} differ from what the policy says the more, the less probable a token is: by "
                f"{tilt:.4f} (limit {GAP[dtype]:g} in {dtype})",
                field="learner",
                fix="they were computed at another temperature or with other weights: training on it would go wrong",
            )


def _require_finite(loss: float, what: str, largest_score: float) -> None:
    if math.isfinite(loss):
        return
    cause = f"before the first step the loss is {loss} on {what}"
    if largest_score > LARGEST_SCORE:
        raise _overflow(cause, largest_score)
    raise LearnerError(
        cause,
        field="algorithm.name",
        fix="look for log(0), 0/0 or an overflow in the algorithm's `loss` and `prepare`, correct it, then `onlinerl resume`",
    )


def _overflow(cause: str, largest: float) -> LearnerError:
    return LearnerError(
        f"{cause}: scores as large as {largest:.3g} overflow in single precision, in which losses are calculated",
        field="oracle",
        fix=f"let the oracle give scores of ordinary size (at most {LARGEST_SCORE:.0e}), and start a new run: this one keeps the others",
    )
