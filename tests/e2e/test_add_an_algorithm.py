"""An algorithm costs one file and one golden test, inside the package as well as outside of it: docs/add-an-algorithm.md as printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import numpy as np
import pytest

from onlinerl.stores.summary import summarise

ROOT = Path(__file__).parents[2]

FILES = documents.files(ROOT / "docs/add-an-algorithm.md")


@pytest.fixture
def package(tmp_path):
    """A package of somebody else that brings an algorithm, as pip would have installed it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/__init__.py").write_text("")
    (tmp_path / "elsewhere/squared_hinge.py").write_text(FILES["elsewhere/squared_hinge.py"])
    documents.install(FILES["pyproject.toml"], tmp_path)
    return tmp_path


def test_from_another_package_by_its_path_and_by_its_name(package, toy_config, warm_cli):
    iterates = []
    for name in ("elsewhere.squared_hinge.SquaredHinge", "squared_hinge"):
        run = f"run-{len(iterates)}"
        config = toy_config(
            package, {"algorithm.name": name, "algorithm.target": 2.5, "iterations": 1}, name=run, file=f"{run}.yaml"
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
        ('    unit = "pair"\n', "", "elsewhere.squared_hinge:SquaredHinge does not declare `unit`"),
        (
            "    needs = Needs(",
            "    def needs(self):\n        return Needs(",
            "elsewhere.squared_hinge:SquaredHinge does not declare `needs`",
        ),
        (
            "class SquaredHinge(Algorithm):",
            "class SquaredHinge:",
            "elsewhere.squared_hinge:SquaredHinge is no subclass of onlinerl.protocols.algorithm.Algorithm",
        ),
    ],
    ids=["nothing", "a method", "no algorithm"],
)
def test_what_another_package_forgot_is_named(package, toy_config, warm_cli, written, instead, said):
    file = package / "elsewhere/squared_hinge.py"
    assert written in file.read_text()
    file.write_text(file.read_text().replace(written, instead))
    done = warm_cli("check", toy_config(package, {"algorithm.name": "squared_hinge"}))
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
    (tmp_path / "onlinerl/algorithms/squared_hinge.py").write_text(FILES["onlinerl/algorithms/squared_hinge.py"])
    printed = [block for block in documents.blocks(ROOT / "docs/add-an-algorithm.md") if block.language == "sh"]
    contracts = printed[-1].text.split()[3:5]
    alone = pytest_in(tmp_path, *contracts, "-k", "squared_hinge and (golden or every_knob)")
    assert alone.returncode == 1, alone.stdout + alone.stderr
    assert "squared_hinge has no golden test: write tests/unit/algorithms/test_squared_hinge.py" in alone.stdout
    golden = tmp_path / "tests/unit/algorithms/test_squared_hinge.py"
    golden.write_text(FILES["tests/unit/algorithms/test_squared_hinge.py"])
    whole = pytest_in(tmp_path, *contracts, str(golden), "-k", "squared_hinge")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert int(whole.stdout.split(" passed")[0].split()[-1]) > 40
