"""The only loop: start every phase whose inputs are there and whose parts are free (see `onlinerl.graph`).

Each phase runs in a thread of its own and ends in a record on disk. A crash anywhere resumes at the first unfinished phases; inside
most of them every answer is on disk as soon as it is there, so that nothing is generated or labelled twice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

from onlinerl import graph
from onlinerl.controller import phases, start
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import Parts
from onlinerl.controller.report import Reporter
from onlinerl.graph import Task
from onlinerl.types import PhaseRecord

PATIENCE_S = 5.0
"""How long phases have to end by themselves when the run is stopped; after that nobody listens to them."""


def run(parts: Parts, attempt: int = 0) -> int:
    """Run every iteration that is not finished; returns how many these were. Raises the error of the boundary that failed first."""
    loop = _Loop(parts, attempt)
    try:
        return loop.run()
    finally:
        loop.end()


class _Loop:
    """Which phases are done and which are running."""

    def __init__(self, parts: Parts, attempt: int) -> None:
        self.parts, self.report = parts, Reporter.of(parts, attempt)
        self.done = start.finished(parts)
        self.stop = threading.Event()
        self.iterations: dict[int, Iteration] = {}
        self.running: dict[Task, threading.Thread] = {}
        self.ended: queue.SimpleQueue[tuple[Task, PhaseRecord | BaseException]] = queue.SimpleQueue()

    def run(self) -> int:
        left = self.unfinished()
        self.weights = start.restore(self.parts, self.done, self.report)
        while self.unfinished():
            while task := next(self.ready(), None):
                self.begin(task)
            graph.require_running(self.running, self.unfinished())
            task, result = self.ended.get()
            del self.running[task]
            if isinstance(result, BaseException):
                raise result
            self.finish(task, result)
        return len(left)

    def unfinished(self) -> list[int]:
        return [t for t, done in self.done.items() if "commit" not in done]

    def ready(self) -> Iterator[Task]:
        now = self.unfinished()[: graph.IN_FLIGHT]
        return graph.ready(self.parts.phases, now, self.done, self.running, shared_hardware=self.parts.shared_hardware)

    def begin(self, task: Task) -> None:
        t, name = task
        if t not in self.iterations:
            self.iterations[t] = Iteration(self.parts, t, self.weights, self.report, self.stop)
        work = threading.Thread(target=self.work, args=(task, self.iterations[t]), name=f"{name} {t}", daemon=True)
        self.running[task] = work
        work.start()

    def work(self, task: Task, it: Iteration) -> None:
        began, since = time.time(), time.monotonic()  # the clock of the machine may be set meanwhile
        try:
            record = phases.function(self.parts.phases, task[1])(it)
            busy = (took := time.monotonic() - since) - record.get("waited", 0.0)
            self.ended.put((task, {"seconds": busy, "began": began, "ended": began + took, **record}))
        except BaseException as error:  # noqa: BLE001  (raised again in the thread of the loop)
            self.ended.put((task, error))

    def finish(self, task: Task, record: PhaseRecord) -> None:
        t, name = task
        self.parts.store.finish_phase(t, name, record)
        self.done[t].add(name)
        self.iterations[t].finished(name)
        self.parts.tracker.phase_finished(t, name, record["seconds"])
        self.report.phase(t, name, record["seconds"])
        if name == "commit":
            self.iterations.pop(t).check_idle()

    def end(self) -> None:
        self.stop.set()
        deadline = time.monotonic() + PATIENCE_S
        for thread in self.running.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for it in self.iterations.values():
            it.files.close()
