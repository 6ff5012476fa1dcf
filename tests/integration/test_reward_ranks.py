"""Reward models on several real ranks: the same model as on one, and exactly resumable."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from preference_rows import taste, write_config
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from onlinerl.config import reward_model as configuration
from onlinerl.learners._group import RankGroup
from onlinerl.reward_training import running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LEARNERS = {
    "torch": {"name": "torch", "ranks": 2},
    "zero 1": {"name": "deepspeed", "ranks": 2, "zero_stage": 1},
    "zero 3": {"name": "deepspeed", "ranks": 2, "zero_stage": 3},
    "deepspeed alone": {"name": "deepspeed", "ranks": 1, "zero_stage": 0},
}


def trained(path: Path) -> dict[str, np.ndarray]:
    """The weights of the model that a configuration makes."""
    model = running.run(configuration.load(path), Console(file=io.StringIO()))
    return {
        name: tensor.numpy() for name, tensor in AutoModelForSequenceClassification.from_pretrained(model).state_dict().items()
    }


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    """What one rank of the torch learner in this process makes."""
    return trained(write_config(tmp_path_factory.mktemp("alone"), tiny_model, taste(60)))


@pytest.mark.parametrize("learner", LEARNERS)
def test_ranks_make_the_same_model(tiny_model, tmp_path, alone, learner):
    """Sums over ranks are rounded in another order, and Adam makes much of what is almost 0: so to a step's size."""
    path = write_config(tmp_path, tiny_model, taste(60), learner={**LEARNERS[learner], "cpus": 0})
    found = trained(path)
    assert set(found) == set(alone)
    for name, weight in found.items():
        assert np.abs(weight - alone[name]).mean() < 3e-4, name


@pytest.mark.parametrize("learner", [pytest.param("torch", marks=pytest.mark.long), "zero 3"])
def test_stopped_and_called_again_it_is_the_same_model(tiny_model, tmp_path, monkeypatch, learner):
    keys = {**LEARNERS[learner], "cpus": 0}
    whole = trained(write_config(tmp_path / "whole", tiny_model, taste(60), learner=keys))
    path, real, taken = write_config(tmp_path / "stopped", tiny_model, taste(60), learner=keys), RankGroup.update, []

    def update(self, *args, **more):
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        yield from real(self, *args, **more)

    monkeypatch.setattr(RankGroup, "update", update)
    with pytest.raises(KeyboardInterrupt):
        trained(path)
    monkeypatch.undo()
    found = trained(path)
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, whole[name], err_msg=name)
