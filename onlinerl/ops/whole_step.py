"""Losses that look at all responses of an optimizer step at once, however it is cut up into ranks and micro-batches.

Such a loss is a function of one value per response, e.g. its log-ratio to the reference. The step takes two passes: the first one, without
gradient, gives all values; from all of them together every rank knows the slope of the loss by each of its own, which is all that the second
pass, with gradient, needs. So the gradient is exact, and costs one forward pass more.

Such a loss may keep a few numbers from one step to the next. Every rank makes the new ones of the same rows, so all of them hold the same
without telling each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.protocols.algorithm import Algorithm

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs

State = Mapping[str, float]
"""What a loss keeps from one step to the next, by name: finite numbers, kept in fp64."""


@dataclass(frozen=True)
class Rows:
    """All N responses of some micro-batches, fp64, on the CPU."""

    values_N: Tensor
    facts: Mapping[str, Tensor]
    """By name, [N]: what else the loss reads of a response; constants."""
    weight_N: Tensor
    pairs_P2: Tensor
    """Row indices (chosen, rejected)."""
    state: State = field(default_factory=dict)
    """What the loss keeps, as the step before left it."""

    @staticmethod
    def of(values_B: Tensor, facts: Mapping[str, Tensor], batch: Batch) -> Rows:
        """Those of one micro-batch. The dummy of a rank without data has none."""
        real = int(batch.weight_B.numel()) if len(batch.lists_GK) else 0

        def plain(numbers_B: Tensor) -> Tensor:
            return numbers_B[:real].detach().double().cpu()

        return Rows(
            values_N=plain(values_B),
            facts={name: plain(numbers_B) for name, numbers_B in facts.items()},
            weight_N=plain(batch.weight_B),
            pairs_P2=batch.pairs_P2.cpu(),
        )

    @staticmethod
    def together(parts: Sequence[Rows]) -> Rows:
        """One after the other."""
        starts = torch.tensor([0, *(len(part.values_N) for part in parts)]).cumsum(0).tolist()
        return Rows(
            values_N=torch.cat([part.values_N for part in parts]),
            facts={name: torch.cat([part.facts[name] for part in parts]) for name in parts[0].facts},
            weight_N=torch.cat([part.weight_N for part in parts]),
            pairs_P2=torch.cat([part.pairs_P2 + start for part, start in zip(parts, starts, strict=False)]),
        )


class WholeStep(Algorithm):
    """A loss of the values of all responses of a step."""

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What the loss is a function of, [B]; through which the gradient flows."""
        raise NotImplementedError

    def facts(self, batch: Batch) -> Mapping[str, Tensor]:
        """What else it reads of each row, [B] each."""
        return {}

    def row_weights(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What each row counts, [B]; constants."""
        return batch.weight_B

    def step_loss(self, rows: Rows) -> Tensor:
        """The loss of the whole step as a sum over its units; of weights that are 0 nothing may depend."""
        raise NotImplementedError

    def initial_state(self) -> State | None:
        """What it keeps from one step to the next, before the first one; None if it keeps nothing."""
        return None

    def next_state(self, rows: Rows) -> State:
        """What it keeps of this step, without gradient. A step that is skipped, because its gradient is not finite, leaves nothing."""
        return rows.state

    def state_metrics(self, state: State) -> Mapping[str, float]:
        """What of its state is reported after each step."""
        return state

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """Of one micro-batch."""
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """This micro-batch's part of the step's loss. A batch without slopes is a step of its own, the first one.

        Raises:
            ValueError: if a field that it reads is missing.
        """
        values_B = self.values(outputs, batch)
        if batch.slopes_B is None:
            own = Rows.of(values_B, self.facts(batch), replace(batch, weight_B=self.row_weights(outputs, batch)))
            (batch,) = with_slopes([batch], [own], *differentiated(self, replace(own, state=self.initial_state() or {})))
        slopes_B, share = batch.need("slopes_B"), batch.need("step_loss")
        total = share + (slopes_B * (values_B - values_B.detach())).sum()
        return LossOutput(total=total, metrics=self.step_metrics(outputs, batch, values_B))


def differentiated(algorithm: WholeStep, rows: Rows) -> tuple[Tensor, Tensor]:
    """The loss of the step that these are all rows of, and its slope by each of their values, [N]."""
    values_N = rows.values_N.detach().requires_grad_()
    with torch.enable_grad():
        loss = algorithm.step_loss(replace(rows, values_N=values_N))
    slopes_N = torch.autograd.grad(loss, values_N)[0] if loss.requires_grad else torch.zeros_like(values_N)
    return loss.detach(), slopes_N


def with_slopes(batches: Sequence[Batch], own: Sequence[Rows], loss: Tensor, slopes_N: Tensor) -> list[Batch]:
    """Micro-batches of one rank with the slope of the step's loss by each of their values.

    Args:
        batches: of this rank.
        own: what the first pass gave of each of them.
        loss: of the step on the first rank, so that it counts once; 0 on the others.
        slopes_N: of this rank's rows, in their order.
    """
    filled, start = [], 0
    for number, (batch, part) in enumerate(zip(batches, own, strict=True)):
        slopes_B = torch.zeros(len(batch.weight_B), dtype=torch.float64)
        slopes_B[: len(part.values_N)] = slopes_N[start : start + len(part.values_N)]
        start += len(part.values_N)
        share = loss if number == 0 else torch.zeros_like(loss)
        filled.append(replace(batch, slopes_B=slopes_B.to(batch.weight_B.device), step_loss=share.to(batch.weight_B.device)))
    return filled
