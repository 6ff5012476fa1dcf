"""The command line in the test's own process, for tests that replace a part of it."""

from __future__ import annotations

import shutil
import sys

import documents
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


CHEAP = """
extends: as_printed.yaml
iterations: 1
prompts: {per_iteration: 8}
evaluation: {prompts: 10}
sampling: {max_new_tokens: 12}
training: {learning_rate: 0.2}
engine: {name: toy}
learner: {name: toy}
metrics: {prometheus_port: 0}
checkpoints: {min_free_gib: 0.0}
"""


@pytest.fixture
def sandbox(tmp_path, monkeypatch, tiny_model):
    """A folder in which what the documents say can be done as printed, and is cheap: the quickstart on toy parts and a tiny model."""
    (tmp_path / "configs").mkdir()
    shutil.copy(documents.ROOT / "configs/quickstart.yaml", tmp_path / "configs/as_printed.yaml")
    (tmp_path / "configs/quickstart.yaml").write_text(CHEAP)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/SmolLM2-135M-Instruct").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(tmp_path))
    ]:
        del sys.modules[name]
