"""A learner's files are read as plain data: what they hold never runs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from onlinerl.algorithms.dpo import Dpo
from onlinerl.errors import LearnerError
from onlinerl.learners._plain import load_generators, save_generators
from onlinerl.learners.toy import ToyLearner


class Bomb:
    """Unpickling it writes a file: it stands for any code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def draw() -> list[object]:
    """From every generator; Gaussians come in pairs, of which the second is kept back."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]


def test_generators_go_on_where_they_were(tmp_path):
    draw()
    save_generators(tmp_path / "rng_0.json")
    first = [draw(), draw()]
    load_generators(tmp_path / "rng_0.json")
    assert [draw(), draw()] == first


def test_generators_of_an_older_version_go_on_where_they_were(tmp_path):
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": []}
    torch.save(state, tmp_path / "rng_0.pt")
    first = draw()
    load_generators(tmp_path / "rng_0.json")
    assert draw() == first


def test_nothing_runs_from_an_older_file(tmp_path):
    torch.save({"python": Bomb(tmp_path / "ran")}, tmp_path / "rng_0.pt")
    with pytest.raises(LearnerError, match=r"rng_0\.pt holds something else than tensors and is not loaded"):
        load_generators(tmp_path / "rng_0.json")
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_from_a_checkpoint_of_the_toy_learner(tmp_path):
    learner = ToyLearner(8, Dpo(), "base")
    assert learner.save(tmp_path) == {"toy.pt": (tmp_path / "toy.pt").stat().st_size}
    learner.load(tmp_path)
    torch.save({"logits": Bomb(tmp_path / "ran")}, tmp_path / "toy.pt")
    with pytest.raises(LearnerError, match=r"toy\.pt holds something else"):
        learner.load(tmp_path)
    assert not (tmp_path / "ran").exists()
