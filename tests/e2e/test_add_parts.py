"""An engine, a learner, a source of prompts, a selector and a tracker of a package of the user's own: the project is not touched."""

from __future__ import annotations

import json

import yaml

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

PARTS = '''
import numpy as np
from pydantic import Field

from onlinerl.engines.toy import ToyEngine
from onlinerl.learners.toy import ToyLearner, ToySync
from onlinerl.protocols.engine import InProcessEngine
from onlinerl.protocols.learner import InProcessLearner
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.protocols.selection import Selector
from onlinerl.protocols.tracker import Tracker, TrackerConfig
from onlinerl.types import RawPrompt, Selected


class Engine(InProcessEngine):
    """Samples what it likes."""

    end: float = 0.5

    def open(self, vocabulary, decode):
        engine = ToyEngine(vocabulary, decode)
        engine.load(np.eye(vocabulary)[-1] * self.end, 0)
        return engine


class Learner(InProcessLearner):
    """Starts where the engine starts."""

    start: float = 0.5

    def open(self, vocabulary, algorithm, base, temperature):
        return ToyLearner(vocabulary, algorithm, base, temperature)

    def connect(self, learner, engine):
        return ToySync(lambda: learner.logits.detach().numpy(), engine.load, lambda: engine.logits)


class Sequels(PromptsConfig):
    """Films by number."""

    first: int = 1

    def raw(self, which):
        names = [f"{getattr(self, which)} {n}" for n in range(self.first, self.first + 20)]
        return [RawPrompt(id=name, text=name) for name in names]


class Newest(Selector):
    """The films with the highest numbers."""

    above: int = 0

    def select(self, pool):
        left = sorted((p for p in pool.open if int(p.id.split()[-1]) > self.above), key=lambda p: -int(p.id.split()[-1]))
        return [Selected(prompt_id=p.id, probability=1.0, reason="new") for p in left[: pool.most]]


class Listed(TrackerConfig):
    """Writes the phases down."""

    file: str = Field(min_length=1)

    def open(self, run):
        return Phases(run.directory / self.file)


class Phases(Tracker):
    def __init__(self, path):
        self.path = path

    def phase_finished(self, iteration, phase, seconds):
        with self.path.open("a") as file:
            file.write(f"{iteration} {phase}\\n")
'''


def test_an_engine_a_learner_prompts_a_selector_and_a_tracker_of_the_users_own(toy_config, warm_cli, tmp_path):
    (tmp_path / "mine.py").write_text(PARTS)
    keys = {
        "iterations": 1,
        "engine.name": "mine.Engine",
        "engine.end": 0.25,
        "learner.name": "mine.Learner",
        "prompts.name": "mine.Sequels",
        "prompts.train": "the film",
        "prompts.heldout": "a film",
        "prompts.first": 3,
        "selection.name": "mine.Newest",
        "selection.above": 5,
        "metrics.trackers": [{"name": "mine.Listed", "file": "phases.txt"}],
        "metrics.prometheus": False,
    }
    config = toy_config(tmp_path, keys)

    done = warm_cli("run", config)
    assert done.returncode == 0, done.message
    run = tmp_path / "runs" / "toy"
    assert len(summarise(run)["iterations"]) == 2
    with RunDirectory.open(run) as store:
        assert {group["prompt_id"] for group in store.read(1, "rollouts")} == {f"the film {n}" for n in range(15, 23)}
    assert "1 train" in (run / "phases.txt").read_text().splitlines()
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["engine"]["name"], stored["engine"]["end"]) == ("mine.Engine", 0.25)
    assert stored["metrics"]["trackers"] == [{"name": "mine.Listed", "file": "phases.txt"}]
    assert json.loads((run / "manifest.json").read_text())["fingerprint"]["engine.end"] == 0.25

    changed = warm_cli("resume", run, "iterations=2", "engine.end=0.5")
    assert changed.returncode == 2
    assert "engine.end" in changed.stderr
    resumed = warm_cli("resume", run, "iterations=2")
    assert resumed.returncode == 0, resumed.message

    for wrong, said in (
        ("engine.ende=1", "did you mean 'end'?"),
        ("prompts.firs=1", "did you mean 'first'?"),
        ("selection.abov=1", "did you mean 'above'?"),
        ("metrics.trackers=[{name: mine.Listed, file: x, fil: y}]", "did you mean 'file'?"),
        ("metrics.trackers=[{name: mine.Engine}]", "mine.Engine is no subclass of onlinerl.protocols.tracker.TrackerConfig"),
    ):
        refused = warm_cli("check", config, "name=other", wrong)
        assert refused.returncode == 2
        assert said in refused.stderr, refused.message
