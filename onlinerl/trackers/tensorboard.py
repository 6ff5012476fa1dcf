"""Scalars for TensorBoard, written with its own event writer: neither TensorFlow nor torch is needed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path

from onlinerl.errors import ConfigError
from onlinerl.protocols.tracker import Tracked, Tracker, TrackerConfig
from onlinerl.types import Metric

__all__ = ["Tensorboard", "TensorboardTracker"]


class Tensorboard(TrackerConfig):
    """A folder `tensorboard` in the run directory."""

    name: str = "tensorboard"

    def check(self) -> None:
        """The package is an extra."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "TensorBoard is not installed",
                field="metrics.tensorboard",
                fix="pip install 'onlinerl[tensorboard]', or set metrics.tensorboard=false",
            )

    def open(self, run: Tracked) -> TensorboardTracker:
        """Begin a file of events."""
        return TensorboardTracker(run.directory / "tensorboard")


class TensorboardTracker(Tracker):
    """One scalar per metric and labels, over iterations; a metric with a label `step` is drawn over that instead.

    Confidence bounds are written beside the value as `<name>/low` and `<name>/high`.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f"TensorBoard cannot be imported: {error}",
                field="metrics.tensorboard",
                fix="pip install 'onlinerl[tensorboard]', or set metrics.tensorboard=false",
            ) from error
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory))

    def log(self, metrics: Iterable[Metric]) -> None:
        """Write one event per metric."""
        for metric in metrics:
            labels = dict(metric.labels)
            step = int(labels.pop("step", metric.iteration))
            tag = "/".join((metric.name, *(f"{k}={v}" for k, v in sorted(labels.items()))))
            values = {tag: metric.value, f"{tag}/low": metric.ci_low, f"{tag}/high": metric.ci_high}
            summary = self._summary(
                value=[self._summary.Value(tag=t, simple_value=float(v)) for t, v in values.items() if v is not None]
            )
            self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Let viewers see what was written."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close. May be called twice."""
        self._writer.close()
