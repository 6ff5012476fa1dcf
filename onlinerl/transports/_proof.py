"""Proof of delivery: versions, checksums of sampled tensors, and a canary.

Three independent witnesses, because each has a blind spot: a version is only a label, a checksum is taken where the tensor is
handed to the model's loader, a canary sees what the engine computes but not small differences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onlinerl.errors import SyncError


def digest(tensor: Tensor) -> str:
    """SHA-256 over the tensor's bytes, in order."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def rotation(names: Sequence[str], count: int, version: int, everything: bool) -> list[str]:
    """Which tensors to check at this version: all of them, or a window that moves on with every push."""
    if everything or count >= len(names):
        return list(names)
    start = version * count % len(names)
    return [names[(start + i) % len(names)] for i in range(count)]


def check_version(expected: int, reported: Sequence[str], replicas: Sequence[str]) -> None:
    """Every replica must say that it holds the version just pushed.

    Raises:
        SyncError: naming the replicas that do not.
    """
    stale = [f"{name} holds {got!r}" for name, got in zip(replicas, reported, strict=True) if got != str(expected)]
    if stale:
        raise SyncError(
            f"version {expected} was pushed, but {'; '.join(stale)}",
            field="sync",
            fix="the push did not reach it: look at the replica's log; `onlinerl resume` starts fresh replicas",
        )


def check_digests(sent: Mapping[str, str], received: Sequence[Mapping[str, str]], replicas: Sequence[str]) -> None:
    """Every replica must have been handed exactly the learner's bytes.

    Raises:
        SyncError: naming replica and first tensors that differ.
    """
    for replica, got in zip(replicas, received, strict=True):
        wrong = [name for name, value in sent.items() if got.get(name) != value]
        if wrong:
            what = ", ".join(f"{name} ({'missing' if name not in got else 'different'})" for name in wrong[:3])
            raise SyncError(
                f"{replica}: {len(wrong)} of {len(sent)} checked tensors are not what the learner holds: {what}",
                field="sync",
                fix="the weights were lost or changed on the way; `onlinerl resume` sends them again to fresh replicas",
            )


def check_canary(
    learner: Sequence[np.ndarray], engines: Sequence[Sequence[np.ndarray]], replicas: Sequence[str], tolerance: float
) -> float:
    """Learner and every replica must give the canary tokens nearly the same log-probs.

    Returns:
        The largest mean |difference| over replicas, in nats.

    Raises:
        SyncError: if a replica is further off than `tolerance`, or reports a non-finite number.
    """
    worst = 0.0
    ours = np.concatenate([np.asarray(x, dtype=np.float64) for x in learner])
    for replica, sequences in zip(replicas, engines, strict=True):
        theirs = np.concatenate([np.asarray(x, dtype=np.float64) for x in sequences])
        gap = float(np.abs(ours - theirs).mean()) if ours.shape == theirs.shape else float("nan")
        if not gap <= tolerance:
            raise SyncError(
                f"{replica}: canary log-probs are {gap:.4f} nats per token away from the learner's (limit {tolerance})",
                field="sync.canary_tolerance_nats",
                fix="the replica does not compute with the weights it was sent; raise the limit only if the engine's dtype explains it",
            )
        worst = max(worst, gap)
    return worst
