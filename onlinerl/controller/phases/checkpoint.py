"""Everything that resume needs, and the policy for everyone else."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration
from onlinerl.types import PhaseRecord


def checkpoint(it: Iteration) -> PhaseRecord:
    """Write export and checkpoint of this iterate."""
    config, store, learner = it.parts.config, it.parts.store, it.parts.learner
    store.require_free(it.parts.state_bytes, int(config.checkpoints.min_free_gib * 2**30))
    with store.staged("exports", it.number) as path:
        learner.export(path)
    with store.staged("checkpoints", it.number) as path:
        store.require_files(path, learner.save(path))
    return {}
