"""Push the learner's weights into every replica and prove that they arrived."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration
from onlinerl.types import SyncRecord


def sync(it: Iteration) -> SyncRecord:
    """Push this iterate."""
    it.parts.tracker.phase_started(it.number, "sync", None, "")
    report = it.push()
    it.report.synced(it.number, report)
    return {
        "seconds": report.seconds,
        "bytes": report.bytes,
        "proved": report.proved,
        "backend": report.backend,
        "replicas": report.replicas,
        "tensors_checked": report.tensors_checked,
        "canary_nats": report.canary_nats,
        "parts": dict(report.phases),
    }
