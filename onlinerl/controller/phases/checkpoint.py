"""Everything that resume needs, the policy for everyone else, and the average that the reference is, where it is one."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration
from onlinerl.types import PhaseRecord


def checkpoint(it: Iteration) -> PhaseRecord:
    """Write export and checkpoint of this iterate, and the reference that takes it in."""
    it.require_free()
    with it.parts.store.staged("exports", it.number) as path:
        it.parts.learner.export(path)
    if it.averaged and it.reference(it.number + 1) == it.number:
        assert it.reference_path is not None
        with it.parts.store.staged("references", it.number) as path:
            it.parts.learner.average(it.reference_path, it.parts.config.reference.mixup_alpha, path)
    it.save("checkpoints")
    return {}
