"""The command line in the test's own process, for tests that replace a part of it."""

from __future__ import annotations

import sys

import pytest

from onlinerl import cli as command_line


@pytest.fixture
def onlinerl(monkeypatch, capsys, tmp_path):
    """The command line in this process; returns its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["onlinerl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def oracle(tmp_path, monkeypatch):
    """Writes an oracle of the user's own; returns the overrides that select it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = iter(range(100))

    def make(body: str) -> dict[str, object]:
        name = f"oracle_{tmp_path.name}_{next(names)}"
        lines = [
            "calls = 0",
            "def judge(queries):",
            "    global calls",
            "    calls += 1",
            *(f"    {x}" for x in body.splitlines()),
        ]
        (tmp_path / f"{name}.py").write_text("\n".join(lines) + "\n")
        return {"oracle.name": "python", "oracle.function": f"{name}.judge", "oracle.groups_per_call": 16}

    return make
