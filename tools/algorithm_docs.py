"""Writes docs/algorithms.md from what algorithms declare and from what their golden tests prove: `python tools/algorithm_docs.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from onlinerl.views import cards

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "algorithms.md"
GOLDEN = ROOT / "tests" / "unit" / "algorithms"
HEAD = """# Algorithms

Written by `python tools/algorithm_docs.py` from the files in `onlinerl/algorithms/` and their golden tests; a test compares the two.
`onlinerl algorithms NAME` prints the same with all knobs.

Every algorithm passes the contract tests (`tests/contracts/test_algorithms.py`): its gradient is the slope of its loss by finite differences in
fp64, does not depend on micro-batches, ranks, order, arrival or padding, and reads nothing that it does not declare; each knob changes something;
responses that nobody judged count nowhere. What else its own test shows is in the last two columns.

"""


def document() -> str:
    """The page."""
    rows = [_row(one) for one in cards.cards()]
    lines = [("name", "what it optimizes", "reference", "values by hand", "agrees with"), ("---",) * 5, *rows]
    return HEAD + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _row(one: cards.Card) -> tuple[str, ...]:
    tests = ast.parse((GOLDEN / f"test_{one.name}.py").read_text())
    by_hand = next(f for f in _functions(tests) if f.name == "test_value_by_hand")
    return (
        f"`{one.name}`",
        f"{one.about} {one.source}",
        one.reference,
        str(_cases(by_hand)),
        "TRL" if any("trl" in f.name for f in _functions(tests)) else "",
    )


def _functions(tests: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tests.body if isinstance(node, ast.FunctionDef))


def _cases(test: ast.FunctionDef) -> int:
    """How many values it compares."""
    asserts = sum(isinstance(node, ast.Assert) for node in ast.walk(test))
    parametrized = [d.args[1] for d in test.decorator_list if isinstance(d, ast.Call) and len(d.args) > 1]
    return asserts * max([len(p.elts) for p in parametrized if isinstance(p, ast.List)], default=1)


if __name__ == "__main__":
    TARGET.write_text(document())
