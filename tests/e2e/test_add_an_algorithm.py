"""An algorithm costs one file and one golden test, inside the package as well as outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onlinerl.stores.summary import summarise

ROOT = Path(__file__).parents[2]

INSIDE = '''"""IPO: "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.batch import Batch, LossOutput, Outputs
from onlinerl.ops.preference import margin, pair_metrics
from onlinerl.protocols.algorithm import by_knobs


class Ipo(Pairwise):
    """Mean over pairs of (h - 1 / (2 tau))^2."""

    tau: float = Field(0.1, gt=0)

    @by_knobs
    def loss_at_reference(self) -> float:
        """With h = 0."""
        return 1 / (4 * self.tau**2)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs."""
        h_P = margin(outputs, batch)
        loss_P = (h_P - 1 / (2 * self.tau)).square()
        return LossOutput(total=(loss_P * batch.weight_P).sum(), metrics=pair_metrics(outputs, batch, h_P))
'''

GOLDEN = """from __future__ import annotations

import pytest
from algorithm_batches import evaluate, pair, sequence

from onlinerl.algorithms.ipo import Ipo

VARIANTS = [{}, {"tau": 0.5}]
KNOBS = {"tau": [({}, 0.3)]}


def at_reference(items):
    return 25.0


def test_value_by_hand():
    item = pair(sequence(4, reference=-1.0), sequence(2, 50, reference=-2.0))
    assert evaluate(Ipo(tau=0.25), [item], [-0.5, -2.5])[0] == pytest.approx(1.0)  # h = 3 against 2
"""

# The same loss as a package of somebody else has it: nothing of ours that is private, and its class behind a property.
OUTSIDE = '''"""IPO."""
from onlinerl.batch import LossOutput
from onlinerl.ops.pairs import pair_items
from onlinerl.ops.preference import margin, pair_metrics
from onlinerl.protocols.algorithm import Algorithm, Needs


class Ipo(Algorithm):
    """Mean over pairs of (h - 1 / (2 tau))^2."""

    unit = "pair"
    needs = Needs(pairs=True, reference=True, min_samples=2)
    reference = "fixed"

    tau: float = 0.1

    @property
    def loss_at_reference(self):
        return 1 / (4 * self.tau**2)

    def items(self, judged, pairs):
        return pair_items(judged, pairs)

    def loss(self, outputs, batch):
        h = margin(outputs, batch)
        return LossOutput(
            total=((h - 1 / (2 * self.tau)).square() * batch.weight_P).sum(), metrics=pair_metrics(outputs, batch, h)
        )
'''


@pytest.fixture
def package(tmp_path):
    """A package of somebody else that brings an algorithm, as pip would have installed it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/__init__.py").write_text("")
    (tmp_path / "elsewhere/ipo.py").write_text(OUTSIDE)
    installed = tmp_path / "elsewhere-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[onlinerl.algorithms]\nipo = elsewhere.ipo:Ipo\n")
    return tmp_path


def test_from_another_package_by_its_path_and_by_its_name(package, toy_config, warm_cli):
    iterates = []
    for name in ("elsewhere.ipo.Ipo", "ipo"):
        run = f"run-{len(iterates)}"
        config = toy_config(
            package, {"algorithm.name": name, "algorithm.tau": 0.2, "iterations": 1}, name=run, file=f"{run}.yaml"
        )
        done = warm_cli("run", config)
        assert done.returncode == 0, done.message
        assert "self-test: loss 6.25" in done.stdout  # what it declares, and what the loss is
        assert summarise(package / "runs" / run)["algorithm"] == name
        iterates.append(np.load(package / "runs" / run / "exports/0001/logits.npy"))
    assert np.abs(iterates[0]).max() > 0
    np.testing.assert_array_equal(*iterates)


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ('    unit = "pair"\n', "", "elsewhere.ipo:Ipo does not declare `unit`"),
        ("    needs = Needs(", "    def needs(self):\n        return Needs(", "elsewhere.ipo:Ipo does not declare `needs`"),
        ("class Ipo(Algorithm):", "class Ipo:", "elsewhere.ipo:Ipo is no subclass of onlinerl.protocols.algorithm.Algorithm"),
    ],
    ids=["nothing", "a method", "no algorithm"],
)
def test_what_another_package_forgot_is_named(package, toy_config, warm_cli, written, instead, said):
    file = package / "elsewhere/ipo.py"
    assert written in file.read_text()
    file.write_text(file.read_text().replace(written, instead))
    done = warm_cli("check", toy_config(package, {"algorithm.name": "ipo"}))
    assert done.returncode == 2
    assert f"algorithm.name: {said}" in done.stderr
    assert "fix: " in done.stderr


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_inside_the_package_the_contracts_find_it_by_its_name_and_miss_its_golden_test(tmp_path):
    for part in ("onlinerl", "tests/contracts", "tests/unit/algorithms"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "onlinerl/algorithms/ipo.py").write_text(INSIDE)
    contracts = ["tests/contracts/test_algorithms.py", "tests/contracts/test_algorithm_knobs.py"]
    alone = pytest_in(tmp_path, *contracts, "-k", "ipo and (golden or every_knob)")
    assert alone.returncode == 1, alone.stdout + alone.stderr
    assert "ipo has no golden test: write tests/unit/algorithms/test_ipo.py" in alone.stdout
    golden = tmp_path / "tests/unit/algorithms/test_ipo.py"
    golden.write_text(GOLDEN)
    whole = pytest_in(tmp_path, *contracts, str(golden), "-k", "ipo")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert int(whole.stdout.split(" passed")[0].split()[-1]) > 40
