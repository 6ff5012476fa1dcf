"""When which part worked."""

from __future__ import annotations

import json

import pytest

from onlinerl.stores.directory import RunDirectory
from onlinerl.views import timeline


@pytest.fixture
def run(tmp_path):
    """Engine 0 to 10, oracle 2 to 12 of which it waited 4, learner 12 to 20; then nothing for an hour; then the engine alone."""
    manifest = {"name": "demo", "config_digest": "x", "fingerprint": {"algorithm.name": "dpo"}}
    with RunDirectory.create(tmp_path / "demo", config_yaml="", manifest=manifest) as run:
        run.finish_phase(1, "sample", {"seconds": 10.0, "began": 1000.0, "ended": 1010.0})
        run.finish_phase(1, "label", {"seconds": 10.0, "began": 1002.0, "ended": 1012.0, "waited": 4.0})
        run.finish_phase(1, "train", {"seconds": 8.0, "began": 1012.0, "ended": 1020.0})
        run.finish_phase(1, "commit", {"seconds": 0.0, "began": 1020.0, "ended": 1020.0})
        run.finish_phase(2, "sample", {"seconds": 10.0, "began": 4620.0, "ended": 4630.0})
        run.finish_phase(2, "label", {"seconds": 1.0})  # of an older version
    return run.path


def test_idle_shares_leave_out_the_time_in_which_nothing_ran(run):
    assert timeline.idle(timeline.spans(run)) == pytest.approx(
        {"engine": 1 - 20 / 30, "oracle": 1 - 6 / 30, "learner": 1 - 8 / 30}
    )
    assert timeline.idle([]) == {}


def test_phases_stand_in_the_order_in_which_they_began(run):
    spans = timeline.spans(run)
    assert [(s.iteration, s.phase) for s in spans] == [(1, "sample"), (1, "label"), (1, "train"), (1, "commit"), (2, "sample")]
    first, second, *_, last = timeline.text(spans[:4])[1:]
    assert first.split() == ["1", "sample", "0.0", "10.0", "|" + "#" * 24, "|", "engine"]
    assert second.index("#") - first.index("#") == 4, "2 of 20 seconds later"
    assert last == "learner: idle 60% of the time"
    assert timeline.text([]) == ["nothing is recorded yet"]


def test_a_chrome_trace_has_a_row_per_part(run):
    events = json.loads(json.dumps(timeline.chrome_trace(timeline.spans(run))))["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    slices = [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices[:3] == [("engine", "sample 1", 0, 10e6), ("oracle", "label 1", 2e6, 10e6), ("learner", "train 1", 12e6, 8e6)]
    assert slices[3][0] == "controller"
