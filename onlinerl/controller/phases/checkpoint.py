"""Everything that resume needs, and the policy for everyone else."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration
from onlinerl.types import PhaseRecord


def checkpoint(it: Iteration) -> PhaseRecord:
    """Write export and checkpoint of this iterate."""
    it.require_free()
    with it.parts.store.staged("exports", it.number) as path:
        it.parts.learner.export(path)
    it.save("checkpoints")
    return {}
