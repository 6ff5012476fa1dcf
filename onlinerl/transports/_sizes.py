"""How large tensors are on the wire."""

from __future__ import annotations

from math import prod

from onlinerl.protocols.learner import TensorMeta


def nbytes(meta: TensorMeta) -> int:
    """Size of one tensor on the wire."""
    return prod(meta.shape) * meta.dtype.itemsize
