"""docs/guarantees.md: every guarantee names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import documents
import pytest

TABLE = documents.ROOT / "docs/guarantees.md"


def rows(text: str) -> list[tuple[str, str]]:
    """Each guarantee and what stands beside it."""
    found = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")
    ]
    return [(row[0], row[-1]) for row in found if row[0] != "guarantee"]


def missing(guarantee: str, shown: str, root: Path) -> list[str]:
    """What is wrong with a row."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown)
    problems = [] if named else [f"no test shows: {guarantee}"]
    for file, test in named:
        source = (root / file).read_text() if (root / file).is_file() else ""
        functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        if test not in functions:
            problems.append(f"{file} has no {test}")
    return problems


def test_every_guarantee_has_a_test_that_is_there():
    table = rows(TABLE.read_text())
    assert len(table) > 40
    problems = [problem for row in table for problem in missing(*row, documents.ROOT)]
    assert problems == []


def test_nothing_else_is_in_the_column_of_tests():
    for guarantee, shown in rows(TABLE.read_text()):
        assert re.fullmatch(r"`[\w/.]+::\w+`(, `[\w/.]+::\w+`)*", shown), guarantee


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("| Nothing is lost. | by care |", "no test shows: Nothing is lost."),
        ("| Nothing is lost. | `tests/unit/test_store.py::test_wishes` |", "tests/unit/test_store.py has no test_wishes"),
        ("| Nothing is lost. | `tests/unit/test_wishes.py::test_it` |", "tests/unit/test_wishes.py has no test_it"),
    ],
)
def test_a_guarantee_without_a_test_would_be_noticed(row, said):
    [(guarantee, shown)] = rows(f"| guarantee | shown by |\n|---|---|\n{row}")
    assert missing(guarantee, shown, documents.ROOT) == [said]


def test_requirements_are_said_in_words():
    """A code such as the letter R, a dash, a letter and a number says nothing to whoever reads it."""
    code = re.compile(r"\bR-[A-Z]\d")
    folders = ("onlinerl", "tests", "docs", "benchmarks", "configs", "launchers", "tools", "dashboards")
    files = [file for folder in folders for file in (documents.ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    assert len(files) > 200
    assert [str(file) for file in files if code.search(file.read_text())] == []
    assert code.search("(R-" + "A1)")


SUFFIXES = (".py", ".md", ".yaml", ".yml", ".sh", ".toml")
