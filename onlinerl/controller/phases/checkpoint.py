"""Everything that resume needs, the policy for everyone else, and the average that the reference is, where it is one."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration
from onlinerl.types import PhaseRecord


def checkpoint(it: Iteration) -> PhaseRecord:
    """Write export and checkpoint of this iterate, and the reference that takes it in."""
    config, store, learner = it.parts.config, it.parts.store, it.parts.learner
    store.require_free(it.parts.state_bytes, int(config.checkpoints.min_free_gib * 2**30))
    with store.staged("exports", it.number) as path:
        learner.export(path)
    if it.averaged and it.reference(it.number + 1) == it.number:
        assert it.reference_path is not None
        with store.staged("references", it.number) as path:
            learner.average(it.reference_path, config.reference.mixup_alpha, path)
    with store.staged("checkpoints", it.number) as path:
        store.require_files(path, learner.save(path))
    return {}
