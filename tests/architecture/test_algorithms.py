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

LIMIT = 875
"""Lines of our own that importing an algorithm may run through, blank ones and comments included, its own file among them. Half of them are
the three files that say what can be declared and read: protocols/algorithm.py, batch.py, types/training.py."""
FAMILY = 221
"""As many more where a loss is on pairs, lists, whole steps or how responses fare against each other: what such losses share."""
MODIFIERS = 217
"""As many more where pairs may be filtered and a KL be measured beside them."""
CRITIC = 320
"""As many more where there is a critic: what it begins as, rewards per token, advantages from values, a loss of its own."""
WRAPPER = 310
"""As many more where a loss wraps others, which are chosen by name: one of the whole step, or with goals in prompts, around losses on pairs."""
MULTIPLIERS = 313
"""As many more where a loss wraps those of another family and weighs several scores: how they are combined, where multipliers begin, and their
steps."""
OFF_POLICY = 125
"""As many more where responses of other policies are weighed by how probable they are, within bounds, and a KL of whole responses may have a
price."""
PAID = 44
"""As many more where the KL may be paid inside the reward: what of it, and of the score, is cut off."""
VARIANT = 120
"""As many more where an algorithm is another one with something added, whose file it then runs through too."""

OTHERS = 80
"""As many more where responses beside the policy's samples are asked for: what they are for, and their place among the items."""

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
    needs, family = algorithm.needs, isinstance(algorithm, WholeStep) or algorithm.unit == "list"
    bases = {base.__module__.rpartition(".")[2] for base in type(algorithm).__mro__[1:]}
    allowances = (
        (FAMILY, needs.pairs or needs.preferences or family),
        (MODIFIERS, "_modified" in bases),
        (CRITIC, needs.critic),
        (WRAPPER, "base" in type(algorithm).model_fields and "multiplier_lr" not in type(algorithm).model_fields),
        (MULTIPLIERS, "multiplier_lr" in type(algorithm).model_fields),
        (OFF_POLICY, needs.off_policy == "corrected"),
        (PAID, "kl_clip" in type(algorithm).model_fields),
        (OTHERS, needs.beside_samples),
        (VARIANT, bases & set(NAMES)),
    )
    limit = LIMIT + sum(more for more, holds in allowances if holds)
    assert sum(counted[name].values()) <= limit, dict(sorted(counted[name].items(), key=lambda each: -each[1]))


def test_what_a_loss_does_not_need_would_be_noticed(tmp_path):
    """The fault that the limit is there for."""
    shutil.copytree(ROOT / "onlinerl", tmp_path / "onlinerl", ignore=shutil.ignore_patterns("__pycache__", "data"))
    with (tmp_path / "onlinerl/algorithms/dpo.py").open("a") as file:
        file.write("\nfrom onlinerl import config\n")
    pulled = lines("dpo", root=tmp_path)["dpo"]
    assert "onlinerl.config" in pulled
    assert sum(pulled.values()) > LIMIT + FAMILY


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
