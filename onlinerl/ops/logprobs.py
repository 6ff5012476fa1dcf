"""Log-probs of response tokens. Axes: B rows, T response positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`values_BT` with zeros where `mask_BT` is false, so that undefined positions (NaN included) reach neither value nor gradient.

    Raises:
        ValueError: if the shapes differ; broadcasting here would hide a misaligned batch.
    """
    if values_BT.shape != mask_BT.shape:
        raise ValueError(f"per-token values have shape {tuple(values_BT.shape)}, the mask {tuple(mask_BT.shape)}")
    return values_BT.masked_fill(~mask_BT, 0.0)


def token_log_ratios(outputs: Outputs, batch: Batch) -> Tensor:
    """d[B, T] = lp - ref: log-ratio of policy to reference of each response token, in nats; zero where the mask is false.

    Raises:
        ValueError: if the batch carries no reference log-probs.
    """
    return masked(outputs.logprobs_BT, batch.mask_BT) - masked(batch.need("reference_logprobs_BT"), batch.mask_BT)


def lengths(batch: Batch) -> Tensor:
    """Response lengths as floats, [B], without forced tokens, at least 1 so that an empty response can be divided by its length."""
    return batch.sampled_lengths_B.clamp(min=1).to(batch.scores_B.dtype)
