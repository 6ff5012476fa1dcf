"""What an untrained policy says about the arrays that its items carry: the same for every learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.learners._loss import loss_of
from onlinerl.ops.batching import collate, step_units
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import SelfTest, TrainItem

# One token alone may be off by 0.2 nats in bfloat16: the mean over a response counts at least so many.
SHORTEST = 16
PADDING = 64
"""Positions by which a batch is padded to see how far rounding alone goes: enough for kernels to cut it up in another way."""
CHANCE = 4.0
"""Standard errors within which a tilt is taken for rounding."""
LOGPROBS = ("reference_logprobs", "anchor_logprobs", "old_logprobs")
"""What may be stored of models that an untrained policy is one and the same with."""


@dataclass
class Sums:
    """Of some items; those of all ranks make one `SelfTest`."""

    loss: float = 0.0
    repeat: float = 0.0
    stored_loss: float = 0.0
    slope: float = 0.0
    base: float = 0.0
    tokens: int = 0
    noise: float = 0.0
    reference_kl: float = 0.0
    gaps: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)


@dataclass
class Moments:
    """Sums over tokens: of how far a stored log-prob d is off, and of the log-prob c itself."""

    n: float = 0.0
    d: float = 0.0
    c: float = 0.0
    dc: float = 0.0
    cc: float = 0.0

    def add(self, other: Moments) -> None:
        """Of more tokens."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def tilt(self, noise: float) -> float:
        """Covariance of d and c over the standard deviation of c, beyond what `noise` per token makes by chance."""
        variance = self.cc / self.n - (self.c / self.n) ** 2
        if not variance > 0:  # all tokens are equally probable
            return 0.0
        slope = abs(self.dc / self.n - self.d * self.c / self.n**2) / math.sqrt(variance)
        return max(0.0, slope - CHANCE * noise / math.sqrt(self.n))


def compare(
    forward: Callable[[Batch], Outputs],
    base: Callable[[Batch], Tensor],
    algorithm: Algorithm,
    micro: Sequence[Sequence[TrainItem]],
    device: torch.device,
    longest: int | None = None,
    *,
    padding_free: bool = False,
) -> Sums:
    """Run the policy as a training step would, and compare.

    Args:
        forward: the policy's forward pass as the loss gets it.
        base: log-probs [B, T] of the base model at the same temperature.
        algorithm: whose loss is computed.
        micro: micro-batches; an empty one only takes part in collectives.
        device: for batches.
        longest: positions that the model has; None: any number.
        padding_free: whether the sequences of a micro-batch share a row. Then it is their order that must not matter, not padding.
    """
    sums = Sums()
    for items in micro:
        batch = collate(items).to(device)
        with torch.no_grad():
            outputs, again, other_BT = forward(batch), forward(batch), base(batch)
            elsewhere_BT = (
                forward(_reversed(batch)).logprobs_BT.flip(0) if padding_free else forward(_padded(batch, longest)).logprobs_BT
            )
        if items:
            _add(sums, batch, outputs, again, other_BT, algorithm)
            sums.noise = _worst([sums.noise, *_gaps(elsewhere_BT, outputs.logprobs_BT, batch)])
    return sums


def combine(parts: Sequence[Sums], items: Sequence[TrainItem], algorithm: Algorithm) -> SelfTest:
    """What all ranks found, of all items."""
    units = step_units(items, algorithm.unit)
    sequences = sum(len(item.sequences) for item in items)
    names = sorted({name for part in parts for name in part.gaps})
    noise = _worst([part.noise for part in parts])
    return SelfTest(
        loss=sum(p.loss for p in parts) / units,
        repeat_kl=sum(p.repeat for p in parts) / sequences,
        stored_loss=sum(p.stored_loss for p in parts) / units,
        stored_loss_slope=sum(p.slope for p in parts) / units,
        stored_gaps={name: _worst([p.gaps[name] for p in parts if name in p.gaps]) for name in names},
        noise=noise,
        stored_tilts={name: _together(parts, name).tilt(noise) for name in names if name != "values"},
        base_gap=sum(p.base for p in parts) / max(1, sum(p.tokens for p in parts)),
        reference_kl=sum(p.reference_kl for p in parts) / max(1, sum(p.tokens for p in parts)),
    )


def _add(sums: Sums, batch: Batch, outputs: Outputs, again: Outputs, other_BT: Tensor, algorithm: Algorithm) -> None:
    mask_BT = batch.mask_BT
    ours_BT = outputs.logprobs_BT
    stored = {f"{name}_BT": ours_BT for name in LOGPROBS}
    own = replace(batch, **stored, values_BT=outputs.values_BT)
    sums.loss += loss_of(algorithm, again, own).total.item()
    sums.repeat += ((again.logprobs_BT - ours_BT) * mask_BT).sum().item()
    sums.base += ((other_BT - ours_BT).abs() * mask_BT).sum().item()
    sums.tokens += int(mask_BT.sum())
    if algorithm.needs.reference_kl and outputs.reference_kl_BT is not None:
        sums.reference_kl += (outputs.reference_kl_BT * mask_BT).sum().item()
    variable_BT = ours_BT.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = loss_of(algorithm, replace(outputs, logprobs_BT=variable_BT), batch).total
    sums.stored_loss += total.item()
    if total.requires_grad:
        sums.slope += torch.autograd.grad(total, variable_BT)[0].abs().sum().item()
    for name, said_BT in (*((name, ours_BT) for name in LOGPROBS), ("values", outputs.values_BT)):
        stored_BT = getattr(batch, f"{name}_BT")
        if stored_BT is None or said_BT is None:
            continue
        scale = max(1.0, stored_BT.abs().max().item()) if name == "values" else 1.0
        sums.gaps[name] = _worst([sums.gaps.get(name, 0.0), *(gap / scale for gap in _gaps(stored_BT, said_BT, batch))])
        d, c = ((stored_BT - said_BT)[mask_BT].double(), said_BT[mask_BT].double())
        made = Moments(n=len(d), d=d.sum().item(), c=c.sum().item(), dc=(d * c).sum().item(), cc=(c * c).sum().item())
        sums.moments.setdefault(name, Moments()).add(made)


def _gaps(one_BT: Tensor, other_BT: Tensor, batch: Batch) -> list[float]:
    """Mean absolute difference per token of each sequence."""
    return (((one_BT - other_BT).abs() * batch.mask_BT).sum(dim=1) / batch.lengths_B.clamp(min=SHORTEST)).tolist()


def _padded(batch: Batch, longest: int | None) -> Batch:
    """The same sequences in a longer batch."""
    room = PADDING if longest is None else min(PADDING, longest - batch.tokens_BS.shape[1])
    return replace(batch, tokens_BS=torch.nn.functional.pad(batch.tokens_BS, (0, max(0, room))))


def _reversed(batch: Batch) -> Batch:
    """The same sequences in the reverse order, as far as a forward pass looks at them."""
    names = ("tokens_BS", "prompt_lengths_B", "lengths_B", "mask_BT")
    return replace(batch, **{name: getattr(batch, name).flip(0) for name in names})


def _together(parts: Sequence[Sums], name: str) -> Moments:
    total = Moments()
    for part in parts:
        if name in part.moments:
            total.add(part.moments[name])
    return total


def _worst(gaps: Sequence[float]) -> float:
    """The largest; NaN if any is, which `max` alone would lose."""
    return max(gaps) if all(gap == gap for gap in gaps) else float("nan")
