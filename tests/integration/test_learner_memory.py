"""Exports and checkpoints are written and read without another copy of the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.long]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "zero3_memory.py"


def test_exports_and_checkpoints_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """60 million parameters in fp32; unit: the weights of the whole model. What is left to chance is about 0.2 of it.

    That a rank holds no more than its share of policy and reference is tested beside the learner's other tests; how much that saves
    at the size of half a billion parameters is measured by `make bench-memory`.
    """
    out = tmp_path / "memory.json"
    command = [sys.executable, str(BENCHMARK), "--millions", "60", "--dtype", "float32", "--cases", "3x2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    whole = 4 * result["parameters"]
    above = {phase: (peak - result["phases"]["start"]) / whole for phase, peak in result["phases"].items()}
    print(above)

    assert above["export"] - above["step"] < 0.25
    assert above["reload"] - above["step"] < 0.25
