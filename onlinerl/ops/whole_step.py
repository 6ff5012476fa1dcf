"""Losses that look at all responses of an optimizer step at once, however it is cut up into ranks and micro-batches.

Such a loss is a function of one value per response, e.g. its log-ratio to the reference. The step takes two passes: the first one, without
gradient, gives all values; from all of them together every rank knows the slope of the loss by each of its own, which is all that the second
pass, with gradient, needs. So the gradient is exact, and costs one forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.protocols.algorithm import Algorithm


@dataclass(frozen=True)
class Rows:
    """All N responses of some micro-batches, fp64, on the CPU."""

    values_N: Tensor
    facts: Mapping[str, Tensor]
    """By name, [N]: what else the loss reads of a response; constants."""
    weight_N: Tensor
    pairs_P2: Tensor
    """Row indices (chosen, rejected)."""

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

    def step_loss(self, rows: Rows) -> Tensor:
        """The loss of the whole step as a sum over its units; of weights that are 0 nothing may depend."""
        raise NotImplementedError

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """Of one micro-batch."""
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """This micro-batch's part of the step's loss. A batch without slopes is a step of its own.

        Raises:
            ValueError: if a field that it reads is missing.
        """
        values_B = self.values(outputs, batch)
        if batch.slopes_B is None:
            (batch,) = with_slopes(self, [batch], [self.rows(outputs, batch)])
        slopes_B, share = batch.need("slopes_B"), batch.need("step_loss")
        total = share + (slopes_B * (values_B - values_B.detach())).sum()
        return LossOutput(total=total, metrics=self.step_metrics(outputs, batch, values_B))

    def rows(self, outputs: Outputs, batch: Batch) -> Rows:
        """What the first pass gives of a micro-batch. The dummy of a rank without data has none."""
        real = int(batch.weight_B.numel()) if len(batch.lists_GK) else 0

        def plain(values_B: Tensor) -> Tensor:
            return values_B[:real].detach().double().cpu()

        return Rows(
            values_N=plain(self.values(outputs, batch)),
            facts={name: plain(values_B) for name, values_B in self.facts(batch).items()},
            weight_N=plain(batch.weight_B),
            pairs_P2=batch.pairs_P2.cpu(),
        )


def with_slopes(
    algorithm: WholeStep, batches: Sequence[Batch], own: Sequence[Rows], before: Sequence[Rows] = (), after: Sequence[Rows] = ()
) -> list[Batch]:
    """Micro-batches of one rank with the slope of the step's loss by each of their values.

    Args:
        algorithm: whose loss.
        batches: of this rank.
        own: what the first pass gave of each of them.
        before, after: what it gave on the ranks before this one and after it.

    Returns:
        The batches. The value of the loss itself is in the first one of the first rank, so that it counts once.
    """
    rows = Rows.together([*before, *own, *after])
    values_N = rows.values_N.requires_grad_()
    with torch.enable_grad():
        loss = algorithm.step_loss(replace(rows, values_N=values_N))
    slopes_N = torch.autograd.grad(loss, values_N)[0] if loss.requires_grad else torch.zeros_like(values_N)
    start = sum(len(part.values_N) for part in before)
    filled = []
    for number, (batch, part) in enumerate(zip(batches, own, strict=True)):
        slopes_B = torch.zeros(len(batch.weight_B), dtype=torch.float64)
        slopes_B[: len(part.values_N)] = slopes_N[start : start + len(part.values_N)]
        start += len(part.values_N)
        share = loss.detach() if number == 0 and not before else torch.zeros_like(loss)
        filled.append(replace(batch, slopes_B=slopes_B.to(batch.weight_B.device), step_loss=share.to(batch.weight_B.device)))
    return filled


def first_pass(
    algorithm: WholeStep,
    batches: Sequence[Batch],
    forward: Callable[[Batch], Outputs],
    gather: Callable[[list[Rows]], tuple[list[list[Rows]], int]],
) -> list[Batch]:
    """The first pass of one rank.

    Args:
        algorithm: whose loss.
        batches: micro-batches of this rank.
        forward: the policy's forward pass as the loss gets it.
        gather: this rank's rows -> those of every rank, and which of them is this one. Collective.
    """
    with torch.no_grad():
        own = [algorithm.rows(forward(batch), batch) for batch in batches]
    ranks, rank = gather(own)
    before = [part for rows in ranks[:rank] for part in rows]
    after = [part for rows in ranks[rank + 1 :] for part in rows]
    return with_slopes(algorithm, batches, own, before, after)
