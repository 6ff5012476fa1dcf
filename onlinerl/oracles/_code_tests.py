"""Tests of a program, as data sets have them, and what passes them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENCED = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test: what is evaluated beside the program, and what has to come out."""

    expressions: tuple[str, ...]
    """One, or two that have to be equal."""
    expected: tuple[Any] | None = None
    """What the one must be; None: true."""
    as_json: bool = False
    """Whether tuples count as lists, which JSON has instead of them."""

    def passed(self, values: Sequence[str]) -> bool:
        """Whether these values, as Python writes them, are right."""
        try:
            found = [ast.literal_eval(value) for value in values]
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # of no plain value, such as nan
            return False
        if len(found) == 2:
            return bool(found[0] == found[1])
        if self.expected is None:
            return bool(found[0])
        if self.as_json:
            value = _as_json(found[0])
            return bool(value == self.expected[0] or [value] == self.expected[0])
        return bool(found[0] == self.expected[0])


@dataclass(frozen=True, kw_only=True)
class Tests:
    """Of one prompt: either what is asked of the program's functions, or what it has to write when it reads something."""

    setup: str = ""
    """Run after the program and before the tests."""
    checks: tuple[Check, ...] = ()
    streams: tuple[tuple[str, str], ...] = ()
    """stdin, stdout."""


def program(response: str) -> str:
    """The last fenced block of code in a response; all of it where there is none."""
    blocks = FENCED.findall(response)
    return str(blocks[-1]) if blocks else response


def read(reference: str) -> Tests:
    """Tests from a reference answer.

    - JSON {"inputs": [...], "outputs": [...]}: stdin and stdout; with "fn_name", arguments and what the function returns (APPS, TACO, verl);
    - a JSON list of asserts (MBPP), or Python code: each `assert` on its own line of the module is a test, the rest goes before them. Code
      without such an assert is one test, which fails if it raises anything (HumanEval, with a call of `check` at its end).

    Raises:
        ValueError: saying why it is none of these.
    """
    try:
        found = json.loads(reference)
    except ValueError:
        found = reference
    if isinstance(found, Mapping):
        return _from_mapping(found)
    if isinstance(found, list) and all(isinstance(line, str) for line in found):
        found = "\n".join(found)
    if not isinstance(found, str):
        raise ValueError("the tests are neither Python code nor a list of asserts nor {inputs, outputs}")
    return _from_code(found)


def same_output(written: str, expected: str) -> bool:
    """Whether lines are the same, but for white space at their ends and empty lines at the end."""
    one, other = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (written, expected))
    return one == other


def _from_mapping(found: Mapping[str, Any]) -> Tests:
    inputs, outputs, name = found.get("inputs"), found.get("outputs"), found.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("`inputs` and `outputs` have to be lists of the same length, of one or more")
    if name is None:
        return Tests(streams=tuple((_text(given), _text(wanted)) for given, wanted in zip(inputs, outputs, strict=True)))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} is no name of a function")
    setup = f"_called = Solution().{name} if 'Solution' in globals() else {name}"
    checks = tuple(
        Check(expressions=(f"_called(*{given!r})",), expected=(wanted,), as_json=True)
        for given, wanted in zip(inputs, outputs, strict=True)
        if isinstance(given, list)
    )
    if len(checks) != len(inputs):
        raise ValueError("each of `inputs` has to be a list of arguments")
    return Tests(setup=setup, checks=checks)


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _from_code(code: str) -> Tests:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the tests are no Python code: {error}") from None
    checks = tuple(_check(node.test) for node in tree.body if isinstance(node, ast.Assert))
    before = [node for node in tree.body if not isinstance(node, ast.Assert)]
    if not checks and not before:
        raise ValueError("there are no tests")
    if not checks:
        return Tests(setup="", checks=(Check(expressions=(f"exec({code!r}, globals()) is None",)),))
    return Tests(setup=ast.unparse(ast.Module(body=before, type_ignores=[])), checks=checks)


def _check(test: ast.expr) -> Check:
    """What an assert says: that two things are equal, one of them perhaps known, or that one is true."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        sides = (test.left, test.comparators[0])
        for known, other in (sides[::-1], sides):
            try:
                return Check(expressions=(ast.unparse(other),), expected=(ast.literal_eval(known),))
            except (ValueError, TypeError, SyntaxError):
                continue
        return Check(expressions=(ast.unparse(sides[0]), ast.unparse(sides[1])))
    return Check(expressions=(ast.unparse(test),))


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return {k: _as_json(v) for k, v in value.items()} if isinstance(value, dict) else value
