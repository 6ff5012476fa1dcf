"""Writes docs/algorithms.md from what algorithms declare and from what their tests prove: `python tools/algorithm_docs.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from onlinerl.views import cards

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "algorithms.md"
GOLDEN = ROOT / "tests" / "unit" / "algorithms"
TESTS = ROOT / "tests"
COLUMNS = (
    "name",
    "what it optimizes",
    "reference",
    "values by hand",
    "slope by finite differences",
    "agrees with",
    "real loop",
)
HEAD = """# Algorithms

Written by `python tools/algorithm_docs.py` from the files in `onlinerl/algorithms/` and their tests; a test compares the two.
`onlinerl algorithms NAME` prints the same with all knobs.

Every algorithm passes the contract tests (`tests/contracts/test_algorithms.py`): its gradient does not depend on micro-batches, ranks, order or
padding, and reads nothing that it does not declare; each knob changes something; responses that nobody judged count nowhere. That a run does
not depend on the order in which responses arrive is a matter of the loop, not of an algorithm (`tests/e2e/test_loop_toy.py`).

- **values by hand**: how many its golden test compares (`tests/unit/algorithms/`).
- **slope by finite differences**: in fp64, in a random direction. "held": what the formula holds constant on purpose stays at its value meanwhile;
  that it holds the right thing is shown by the slopes in the golden test.
- **agrees with**: another implementation that gives the same value and gradient; in brackets, of which part.
- **real loop**: two iterations on vLLM and DeepSpeed, the second one in a resumed run (`tests/integration/test_every_algorithm.py`), and which target runs it.

"""


def document() -> str:
    """The page."""
    rows = [_row(one) for one in cards.cards()]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return HEAD + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _row(one: cards.Card) -> tuple[str, ...]:
    tests = _parsed(GOLDEN / f"test_{one.name}.py")
    by_hand = next(f for f in _functions(tests) if f.name == "test_value_by_hand")
    return (
        f"`{one.name}`",
        f"{one.about} {one.source}",
        one.reference,
        str(_cases(by_hand)),
        _slope(tests),
        ", ".join(dict.fromkeys(filter(None, map(_agreement, _functions(tests))))),
        _real_loop(one.name),
    )


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _test(path: str, name: str) -> ast.FunctionDef:
    """A test of all algorithms.

    Raises:
        ValueError: if it is not there any more, or leaves some out, so that the page would say what is not so.
    """
    found = next((f for f in _functions(_parsed(TESTS / path)) if f.name == name), None)
    words = set() if found is None else {getattr(node, "attr", "") for node in ast.walk(found)}
    if found is None or words & {"skip", "xfail", "importorskip"}:
        raise ValueError(f"{path} has no {name} without exceptions: say in tools/algorithm_docs.py what is tested now")
    return found


def _slope(tests: ast.Module) -> str:
    """By the contract; and what it holds, which the golden test names."""
    _test("contracts/test_algorithms.py", "test_the_gradient_is_the_slope_of_the_loss")
    held = next((ast.get_docstring(f) for f in _functions(tests) if f.name == "stops_gradients"), None)
    if held is None:
        return "yes"
    named = held.rstrip(".")
    return f"yes; held: {named[0].lower() + named[1:] if len(named) > 1 else named}"


def _agreement(test: ast.FunctionDef) -> str | None:
    """ "TRL", if a test compares with it, and which part its name says: `test_PART_agrees_with_trl`."""
    said = re.fullmatch(r"test_(?:(.*)_)?agrees?_with_trl(?:_.*)?", test.name)
    calls = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    if said is None or not calls & _compare_with_trl():
        return None
    return "TRL" if said[1] is None else f"TRL ({said[1].replace('_', ' ')})"


@cache
def _compare_with_trl() -> set[str]:
    """Functions that call TRL, or hand it to `pytest.importorskip`."""
    return {"importorskip", "trl", *(f.name for f in _functions(_parsed(GOLDEN / "trl_losses.py")))}


def _real_loop(name: str) -> str:
    """By which target."""
    path = "integration/test_every_algorithm.py"
    _test(path, "test_it_runs_on_real_parts")
    _test(path, "test_one_of_each_kind_runs_on_real_parts")
    families = next(
        node.value
        for node in _parsed(TESTS / "support/every.py").body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FAMILIES"
    )
    return "`make test`" if name in ast.literal_eval(families) else "`make test-algorithms`"


def _functions(tests: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tests.body if isinstance(node, ast.FunctionDef))


def _cases(test: ast.FunctionDef) -> int:
    """How many values it compares."""
    asserts = sum(isinstance(node, ast.Assert) for node in ast.walk(test))
    parametrized = [d.args[1] for d in test.decorator_list if isinstance(d, ast.Call) and len(d.args) > 1]
    return asserts * max([len(p.elts) for p in parametrized if isinstance(p, ast.List)], default=1)


if __name__ == "__main__":
    TARGET.write_text(document())
