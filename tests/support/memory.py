"""How much memory tensors take at the highest."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """What torch's allocator on CPU has handed out during `work` at the highest, above what was there before it.

    Each single allocation counts, those inside of an operation too. Freeing what was there before counts as less than nothing.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest
