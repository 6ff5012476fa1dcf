"""No rank of ZeRO-3 ever holds the whole model: not while it loads, scores with a reference, exports or resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "zero3_memory.py"


def test_two_ranks_share_the_memory_of_a_model(tmp_path: Path) -> None:
    """60 million parameters in fp32; unit: the weights of the whole model. What is left to chance is about 0.2 of it."""
    out = tmp_path / "memory.json"
    command = [sys.executable, str(BENCHMARK), "--millions", "60", "--dtype", "float32", "--cases", "3x2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    whole = 4 * result["parameters"]
    above = {phase: (peak - result["phases"]["start"]) / whole for phase, peak in result["phases"].items()}
    print(above)

    assert above["load"] < 1.0  # half of the weights, and the layer that is being read; a rank that reads all of them has 1.5
    assert above["reference"] - above["score"] < 0.75  # half of the weights
    assert above["export"] - above["step"] < 0.25
    assert above["reload"] - above["step"] < 0.25
