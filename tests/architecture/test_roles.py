"""What a part needs is said by its class: nothing asks which one was chosen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from onlinerl import registry
from onlinerl.config.roles import ROLES

ROOT = Path(__file__).parents[2]
NAMES = {name for role in ROLES.values() for name in registry.names(role.folder)}


def asked(source: str) -> list[str]:
    """Comparisons of something called `name` with the name of an implementation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            constants = {
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
            named = any(
                (isinstance(each, ast.Attribute) and each.attr == "name")
                or (isinstance(each, ast.Constant) and each.value == "name")
                for each in ast.walk(node)
            )
            if named and constants & NAMES:
                found.append(ast.unparse(node))
    return found


def test_nothing_asks_which_implementation_was_chosen():
    files = list((ROOT / "onlinerl").rglob("*.py"))
    assert len(files) > 100
    assert {str(file): said for file in files if (said := asked(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        'if config.engine.name == "toy": ...',
        'if config.learner.name != "deepspeed": ...',
        'if (config.engine.name, config.learner.name) in (("vllm", "deepspeed"),): ...',
        'if config.oracle["name"] == "sentiment": ...',
    ],
)
def test_a_question_would_be_noticed(line):
    assert asked(line)
