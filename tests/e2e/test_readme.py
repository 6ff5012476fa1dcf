"""The README's code runs as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from onlinerl import config as configuration
from onlinerl import registry
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Prompt, Query, Verdict

README = Path(__file__).parents[2] / "README.md"
BLOCKS = dict(re.findall(r"```python\n# file: (\S+)\n(.*?)```", README.read_text(), flags=re.DOTALL))
QUERY = Query(prompt=Prompt(id="p", text="It was", token_ids=(1,)), responses=(" good good", " long and bad", " so"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_all_blocks_are_covered():
    assert set(BLOCKS) == {"brevity.py", "wordcount.py", "shorter.py", "slic.py"}


def test_oracle_function(files):
    oracle = configuration.component({"name": "python", "function": "brevity.judge"}, "oracle", "oracles", configuration.Oracle)
    oracle.open()
    [verdict] = oracle.judge([QUERY])
    assert isinstance(verdict, Verdict)
    assert verdict.scores == (-10.0, -13.0, -3.0)


def test_oracle_class(files):
    spec = {"name": "wordcount.WordCount", "word": "bad"}
    oracle = configuration.component(spec, "oracle", "oracles", configuration.Oracle)
    [verdict] = oracle.judge([QUERY])
    assert verdict.scores == (0.0, 1.0, 0.0)
    assert oracle.version == "wordcount-bad"


def test_oracle_that_compares(files):
    oracle = configuration.component({"name": "shorter.Shorter"}, "oracle", "oracles", configuration.Oracle)
    [verdict] = oracle.ask([QUERY])
    assert isinstance(verdict, Verdict), verdict
    assert [row[2] for row in verdict.preferences[:2]] == [0.0, 0.0]
    assert verdict.preferences[0][1] == 1.0


def test_algorithm_trains_the_toy(files):
    import numpy as np
    import torch

    from onlinerl.learners.toy import ToyLearner
    from onlinerl.types import TrainItem, TrainSequence

    slic = registry.load("algorithms", "slic.Slic")(beta=0.5)
    assert isinstance(slic, Algorithm)
    learner = ToyLearner(4, slic, base="base")
    reference = np.full(2, np.log(1 / 4), dtype=np.float32)
    chosen = TrainSequence(prompt_ids=(0,), response_ids=(1, 1), reference=reference)
    rejected = TrainSequence(prompt_ids=(0,), response_ids=(2, 2), reference=reference)
    item = TrainItem(prompt_id="p", sequences=(chosen, rejected))
    losses = [report.metrics[0]["loss"] for report in learner.update([[item]] * 20, [0.1] * 20)]
    assert losses[0] == pytest.approx(1.0)  # the hinge at margin 0
    assert losses[-1] < 0.2
    with torch.no_grad():
        assert learner.logits[1] > learner.logits[2]
