"""An algorithm is one file: it pulls in little, and nothing outside of it knows that it is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onlinerl import registry
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm

ROOT = Path(__file__).parents[2]
NAMES = registry.names("algorithms")

LIMIT = 740
"""Lines of our own that importing an algorithm may run through beside its own file, blank ones and comments included. What it needs only to make
items of labels, or only where a knob says so, it imports when it does."""
DPO = 700
"""And dpo with its own."""
FAMILY = 260
"""As many more where a loss is on lists, whole steps or how responses fare against each other: what such losses share."""
MORE = 160
"""As many more where there is a critic, several scores with multipliers, responses beside the policy's samples, or a price of the KL in the
reward."""
VARIANT = 280
"""As many more where an algorithm is another one with something added, whose file it then runs through too, or wraps one."""

# In one interpreter, because torch takes longer to import than all of ours.
COUNT = """
import importlib, json, pathlib, sys
found = {}
for name in sys.argv[1:]:
    for module in [m for m in sys.modules if m.partition(".")[0] == "onlinerl"]:
        del sys.modules[module]
    importlib.import_module(f"onlinerl.algorithms.{name}")
    files = {m: v.__file__ for m, v in sys.modules.items() if m.partition(".")[0] == "onlinerl"}
    found[name] = {m: len(pathlib.Path(file).read_text().splitlines()) for m, file in files.items()}
print(json.dumps(found))
"""


def lines(*names: str, root: Path = ROOT) -> dict[str, dict[str, int]]:
    """By algorithm, the modules of ours that importing it imports, and their lengths."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *names], capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    return lines(*NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_loss_pulls_in_little(counted, name):
    algorithm = registry.load("algorithms", name, Algorithm)()
    needs, knobs = algorithm.needs, set(type(algorithm).model_fields)
    bases = {base.__module__.rpartition(".")[2] for base in type(algorithm).__mro__[1:]}
    allowances = (
        (FAMILY, isinstance(algorithm, WholeStep) or algorithm.unit == "list"),
        (MORE, needs.critic or needs.components or needs.beside_samples or "kl_clip" in knobs),
        (VARIANT, bases & set(NAMES) or "base" in knobs),
    )
    pulled = {module: lines for module, lines in counted[name].items() if module != f"onlinerl.algorithms.{name}"}
    limit = LIMIT + sum(more for more, holds in allowances if holds)
    assert sum(pulled.values()) <= limit, dict(sorted(pulled.items(), key=lambda each: -each[1]))


def test_importing_dpo_pulls_in_no_more_than_is_promised(counted):
    assert sum(counted["dpo"].values()) <= DPO


def test_what_a_loss_does_not_need_would_be_noticed(tmp_path):
    """The fault that the limit is there for."""
    shutil.copytree(ROOT / "onlinerl", tmp_path / "onlinerl", ignore=shutil.ignore_patterns("__pycache__", "data"))
    with (tmp_path / "onlinerl/algorithms/dpo.py").open("a") as file:
        file.write("\nfrom onlinerl import config\n")
    pulled = lines("dpo", root=tmp_path)["dpo"]
    assert "onlinerl.config" in pulled
    assert sum(pulled.values()) > LIMIT


def named(source: str) -> set[str]:
    """What a module says of algorithms: their names as text, and imports of their files."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            found.add(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onlinerl.algorithms"):
            found.add(node.module)
    return found


def looked_for(source: str) -> list[str]:
    """Attributes of algorithms that are looked for by name instead of being declared."""
    return re.findall(r"\b(?:getattr|hasattr)\(\s*[\w.]*(?:algorithm|needs)\b", source)


def test_nothing_but_itself_names_an_algorithm_or_looks_for_its_attributes():
    others = [file for file in (ROOT / "onlinerl").rglob("*.py") if file.parent.name != "algorithms"]
    assert len(others) > 50
    for file in others:
        source = file.read_text()
        assert named(source) == set(), file
        assert looked_for(source) == [], file


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('if name == "ppo": ...', {"ppo"}),
        ("from onlinerl.algorithms.dpo import Dpo", {"onlinerl.algorithms.dpo"}),
        ('critic = getattr(self.algorithm, "critic", None)', 1),
    ],
)
def test_a_name_and_a_look_would_be_noticed(line, found):
    assert found in (named(line), len(looked_for(line)))
