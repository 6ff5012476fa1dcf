"""What a loss is given: the only tensor-carrying values beside what it returns (loss.py).

Axes: B rows (sequences), S prompt + response positions, T response positions, P pairs, G lists of at most K rows. A field's suffix names
its axes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the policy's forward pass gives a loss. All fp32; values at positions where mask_BT is false are undefined."""

    logprobs_BT: Tensor
    """Log-prob of each response token, at the temperature the algorithm asks for."""
    values_BT: Tensor | None = None
    """The critic's value of the state before each response token."""
    entropy_BT: Tensor | None = None
    """Entropy of the next-token distribution, in nats."""
    collision_BT: Tensor | None = None
    """log sum_v pi_v^2 over the vocabulary: log of the probability that two samples agree. Without gradient."""
    reference_kl_BT: Tensor | None = None
    """KL(reference || policy) of the next-token distributions, in nats, with gradient."""
    hidden_BH: Tensor | None = None
    """Sum of the last layer's states from the last prompt token to the last but one of the response. No loss reads it."""
    rewards_BD: Tensor | None = None
    """What the head of a reward or preference model says at the last token of each row."""

    def need(self, name: str) -> Tensor:
        """A field that the loss cannot do without.

        Raises:
            ValueError: if the learner did not compute it.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(
                f"this loss reads outputs.{name}, which the learner did not compute; declare it in the algorithm's `needs`"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch. Right-padded; masks come from lengths, never from token values, so pad may equal eos."""

    tokens_BS: Tensor
    """int64, prompt then response then padding."""
    prompt_lengths_B: Tensor
    lengths_B: Tensor
    """Response lengths."""
    mask_BT: Tensor
    """bool, true exactly on response tokens."""
    scores_B: Tensor
    win_rates_B: Tensor
    pairs_P2: Tensor
    """int64, row indices (chosen, rejected); empty where items are single samples or lists."""
    prob_P: Tensor
    """P(chosen beats rejected)."""
    weight_P: Tensor
    lists_GK: Tensor
    """int64, row indices of the sequences of each item in their order; -1 behind the end of a shorter one. G items."""
    weight_G: Tensor
    weight_B: Tensor
    policy_weight_B: Tensor
    """Of the policy's terms of the loss; 0 where only the critic learns."""
    reference_logprobs_BT: Tensor | None = None
    old_logprobs_BT: Tensor | None = None
    behavior_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    slopes_B: Tensor | None = None
    """For a loss of a whole step (ops/whole_step.py): its slope by the value of each row."""
    step_loss: Tensor | None = None
    """And its value, in one of the step's micro-batches; else 0."""
    anchor_logprobs_BT: Tensor | None = None
    exploration_P: Tensor | None = None
    """int64, row index of the exploration response of each pair; filled only if all pairs have one."""
    online_PN: Tensor | None = None
    """int64, row indices of the samples of the policy that go with each pair, -1 where it has fewer; None if no pair has any."""
    nll_P: Tensor | None = None
    """int64, row index of what is imitated beside each pair; filled only if all pairs have it."""
    nll_tokens_G: Tensor | None = None
    """`TrainItem.nll_tokens`; filled only if all items have it."""
    token_weights_BT: Tensor | None = None
    forced_B: Tensor | None = None
    """How many of the first response tokens nobody sampled; None: of no row any."""
    annotators_G: Tensor | None = None
    """int64, a number that stands for who judged each item (`annotator_number` in ops/batching.py)."""

    @property
    def sequence_mask_BS(self) -> Tensor:
        """bool[B, S], true on prompt and response tokens."""
        positions = torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        return positions[None, :] < (self.prompt_lengths_B + self.lengths_B)[:, None]

    @property
    def sampled_BT(self) -> Tensor:
        """bool[B, T], true on the response tokens that were sampled: all but forced ones."""
        if self.forced_B is None:
            return self.mask_BT
        positions = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        return self.mask_BT & (positions[None, :] >= self.forced_B[:, None])

    @property
    def sampled_lengths_B(self) -> Tensor:
        """How many those are."""
        return self.lengths_B if self.forced_B is None else self.lengths_B - self.forced_B

    def need(self, name: str) -> Tensor:
        """A field that the loss cannot do without.

        Raises:
            ValueError: if it was not filled in.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss reads batch.{name}, which was not filled in; declare it in the algorithm's `needs`")
        return value

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
