"""All algorithms as parameters of a slow test: `make test` runs one of each kind, `make test-algorithms` the others."""

from __future__ import annotations

import pytest

from onlinerl import registry
from onlinerl.protocols.algorithm import Algorithm


def kind(name: str) -> str:
    """What it shares with others: the file of its nearest common base class, or its own."""
    classes = registry.load("algorithms", name, Algorithm).__mro__
    files = [each.__module__.rpartition(".")[2] for each in classes if issubclass(each, Algorithm)]
    return next((file for file in files if file.startswith("_")), name)


def each_algorithm() -> list[object]:
    """The first of each kind is not marked."""
    known: set[str] = set()
    found: list[object] = []
    for name in registry.names("algorithms"):
        marks = [pytest.mark.algorithms] if kind(name) in known else []
        known.add(kind(name))
        found.append(pytest.param(name, marks=marks))
    return found
